"""HF PEFT's names and shapes of a method's tensors at convolutions and embeddings, where they are others."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pegbox.core.method import PeftLayout
from pegbox.core.parts import Part
from pegbox.core.site import Site


def layout_at(layout: PeftLayout, site: Site | None) -> PeftLayout | None:
    """The layout at one site; None where PEFT does not have the method there."""
    if isinstance(site, Part):
        return None
    module = site.module if site is not None else None
    if isinstance(module, nn.Embedding):
        return replace(layout, tensors=layout.embedding) if layout.embedding else None
    if isinstance(module, _ConvNd):
        plain = module.groups == 1 and set(module.dilation) == {1}  # PEFT's thin convolution knows neither
        return layout if layout.convolution and plain else None
    return layout


def shaped(value: Tensor, leaf: str, layout: PeftLayout, site: Site | None) -> Tensor:
    """A tensor as PEFT keeps it at a site."""
    module = site.module if site is not None else None
    if not isinstance(module, _ConvNd) or leaf not in layout.convolution:
        return value
    ones = [1] * len(module.kernel_size)
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (-1, module.in_channels // module.groups, *module.kernel_size),
        "point": (*value.shape, *ones),
        "channel": (1, -1, *ones),
    }
    return value.reshape(shapes[layout.convolution[leaf]])


def unshaped(value: Tensor, leaf: str, layout: PeftLayout, site: Site | None) -> Tensor:
    """Undo `shaped`."""
    if site is None or not isinstance(site.module, _ConvNd) or leaf not in layout.convolution:
        return value
    return value.reshape(-1) if layout.convolution[leaf] == "channel" else value.flatten(1)
