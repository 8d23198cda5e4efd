"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition (Chen et al., 2022), arXiv:2205.13535.

    y = MLP(x) + s (U ReLU(D x + d) + u)        D: (n, in)   U: (out, n), U = 0 at the start   n = 64, s = 0.1

Beside the whole MLP of every block; x is what the MLP reads, the normalised hidden state, as in the paper's equation.
The authors' code gives the branch the hidden state before its norm, and drops a tenth of the bottleneck (the preset
`official` has the dropout).  D is drawn uniform and biases start at zero, as there.

Where a model has no one module that is its MLP (BERT), the branch leads from its first projection to its last.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Graft, Preset, Site, Traits, setting
from pegbox.core.bottleneck import BottleneckGraft, BottleneckMethod, drawn_or_not
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.layout import is_linear
from pegbox.core.method import block_of, split_names
from pegbox.core.parts import matrix_shape

MLP, FIRST, LAST = "mlp", "mlp.up", "mlp.down"
MLPS = (MLP, (MLP,))  # targets that name them all


class Read(nn.Module):
    """What the first projections have read, by block, until the last ones take it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_block: dict[str, Tensor] = {}


class AdaptFormerGraft(BottleneckGraft):
    """Around a whole MLP."""

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = base(x, *args, **kwargs)
        if isinstance(y, tuple):  # with the logits of a router
            return (y[0] + self.branch(x), *y[1:])
        return y + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.widen(self.drop(F.relu(self.narrow(x))))


class ReadGraft(Graft):
    """Around a first projection; trains nothing."""

    def __init__(self, read: Read, block: str) -> None:
        super().__init__()
        self.owner, self.block = (read,), block  # shared, so not registered here

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.owner[0].by_block[self.block] = x
        y: Tensor = base(x)
        return y


class AddGraft(AdaptFormerGraft):
    """Around a last projection."""

    def __init__(self, in_: int, out: int, method: AdaptFormer, read: Read, block: str) -> None:
        super().__init__(in_, out, method)
        self.owner, self.block = (read,), block

    def forward(self, base: Base, z: Tensor) -> Tensor:
        y: Tensor = base(z)
        return y + self.branch(self.owner[0].by_block.pop(self.block))


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(BottleneckMethod):
    targets: str | tuple[str, ...] = setting(MLP, "the modules beside which it stands; any with a linear layer in it")
    scale: float = setting(0.1, "multiplies what is added")
    bias: bool = setting(True, "give both projections a bias")
    dropout: float = setting(0.0, "share of the bottleneck dropped while training", at_least=0, below=1)

    traits: ClassVar[Traits] = drawn_or_not(Traits(seams=("output",), merge="no"))
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    presets: ClassVar[dict[str, Preset]] = {
        "official": Preset(
            "Chen et al., 2022, arXiv:2205.13535, code: custom_modules.py and main_image.py", {"dropout": 0.1}
        ),
    }

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        try:
            return super().sites(model, anatomy)
        except TargetError:
            if self.targets not in MLPS or not anatomy.blocks:
                raise
            return self._ends(anatomy)

    def _ends(self, anatomy: Anatomy) -> list[str]:
        """First and last projections of the MLPs, of a model whose MLP is no module."""
        kinds = (nn.Linear,)
        find = functools.partial(anatomy.resolve, exclude=split_names(self.exclude), layers=self.layers, kinds=kinds)
        return [*find(FIRST, who=self.name()), *find(LAST, who=self.name())]

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Read:
        return Read()

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Read)
        role = self._role(site)
        if role is None:
            return AdaptFormerGraft(*_widths(site), self)
        block = block_of(site.path, site.context.anatomy)
        if role == FIRST:
            return ReadGraft(shared, block)
        width = site.shape[0]  # the sub-layer's, on both ends
        return AddGraft(width, width, self, shared, block)

    def _role(self, site: Site) -> str | None:
        """Which end of an MLP a site is; None for a module that stands for itself."""
        if self.targets not in MLPS or not is_linear(site.module):
            return None
        return FIRST if site.path in site.context.anatomy.role(FIRST) else LAST

    def size(self, site: Site) -> int:
        role = self._role(site)
        if role is None:
            return self.numbers(*_widths(site))
        return 0 if role == FIRST else self.numbers(site.shape[0], site.shape[0])


def _widths(site: Site) -> tuple[int, int]:
    """(in, out) of a linear layer; of another module the width that its first one reads, on both ends."""
    if is_linear(site.module):
        out, in_ = site.shape
        return in_, out
    first = next((m for m in site.module.modules() if is_linear(m)), None)
    if first is None:
        raise SettingsError(f"adaptformer stands beside modules with linear layers, and {site.path} has none")
    _, width = matrix_shape(first, "weight")
    return width, width
