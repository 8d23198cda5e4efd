"""A tuner layer of PEFT's as a graft."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pegbox.core import Base, Graft
from pegbox.core.errors import CannotMerge
from pegbox.core.layout import is_conv1d
from pegbox.core.site import ModuleSite, first_tensor, widened
from pegbox.peft_bridge.harvest import ADAPTER, REFUSALS, Bank, quiet
from pegbox.peft_bridge.kinds import Facts
from pegbox.peft_bridge.stand_in import Beneath, Under, padded, pads_otherwise, row_scale, stand_in


class LayerGraft(Graft):
    """Runs a tuner layer around a site; the layer's base is what lies beneath the graft.

    A layer whose output is affine in its input, around a linear, is a map of the weight and the bias,
    W' = (g(I) - g(0))^T and b' = g(0), with the gradients of its forward.
    """

    any_layout = True  # PEFT's layers know their modules

    def __init__(self, site: ModuleSite, layer: nn.Module, bank: Bank, facts: Facts) -> None:
        super().__init__()
        self.layer = layer
        self.holds = bank.holds
        self.base = (stand_in(site),)  # not this graft's own
        layer.__dict__[bank.holds] = self.base[0]
        self.facts = facts
        names = [name for name, _ in site.module.named_parameters(recurse=False)]
        self.maps = tuple(names) if facts.merges and self._merges(site) else ()

    def _merges(self, site: ModuleSite) -> bool:
        """Whether it is a map of the weight: PEFT's low-rank layers mix the groups of a grouped convolution."""
        if not isinstance(site.module, _ConvNd) or site.module.groups == 1:
            return True
        try:
            self._by_peft("weight", site.read("weight"))
        except CannotMerge:
            return False
        return True

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self(base, *args, **kwargs) if self.facts.casts else super().run(base, *args, **kwargs)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if base.site.rounds_inputs:  # what the layer adds is to the product with the decoded matrix, as merging is
            base = base.with_values({"weight": base.read("weight")})
        if self.facts.of_tasks:
            kwargs["task_ids"] = self._tasks(base, args[0])
            if args[0].ndim == 2:  # its layers take rows of tokens alone
                return self._run(base, args[0][:, None], **kwargs)[:, 0]
        if pads_otherwise(base.site.module):
            args = (padded(base.site.module, args[0]), *args[1:])
        return self._run(base, *args, **kwargs)

    def _run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        like = first_tensor(args)
        with self._above(Under(base, None if like is None else like.dtype)):
            return self.layer(*args, **kwargs)

    def _tasks(self, base: Base, x: Tensor) -> Tensor:
        """(B,): those given, else 0 for all."""
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        tasks: Tensor = base.site.context.read("task_ids", none, like=none)
        return tasks

    @contextlib.contextmanager
    def _above(self, beneath: Beneath) -> Iterator[None]:
        below = self.base[0]
        before, below.beneath = below.beneath, beneath
        try:
            yield
        finally:
            below.beneath = before

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        site = self.base[0].site
        if isinstance(site.module, nn.Embedding):
            return self._rows(w)
        if not site.is_linear:
            return self._by_peft(parameter, w)
        with self._calm():
            if parameter == "bias":
                matrix = widened(site.read("weight"))
                return self._on(_Linear(site, matrix, w), w.new_zeros(1, 1, matrix.shape[1]))[0, 0]
            probes = torch.cat([torch.eye(w.shape[1]), torch.zeros(1, w.shape[1])]).to(w)
            y = self._on(_Linear(site, w, None), probes[None])[0]  # (in + 1, out)
            return (y[:-1] - y[-1]).T

    def _on(self, beneath: Beneath, x: Tensor) -> Tensor:
        with self._above(beneath):
            y: Tensor = self.layer(x)
        return y

    def _rows(self, w: Tensor) -> Tensor:
        """Of an embedding: what the layer gives for every id."""
        site = self.base[0].site
        across = site.read("weight").shape != site.module.weight.shape  # whether it is read (dim, num)
        table, scale = (w.T if across else w), row_scale(site)
        if scale is None:
            name = type(site.module).__name__
            raise CannotMerge(f"{site.path} is a {name}, whose outputs are no multiple of its table's rows")
        with self._calm():
            rows = self._on(_Table(table, scale), torch.arange(len(table), device=table.device)[None])[0]
        return (rows.T if across else rows) / scale

    def _by_peft(self, parameter: str, w: Tensor) -> Tensor:
        """By the layer's own merging, into a copy of the module."""
        site, layer = self.base[0].site, copy.deepcopy(self.layer, {id(self.base[0]): None})
        module = copy.copy(site.module)
        module.__dict__ = {k: v for k, v in site.module.__dict__.items() if k != "forward"}
        values = {name: p.detach().clone() for name, p in site.module._parameters.items() if p is not None}
        values[parameter] = site.stored(parameter, w).detach().clone()
        kept = dict.fromkeys(site.module._parameters)
        module._parameters = kept | {name: nn.Parameter(v, requires_grad=False) for name, v in values.items()}
        layer.__dict__.pop(self.holds)
        layer._modules[self.holds] = module
        try:
            with quiet():
                layer.merge(adapter_names=[ADAPTER])  # type: ignore[operator]
        except REFUSALS as error:
            raise CannotMerge(f"{site.path}: HF PEFT refuses to merge: {error}") from error
        merged: Tensor = getattr(layer._modules[self.holds], parameter)
        return site.layout(parameter).read(merged.detach())

    @contextlib.contextmanager
    def _calm(self) -> Iterator[None]:
        """Without dropout."""
        was = self.layer.training
        if not was:
            yield
            return
        self.layer.eval()
        try:
            yield
        finally:
            self.layer.train()


class _Linear:
    """W x + b in the place of a linear site, with these parameters: W (out, in), b (out,) or none."""

    def __init__(self, site: ModuleSite, weight: Tensor, bias: Tensor | None) -> None:
        self.turned, self.weight, self.bias = is_conv1d(site.module), weight, bias

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def kept(self, parameter: str) -> Tensor:
        if parameter == "weight":
            return self.weight.T if self.turned else self.weight
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias


class _Table:
    """Rows of a table (num, dim), times a scale."""

    def __init__(self, table: Tensor, scale: float) -> None:
        self.table, self.scale = table, scale

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale * F.embedding(ids, self.table)

    def kept(self, parameter: str) -> Tensor:
        return self.table
