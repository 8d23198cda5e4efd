"""The model card of an export: README.md, made of what is known and of nothing else.

What is known comes from the adapter file, the method's own text, the run's manifest where one lies beside the adapter,
the base's own card where it is at hand, and the parity report.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import pegbox
from pegbox import methods
from pegbox.core.method import Method
from pegbox.evaluate.report import ParityReport

if TYPE_CHECKING:
    from torch import nn

    from pegbox.evaluate.opened import Opened

MANIFEST = "manifest.json"

# transformers' own tables of model classes -> (pipeline of the hub, class that loads the model)
TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("text-generation", "AutoModelForCausalLM"),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": (None, "AutoModelForSeq2SeqLM"),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ("text-classification", "AutoModelForSequenceClassification"),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": ("token-classification", "AutoModelForTokenClassification"),
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": ("question-answering", "AutoModelForQuestionAnswering"),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ("fill-mask", "AutoModelForMaskedLM"),
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": ("image-classification", "AutoModelForImageClassification"),
}
SHOWN = ("data", "metrics", "results", "seed", "seeds", "steps", "versions")  # parts of a manifest that a card repeats
HUB_NAME = re.compile(r"[\w\-]+/[\w.\-]+")
LIBRARIES = {"merged": "transformers", "peft": "peft", "adapter": "pegbox"}


@dataclass(frozen=True)
class Facts:
    """All that a card says.

    Attributes:
        base: name on the hub; None for a local folder, whose path says nothing to a reader.
        base_title: what to call the base in a sentence.
        pipeline, loader: the hub's name of the task and transformers' class, where transformers knows the model.
        manifest: of the run, empty where there is none.
    """

    format: str
    method: type[Method]
    settings: Mapping[str, Any]
    also_train: tuple[str, ...]
    base: str | None
    base_title: str
    fingerprint: str | None
    pipeline: str | None
    loader: str
    has_tokenizer: bool
    license: str | None
    manifest: Mapping[str, Any]
    report: ParityReport


def facts(opened: Opened, format: str, report: ParityReport) -> Facts:
    """Gather what is known of an opened adapter and its export."""
    base, file = opened.base, opened.file
    local = base is not None and Path(base).exists()
    pipeline, loader = task_of(opened.tuned.model)
    return Facts(
        format=format,
        method=methods.get(file.method),
        settings=file.settings,
        also_train=file.also_train,
        base=None if local else base,
        base_title=Path(base).name if base else type(opened.tuned.model).__name__,
        fingerprint=file.fingerprint,
        pipeline=pipeline,
        loader=loader,
        has_tokenizer=opened.tokenizer is not None,
        license=_license(Path(base)) if base and local else None,
        manifest=read_manifest(opened.folder),
        report=report,
    )


def write(folder: Path, known: Facts) -> None:
    """`README.md` in `folder`."""
    (folder / "README.md").write_text(text(known), encoding="utf-8")


def text(known: Facts) -> str:
    """The whole card."""
    front = yaml.safe_dump(front_matter(known), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", _head(known), _method(known), _run(known), _parity(known), _use(known)]
    return "\n\n".join(parts) + "\n"


def front_matter(known: Facts) -> dict[str, Any]:
    """The hub's metadata; a key that is not known is left out."""
    name = known.method.name()
    values: dict[str, Any] = {}
    if known.base:
        relation = "finetune" if known.format == "merged" else "adapter"
        values |= {"base_model": known.base, "base_model_relation": relation}
    values |= {
        "library_name": LIBRARIES[known.format],
        "pipeline_tag": known.pipeline,
        "tags": ["pegbox", name],
        "datasets": _hub_datasets(known.manifest),
        "license": known.license,
        "model-index": _model_index(known),
    }
    return {key: value for key, value in values.items() if value}


# -- the parts ---------------------------------------------------------------------------------------------------


def _head(known: Facts) -> str:
    what = {
        "merged": "a whole model: the base with the adapter folded into its weights",
        "peft": "an adapter in HF PEFT's files; it needs its base",
        "adapter": "an adapter in Pegbox's files; it needs its base",
    }[known.format]
    mark = f" (fingerprint `{known.fingerprint}`)" if known.fingerprint else ""
    title = f"# {known.base_title}, tuned with {known.method.name()}"
    base = f"`{known.base}`" if known.base else f"`{known.base_title}`, a local folder or module"
    return f"{title}\n\nThis is {what}. Base: {base}{mark}. Written by Pegbox {pegbox.__version__}."


def _method(known: Facts) -> str:
    title, equation = described(known.method)
    rows = [f"| {f.name} | `{_plain(known.settings.get(f.name, f.default))}` |" for f in fields(known.method)]
    also = f"\n\nTrained whole beside it: {', '.join(f'`{p}`' for p in known.also_train)}." if known.also_train else ""
    block = f"\n\n```text\n{equation}\n```" if equation else ""
    table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
    return f"## Method\n\n{title}{block}\n\n{table}{also}"


