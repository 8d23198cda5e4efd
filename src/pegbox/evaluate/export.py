"""An adapter made into files for use elsewhere, each proven equal to what was trained before it gets its name.

Everything is written to a folder beside the output, read back, run on probes, and renamed only then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

import pegbox
from pegbox import methods
from pegbox.core import files
from pegbox.core.errors import CannotMerge, MethodError, MissingExtra, ParityError, SettingsError
from pegbox.core.settings import build, setting
from pegbox.evaluate import card, parity
from pegbox.evaluate.opened import Opened, load_tokenizer, open_adapter
from pegbox.evaluate.parity import Output
from pegbox.evaluate.probes import TEXTS, Probe, probes
from pegbox.evaluate.report import ParityReport
from pegbox.evaluate.saved import weight_dtypes
from pegbox.train.settings import Opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARITY_FILE = "parity.json"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What `pegbox merge` and `pegbox export` take as `key=value`."""

    adapter: str = setting("", "folder of the adapter")
    output: str = setting("", "folder to write")
    format: Literal["merged", "peft", "adapter"] = setting(
        "merged", "a whole model, HF PEFT's adapter files, or Pegbox's own"
    )
    model: str | None = setting(None, "the base, where it is not the one that the adapter names")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "of a merged model; auto: the base's")
    quantise: Opening = setting(  # noqa: RUF009
        "auto", "how the base is kept while it is opened; auto: as in training, whose merged model is then exact"
    )
    requantise: bool = setting(False, "leave a merged model quantised as its base is; moves it a little")
    data: str | None = setting(None, "held-out examples to compare on, beside the built-in probes")
    tolerance: float | None = setting(
        None, "largest difference allowed, relative to the largest logit; by dtype if none", above=0
    )
    overwrite: bool = setting(False, "replace what is in the output folder")
    keep_failed: bool = setting(False, "keep the files of an export that failed, as OUTPUT.failed")


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    folder: Path
    format: str
    report: ParityReport

    def __str__(self) -> str:
        size = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        equal = "how far from what was trained is told below" if self.report.moved else "equal to what was trained"
        head = f"{self.format} in {self.folder} ({size / 1e6:,.1f} MB), {equal}:"
        return f"{head}\n\n{self.report.markdown()}"


def merge(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | nn.Module | None = None,
    **settings: Any,
) -> Exported:
    """Fold an adapter into its base, prove it and write the whole model: `export` with `format="merged"`."""
    return export(adapter, output, "merged", model=model, **settings)


def export(
    adapter: str | os.PathLike[str] | ExportSettings,
    output: str | os.PathLike[str] = "",
    format: str = "merged",
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: Iterable[Mapping[str, Any] | str] = (),
    probes: Sequence[Probe] | None = None,
    **settings: Any,
) -> Exported:
    """Write an adapter for use elsewhere, with `parity.json` and a model card; failing, write nothing.

    Args:
        adapter: its folder, or all settings at once.
        output: the folder to write; must be empty or absent unless `overwrite`.
        format: `merged`, a whole transformers model; `peft`, what HF PEFT loads (needs peft, to prove it); `adapter`,
            the adapter as Pegbox writes it.
        model: the base, by name or as a module, which is given back as it was.
        rows: held-out examples (canonical, or texts) to compare on, beside the built-in probes.
        probes: what to compare on, instead of both.
        settings: the other fields of ExportSettings.

    Raises:
        CannotMerge: the method has no merged form; `format="adapter"` has no such limit.
        ParityError: what was written is not what was trained.
        SettingsError: the output folder is not empty.
        AdapterError, ModelError: the adapter or its base cannot be loaded.
    """
    if not isinstance(adapter, ExportSettings):
        given = {"adapter": os.fspath(adapter), "output": os.fspath(output), "format": format, **settings}
        adapter = build(ExportSettings, given, what="export")
    chosen = adapter
    _check_paths(chosen)
    _check_requantise(chosen)
    opened = _open(chosen, model, tokenizer)
    if probes is None:
        probes = _probes(opened, [*rows, *_held_out(chosen)])
    with _finished_folder(Path(chosen.output), chosen) as folder:
        report = WRITERS[chosen.format](opened, folder, probes, chosen)
        _save_tokenizer(opened.tokenizer, folder)
        (folder / PARITY_FILE).write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
        card.write(folder, card.facts(opened, chosen.format, report))
    opened.tuned.detach()
    return Exported(Path(chosen.output), chosen.format, report)


def _open(
    chosen: ExportSettings, model: str | os.PathLike[str] | nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
) -> Opened:
    file = methods.read(chosen.adapter)
    method = methods.make(file.method, file.settings)
    if chosen.format == "merged" and method.traits.merge == "no":
        raise CannotMerge(
            f"{method.name()} changes more than weights, so it has no merged form; "
            f"format=adapter{' or format=peft' if method.traits.peft else ''} exports it as it is"
        )
    if chosen.format == "peft" and method.traits.peft is None:
        other = "format=adapter" if method.traits.merge == "no" else "format=merged or format=adapter"
        raise MethodError(f"HF PEFT has no {method.name()}; {other} exports it")
    base = model if model is not None else chosen.model
    return open_adapter(chosen.adapter, model=base, tokenizer=tokenizer, quantise=chosen.quantise)


def _held_out(chosen: ExportSettings) -> list[Mapping[str, Any]]:
    if chosen.data is None:
        return []
    from pegbox.data.examples import read
    from pegbox.evaluate.probes import ROWS

    return list(read(chosen.data, limit=ROWS))


