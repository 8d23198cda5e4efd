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
from pegbox.train.model import PACKAGED, locate

if TYPE_CHECKING:
    from torch import nn

    from pegbox.evaluate.opened import Opened

MANIFEST = "manifest.json"

# transformers' classes that load a model -> the hub's name of the task
LOADERS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
}
CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
# parts of a manifest that a card repeats
SHOWN = (
    *("objective", "data", "labels", "steps", "metrics", "train_loss", "trained_parameters", "total_parameters"),
    *("dtype", "seed", "seconds", "peak_memory", "pegbox", "commit", "packages"),
)
# settings of a run that a card repeats; those that name files are not among them
SETTINGS = (
    *("learning_rate", "epochs", "max_steps", "batch_size", "gradient_accumulation", "schedule", "warmup"),
    *("weight_decay", "optimizer", "quantise", "label_smoothing", "max_length", "packing", "assistant_only"),
)
MOST = 8  # of a list that a table shows
HUB_NAME = re.compile(r"[\w\-]+/[\w.\-]+")
LIBRARIES = {"merged": "transformers", "peft": "peft", "adapter": "pegbox"}


@dataclass(frozen=True)
class Facts:
    """All that a card says.

    Attributes:
        base: name on the hub; None for a local folder, whose path says nothing to a reader.
        base_title: what to call the base in a sentence.
        own_class: the model's class is Pegbox's, not transformers'.
        classes: of a classifier.
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
    own_class: bool
    classes: int | None
    has_tokenizer: bool
    license: str | None
    manifest: Mapping[str, Any]
    report: ParityReport


def facts(opened: Opened, format: str, report: ParityReport) -> Facts:
    """Gather what is known of an opened adapter and its export."""
    base, file = opened.base, opened.file
    manifest = read_manifest(opened.folder)
    local = base is not None and (base in PACKAGED or Path(base).exists())
    model: Any = opened.tuned.model
    pipeline, loader = task_of(model)
    return Facts(
        format=format,
        method=methods.get(file.method),
        settings=file.settings,
        also_train=file.also_train,
        base=None if local else base,
        base_title=_title(base, manifest) or type(model).__name__,
        fingerprint=file.fingerprint,
        pipeline=pipeline,
        loader=loader,
        own_class=type(model).__module__.partition(".")[0] == "pegbox",
        classes=model.config.num_labels if loader in CLASSIFIERS else None,
        has_tokenizer=opened.tokenizer is not None,
        license=_license(Path(locate(base))) if base and local else None,
        manifest=manifest,
        report=report,
    )


def _title(base: str | None, manifest: Mapping[str, Any]) -> str | None:
    """The last part of the base's name, as the run was given it where that is known."""
    settings = manifest.get("settings")
    given = settings.get("model") if isinstance(settings, Mapping) else None
    name = given or base
    return Path(name).name if name else None


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
    rows = [f"| {key} | `{_plain(value)}` |" for key, value in _shown(known.manifest).items()]
    return "\n".join(
        [
            "## Data and results",
            "",
            "From the run's manifest; times in seconds, memory in bytes.",
            "",
            "| what | value |",
            "| --- | --- |",
            *rows,
        ]
    )


def _parity(known: Facts) -> str:
    said = {
        "merged": "The tuned model, the merged model, and the merged model saved and loaded again",
        "peft": "The tuned model, and these files loaded by HF PEFT",
        "adapter": "The tuned model, and these files loaded again",
    }[known.format]
    count = len(known.report.pairs[-1].probes)
    own = ", ".join(f"`{path}`" for path in known.also_train)
    also = (
        f" In the line of the base, {own} is as the base's files have it, or drawn where they have none." if own else ""
    )
    return (
        f"## Parity\n\n{said} were run on {count} probe inputs. Differences are of logits, relative ones to the "
        f"largest logit; KL is in nats; the last column is the worst tuned module run by itself. Weights are "
        f"{known.report.dtype}, arithmetic float32. Numbers of every probe are in `parity.json`."
        f"{also}\n\n{known.report.markdown()}"
    )


def _use(known: Facts) -> str:
    lines = {"merged": _use_merged, "peft": _use_peft, "adapter": _use_adapter}[known.format](known)
    if known.has_tokenizer and known.format != "adapter":
        reader = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        lines = ["from transformers import AutoTokenizer", *lines, reader]
    code = "\n".join(lines)
    return f"## Use\n\nwith the folder of this card in the place of FOLDER:\n\n```python\n{code}\n```"


def _use_merged(known: Facts) -> list[str]:
    trust = ", trust_remote_code=True" if known.own_class else ""
    note = (
        ["# the model's class is not transformers' own: this runs the code in pooled.py of the folder"] if trust else []
    )
    load = f'model = {known.loader}.from_pretrained("FOLDER"{trust})'
    return [f"from transformers import {known.loader}", "", *note, load]


def _use_peft(known: Facts) -> list[str]:
    base, head = known.base or known.base_title, f", num_labels={known.classes}" if known.classes else ""
    if known.own_class:
        imports = "from pegbox.train.model import locate\nfrom pegbox.train.pooled import load_classifier"
        load = f'load_classifier(locate("{base}"){head})'
    else:
        imports, load = f"from transformers import {known.loader}", f'{known.loader}.from_pretrained("{base}"{head})'
    return [
        "from peft import PeftModel",
        imports,
        "",
        f"base = {load}",
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    ]


def _use_adapter(known: Facts) -> list[str]:
    return [
        "from pegbox.evaluate.opened import open_adapter",
        "",
        f'opened = open_adapter("FOLDER", model="{known.base or known.base_title}")',
        "model, tokenizer = opened.tuned, opened.tokenizer",
    ]


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
    import transformers

    config = getattr(model, "config", None)
    for loader, pipeline in LOADERS.items():
        known = getattr(transformers, loader)._model_mapping.get(type(config), ())
        if type(model) in (known if isinstance(known, tuple) else (known,)):
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


def _shown(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run that a card repeats, by dotted name."""
    settings = manifest.get("settings")
    chosen = {k: settings[k] for k in SETTINGS if k in settings} if isinstance(settings, Mapping) else {}
    return _flat({"data": {"name": _data_name(manifest)}}) | _flat(
        {**{k: manifest[k] for k in SHOWN if k in manifest}, "settings": chosen}
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name, without those that are none."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = value
    return out


def _source(manifest: Mapping[str, Any]) -> str | None:
    settings = manifest.get("settings")
    found = settings.get("data") if isinstance(settings, Mapping) else None
    return found if isinstance(found, str) and found else None


def _data_name(manifest: Mapping[str, Any]) -> str | None:
    """What to call the data: its hub id, or the last part of its path."""
    source = _source(manifest)
    return source if source is None or _hub_datasets(manifest) else Path(source).name


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
        "dataset": {"name": Path(source).name, "type": _data_name(known.manifest)},
        "metrics": [{"type": k, "value": v} for k, v in numbers.items()],
    }
    return [{"name": f"{known.base_title}-{known.method.name()}", "results": [result]}]


def _plain(value: Any) -> str:
    """A value for a table cell; of a path only its name, for a card is read elsewhere."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    if isinstance(value, (list, tuple)):
        more = f", ... ({len(value)} in all)" if len(value) > MOST else ""
        value = ", ".join(map(str, value[:MOST])) + more or "none"
    return str(value).replace("|", "\\|")