def _run(known: Facts) -> str:
    if not known.manifest:
        return "## Data and results\n\nNo run manifest lay beside the adapter: its data and its results are not known."
    rows = [f"| {key} | `{_plain(value)}` |" for key, value in _flat(known.manifest).items()]
    return "\n".join(
        ["## Data and results", "", "From the run's manifest.", "", "| what | value |", "| --- | --- |", *rows]
    )


def _parity(known: Facts) -> str:
    said = {
        "merged": "The tuned model, the merged model, and the merged model saved and loaded again",
        "peft": "The tuned model, and these files loaded by HF PEFT",
        "adapter": "The tuned model, and these files loaded again",
    }[known.format]
    count = len(known.report.pairs[-1].probes)
    return (
        f"## Parity\n\n{said} were run on {count} probe inputs. Differences are of logits, relative ones to the "
        f"largest logit; KL is in nats; the last column is the worst tuned module run by itself. Weights are "
        f"{known.report.dtype}, arithmetic float32. Numbers of every probe are in `parity.json`."
        f"\n\n{known.report.markdown()}"
    )


def _use(known: Facts) -> str:
    base = known.base or known.base_title
    lines = {
        "merged": [f"from transformers import {known.loader}", "", f'model = {known.loader}.from_pretrained("FOLDER")'],
        "peft": [
            "from peft import PeftModel",
            f"from transformers import {known.loader}",
            "",
            f'base = {known.loader}.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ],
        "adapter": [
            "import pegbox",
            f"from transformers import {known.loader}",
            "",
            f'base = {known.loader}.from_pretrained("{base}")',
            'model = pegbox.load(base, "FOLDER")',
        ],
    }[known.format]
    if known.has_tokenizer:
        lines = [
            "from transformers import AutoTokenizer",
            *lines,
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    code = "\n".join(lines)
    return f"## Use\n\nwith the folder of this card in the place of FOLDER:\n\n```python\n{code}\n```"


# -- what is known -----------------------------------------------------------------------------------------------


def described(method: type[Method]) -> tuple[str, str]:
    """Title with its source, and equation: the first paragraph and the first indented block of the method's file."""
    doc = sys.modules[method.__module__].__doc__ or ""
    title, _, body = doc.partition("\n\n")
    blocks = body.split("\n\n")
    indented = next((b for b in blocks if b.startswith("    ") and b.strip()), "")
    return " ".join(title.split()), "\n".join(line.removeprefix("    ") for line in indented.strip("\n").splitlines())


def task_of(model: nn.Module) -> tuple[str | None, str]:
    """The hub's name of what a model does, and the class that loads it, from transformers' own tables."""
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    for table, (pipeline, loader) in TASKS.items():
        listed = getattr(modeling_auto, table).values()
        if any(name == entry or (name in entry and isinstance(entry, (list, tuple))) for entry in listed):
            return pipeline, loader
    return None, "AutoModel"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run that wrote an adapter, in its folder or the one above; empty where there is none."""
    for place in (folder, folder.parent):
        path = place / MANIFEST
        if path.is_file():
            found = json.loads(path.read_text())
            return found if isinstance(found, dict) else {}
    return {}


def _license(base: Path) -> str | None:
    """The licence that the base's own card declares."""
    path = base / "README.md"
    if not path.is_file():
        return None
    head = path.read_text(encoding="utf-8").split("---")
    try:
        declared = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except yaml.YAMLError:
        return None
    found = declared.get("license") if isinstance(declared, dict) else None
    return found if isinstance(found, str) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name; at the top, those of SHOWN."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key not in SHOWN:
            continue
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = value
    return out


def _source(manifest: Mapping[str, Any]) -> str | None:
    data = manifest.get("data")
    found = data.get("source") if isinstance(data, Mapping) else data
    return found if isinstance(found, str) and found else None


def _hub_datasets(manifest: Mapping[str, Any]) -> list[str]:
    source = _source(manifest)
    return [source] if source and HUB_NAME.fullmatch(source) and not Path(source).exists() else []


def _model_index(known: Facts) -> list[dict[str, Any]]:
    """The hub's form of results: only what the manifest measured, on data that it names."""
    metrics, source = known.manifest.get("metrics"), _source(known.manifest)
    if not (isinstance(metrics, Mapping) and source and known.pipeline):
        return []
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    if not numbers:
        return []
    result = {
        "task": {"type": known.pipeline},
        "dataset": {"name": Path(source).name, "type": source if _hub_datasets(known.manifest) else Path(source).name},
        "metrics": [{"type": k, "value": v} for k, v in numbers.items()],
    }
    return [{"name": f"{known.base_title}-{known.method.name()}", "results": [result]}]


def _plain(value: Any) -> str:
    """A value for a table cell; of a path only its name, for a card is read elsewhere."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return str(list(value) if isinstance(value, tuple) else value).replace("|", "\\|")
