"""HF PEFT has the method too: its files load here, ours load there, outputs and gradients agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, every, require_close, require_different
from pegbox.checks.when import named_in_peft, read_from_peft
from pegbox.core.files import CONFIG, TENSORS
from pegbox.core.tuned import Tuned


@check(named_in_peft)
def peft_loads_ours(lab: Lab) -> None:
    """HF PEFT loads the saved adapter without a word, and gives the same outputs and gradients."""
    from peft import PeftModel

    tuned = lab.shaken()
    folder = lab.save(tuned)
    theirs = _told_tasks(lab, _quietly(PeftModel.from_pretrained, lab.model(), str(folder)).eval())
    require_close(_output(lab, theirs), lab.output(tuned), "the adapter in PEFT")
    tuned = _as_kept(lab, tuned, theirs)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("default" in name.split("."))
    lab.gradients(tuned)
    _quietly(lab.loss, theirs).backward()
    _as_values(tuned.trainable().values())
    _as_values(theirs.parameters())
    _quietly(theirs.save_pretrained, str(lab.folder / "theirs"))
    every(load_file(lab.folder / "theirs" / TENSORS), load_file(lab.save(tuned) / TENSORS), require_close, "gradients")


def _as_kept(lab: Lab, tuned: Tuned, theirs: Any) -> Tuned:
    """The adapter as PEFT keeps it: a prompt, say, without the network that made it; mostly the adapter itself."""
    ours, kept = lab.folder / "adapter", lab.folder / "kept"
    _quietly(theirs.save_pretrained, str(kept))
    if load_file(kept / TENSORS).keys() == load_file(ours / TENSORS).keys():
        return tuned
    again = lab.load(kept, lab.model())
    require_close(lab.output(again), lab.output(tuned), "the adapter as PEFT keeps it")
    return again


@check(read_from_peft)
def pefts_files_load(lab: Lab) -> None:
    """An adapter that HF PEFT has made and saved loads here, and gives the same outputs."""
    from peft import PeftConfig, get_peft_model

    template = lab.save(lab.tuned(), folder="template")
    config = _quietly(PeftConfig.from_pretrained, str(template))
    config.inference_mode = False
    theirs = _told_tasks(lab, _quietly(get_peft_model, lab.model(), config).eval())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    _quietly(theirs.save_pretrained, str(lab.folder / "theirs"))
    require("pegbox" not in json.loads((lab.folder / "theirs" / CONFIG).read_text()), "the file is not PEFT's own")
    want = _output(lab, theirs)
    require_different(want, lab.output(lab.model()), "PEFT's adapter")
    require_close(lab.output(lab.load(lab.folder / "theirs", lab.model())), want, "PEFT's adapter here")


def _told_tasks(lab: Lab, theirs: Any) -> Any:
    """PEFT's model, called with the first task for every row where it wants to know."""

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = len(next(v for v in kwargs.values() if isinstance(v, Tensor)))
        return args, {**kwargs, "task_ids": torch.zeros(rows, dtype=torch.long)}

    if "task_ids" in lab.method.reads:
        theirs.register_forward_pre_hook(tell, with_kwargs=True)
    return theirs


def _output(lab: Lab, theirs: nn.Module) -> Tensor:
    """PEFT's outputs; it leaves those of a prompt's tokens in."""
    out: Tensor = _quietly(lab.output, theirs)
    rows = lab.output(lab.model()).shape
    return out[:, -rows[1] :] if out.ndim == 3 else out


def _quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT, with its warnings about adapters as errors and its advice left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in (".*missing.*key.*", ".*[Uu]nexpected.*", ".*does not match.*"):
            warnings.filterwarnings("error", message=words)
        return call(*args, **kwargs)


@torch.no_grad()
def _as_values(parameters: Iterable[Tensor]) -> None:
    """Put every gradient in the place of its parameter, so that saving writes gradients by the file's keys."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.copy_(parameter.grad)