def _probes(opened: Opened, rows: Sequence[Mapping[str, Any] | str]) -> list[Probe]:
    made, tasks = probes(opened.tuned.model, opened.tokenizer, rows), opened.tuned.method.tasks_needed()
    if not tasks:
        return made
    return [Probe(p.name, {**p.inputs, "task_ids": torch.tensor([k % tasks])}) for k, p in enumerate(made)]


# -- the formats -------------------------------------------------------------------------------------------------


def _write_merged(opened: Opened, folder: Path, probes: Sequence[Probe], chosen: ExportSettings) -> ParityReport:
    dtype = None if chosen.dtype == "auto" else getattr(torch, chosen.dtype)
    return parity.gate(
        opened.tuned, probes, tolerance=chosen.tolerance, folder=folder, dtype=dtype, requantise=chosen.requantise
    )


def _write_adapter(opened: Opened, folder: Path, probes: Sequence[Probe], chosen: ExportSettings) -> ParityReport:
    outputs, moved = _before(opened, folder, probes), parity.of_base(opened.tuned)
    again = pegbox.load(opened.fresh(), folder)
    outputs["reloaded"] = parity.run(again, probes)
    again.detach()
    return parity.judge(outputs, probes, weight_dtypes(again.model), chosen.tolerance, moved=moved)


def _write_peft(opened: Opened, folder: Path, probes: Sequence[Probe], chosen: ExportSettings) -> ParityReport:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "peft", "proving an export for HF PEFT") from error
    outputs, moved = _before(opened, folder, probes), parity.of_base(opened.tuned)
    base = opened.fresh()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about PEFT's own calls of transformers
        theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    outputs["PEFT"] = parity.run(_WithoutPrompt(theirs), probes)
    if not theirs.peft_config["default"].is_prompt_learning:
        theirs.unload()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(flags[name])
    return parity.judge(outputs, probes, weight_dtypes(base), chosen.tolerance, moved=moved)


class _WithoutPrompt(nn.Module):
    """PEFT's model without the outputs of virtual tokens, which it leaves in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        logits, length = out.get("logits"), inputs["input_ids"].shape[1]
        if isinstance(logits, torch.Tensor) and logits.ndim == 3:
            out["logits"] = logits[:, -length:]
        return out


WRITERS = {"merged": _write_merged, "adapter": _write_adapter, "peft": _write_peft}


def _before(opened: Opened, folder: Path, probes: Sequence[Probe]) -> dict[str, list[Output] | None]:
    """The outputs to hold the files to, and the files."""
    outputs: dict[str, list[Output] | None] = {
        "base": parity.run_bare(opened.tuned, probes),
        "adapter": parity.run(opened.tuned, probes),
    }
    files.save(opened.tuned, folder, **opened.file.extra)
    return outputs


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """The tokenizer, with its chat template, read back and held to the same ids.

    Raises:
        ParityError: the saved one reads a text otherwise.
    """
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(folder)
    if again is None:
        raise ParityError("the saved tokenizer cannot be loaded again")
    for name, text in TEXTS.items():
        before, after = tokenizer(text)["input_ids"], again(text)["input_ids"]
        if before != after:
            raise ParityError(f"the saved tokenizer reads the {name} probe as {after}, not {before}")
    if tokenizer.chat_template != again.chat_template:
        raise ParityError("the saved tokenizer has another chat template")


# -- the output folder -------------------------------------------------------------------------------------------


def _check_paths(chosen: ExportSettings) -> None:
    if not chosen.adapter or not chosen.output:
        raise SettingsError("export needs adapter= (the folder of the adapter) and output= (the folder to write)")
    target, source = Path(chosen.output).resolve(), Path(chosen.adapter).resolve()
    if target == source or target in source.parents:
        raise SettingsError(f"export.output {chosen.output!r} holds the adapter itself; choose another folder")
    if target.is_file():
        raise SettingsError(f"export.output {chosen.output!r} is a file; it must be a folder")
    if target.is_dir() and any(target.iterdir()) and not chosen.overwrite:
        raise SettingsError(f"export.output {chosen.output!r} is not empty; choose another folder, or overwrite=true")


def _check_requantise(chosen: ExportSettings) -> None:
    if chosen.requantise and chosen.format != "merged":
        raise SettingsError(f"requantise is for format=merged; format={chosen.format} writes no weights of the base")
    if chosen.requantise and chosen.dtype != "auto":
        raise SettingsError(f"requantise leaves the base's own dtype, so dtype={chosen.dtype} cannot go with it")


@contextlib.contextmanager
def _finished_folder(target: Path, chosen: ExportSettings) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if nothing is raised, and else is gone (or kept as TARGET.failed)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    failed = target.with_name(f"{target.name}.failed")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except ParityError as error:
        where = _set_aside(partial, failed, chosen.keep_failed)
        told = ParityError(f"{error}. {target} was not written; {where}")
        told.report = getattr(error, "report", None)  # type: ignore[attr-defined]
        raise told from error
    except BaseException:
        _set_aside(partial, failed, chosen.keep_failed)
        raise
    _replace(partial, target)


def _set_aside(partial: Path, failed: Path, keep: bool) -> str:
    if not keep:
        shutil.rmtree(partial)
        return f"keep_failed=true keeps what failed in {failed}"
    shutil.rmtree(failed, ignore_errors=True)
    partial.rename(failed)
    return f"what failed is in {failed}"


def _replace(partial: Path, target: Path) -> None:
    """Rename over what is there, which is deleted last."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
