"""Each tuned module by itself: on the inputs it had in the tuned model, does the merged one give the same outputs?

A wrong weight in one of many modules can be lost in the outputs of the whole, and above all under the rounding of half
precision.  In the module's own outputs it is plain, and it has a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pegbox.core.site import first_tensor
from pegbox.core.tuned import Tuned
from pegbox.evaluate.in_float32 import in_float32
from pegbox.evaluate.probes import Probe
from pegbox.evaluate.report import worst

CALLS = 6  # recorded of each module


@dataclass(frozen=True)
class Call:
    """A call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


@torch.no_grad()
def record(tuned: Tuned, probes: Sequence[Probe]) -> dict[str, list[Call]]:
    """Some calls of every module with a graft in use, by path; of those that no probe reaches, none."""
    modules = {site.module_path: site.module for site in tuned.sites.values() if site.chain and site.module_path}
    calls: dict[str, list[Call]] = {path: [] for path in modules}
    hooks = [_remember(module, calls[path]) for path, module in modules.items()]
    device = next((p.device for p in tuned.parameters()), torch.device("cpu"))
    try:
        with in_float32(tuned):
            for probe in probes:
                if all(len(some) >= CALLS for some in calls.values()):
                    break
                tuned(**probe.on(device))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _remember(module: nn.Module, calls: list[Call]) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = first_tensor(output if isinstance(output, tuple) else (output,))
        if first is not None and len(calls) < CALLS:
            calls.append(Call(args, kwargs, first.clone()))

    return module.register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def differences(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """Largest difference of each module's outputs from those recorded, relative to the largest of them."""
    with in_float32(model):
        return {path: _difference(model.get_submodule(path), some) for path, some in calls.items() if some}


def _difference(module: nn.Module, calls: Sequence[Call]) -> float:
    gap = scale = 0.0
    for call in calls:
        out = module(*call.args, **call.kwargs)
        value = first_tensor(out if isinstance(out, tuple) else (out,))
        assert value is not None
        gap = worst((gap, (value - call.output).abs().max().item()))
        scale = worst((scale, call.output.abs().max().item()))
    return gap / scale if scale else gap
