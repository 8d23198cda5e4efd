"""LST: Ladder Side-Tuning (Sung et al., 2022), arXiv:2206.06522.

    s_0 = D_0 h_0                                      h_0: the trunk's input, h_l: what its block l gives, d wide
    s_l = block_l(m_l s_{l-1} + (1 - m_l) D_l h_l)     D: (n, d), n = d / r        m_l = sigmoid(g_l / 0.1)
    z' = z + U norm(s_L)                               U: (d, n)                   z: the trunk's output

The trunk runs without autograd.  A block is a transformer block of width n: self-attention, cross-attention to the
side of the encoder in a decoder, and an MLP.

The authors' side blocks are of the trunk's own class, and start as pruned copies of its blocks; here one plain block
serves every architecture, without positions of its own (the hidden states know them), and starts random.  Their head
reads U norm(s_L) alone, and a trained gate m with it, m U norm(s_L) + (1 - m) z, is an option of their code; here it is
added, with U = 0 at the start, so that tuning starts from the base; `identity=False` draws U as they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Graft, Method, Site, Traits, setting
from pegbox.core.errors import SettingsError
from pegbox.core.method import split_names
from pegbox.core.taps import SideGraft, Tape, Taps, Trunk, holder, tap_graft, tap_sites

MLP = 4  # the inner width of a side block's MLP in units of n, as in T5 and BERT


class Attention(nn.Module):
    """softmax(q k^T / sqrt(n / heads)) v, without biases, as in T5."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:  # (B, T, n) -> (B, heads, T, n / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(x.dtype)
        y = F.scaled_dot_product_attention(self.split(self.q(x)), k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class SideBlock(nn.Module):
    def __init__(self, width: int, heads: int, crosses: bool) -> None:
        super().__init__()
        self.attn, self.attn_norm = Attention(width, heads), nn.LayerNorm(width)
        self.cross, self.cross_norm = None, None
        if crosses:
            self.cross, self.cross_norm = Attention(width, heads), nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, MLP * width), nn.GELU(), nn.Linear(MLP * width, width))

    def forward(self, s: Tensor, tape: Tape, at: int, causal: bool) -> Tensor:  # (B, T, n) -> (B, T, n)
        x = self.attn_norm(s)
        k, v = tape.remembered(at, self.attn.split(self.attn.k(x)), self.attn.split(self.attn.v(x)))
        s = s + self.attn.attend(x, k, v, tape.mask, causal and tape.mask is None and x.shape[1] > 1)
        if self.cross is not None and self.cross_norm is not None:
            k, v = (self.cross.split(part(tape.encoded)) for part in (self.cross.k, self.cross.v))
            s = s + self.cross.attend(self.cross_norm(s), k, v, tape.cross_mask, False)
        return s + self.mlp(self.mlp_norm(s))


class LadderGraft(SideGraft):
    def __init__(self, taps: Taps, trunk: Trunk, method: Ladder) -> None:
        super().__init__(taps, trunk)
        n, read = method.narrow(trunk), sum(block in taps.read for block in trunk.blocks)
        crosses = trunk.crosses and any(other.encoder for other in taps.trunks.values())
        self.down = nn.ModuleList(nn.Linear(trunk.width, n) for _ in range(read + 1))
        self.gate = nn.Parameter(torch.zeros(read))
        self.block = nn.ModuleList(SideBlock(n, method.heads, crosses) for _ in range(read))
        self.norm = nn.LayerNorm(n)
        self.last = None if trunk.encoder else nn.Linear(n, trunk.width)
        self.temperature = method.temperature
        if self.last is not None and method.identity:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def side(self, tape: Tape) -> Tensor:
        first, *downs = self.down
        s: Tensor = first(tape.start)
        gates = (self.gate / self.temperature).sigmoid()
        for at, (h, down, block) in enumerate(zip(tape.outputs, downs, self.block, strict=True)):
            s = block(gates[at] * s + (1 - gates[at]) * down(h), tape, at, self.trunk.causal)
        return self.norm(s)

    def up(self, states: Tensor) -> Tensor:
        assert self.last is not None
        return self.last(states)


@dataclass(frozen=True, kw_only=True)
class Ladder(Method):
    targets: str | tuple[str, ...] = setting("block", "the blocks to read")
    reduction: int = setting(8, "the side network is this many times narrower than the trunk", at_least=1)
    heads: int = setting(4, "attention heads of a side block", at_least=1)
    temperature: float = setting(0.1, "a gate is the sigmoid of its parameter divided by this", above=0)
    identity: bool = setting(True, "start with U = 0; otherwise with U drawn, as the authors do")

    traits: ClassVar[Traits] = Traits(seams=("taps",), merge="no", needs=("hidden states",))
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def read(self, anatomy: Anatomy) -> list[str]:
        """Paths of the blocks to read."""
        names, left_out = split_names(self.targets), split_names(self.exclude)
        return anatomy.resolve(names, exclude=left_out, layers=self.layers, kinds=self.kinds, who=self.name())

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return tap_sites(model, anatomy, self.read(anatomy))

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Taps:
        return Taps(model, anatomy, self.read(anatomy))

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Taps)
        return tap_graft(site, shared, lambda trunk: LadderGraft(shared, trunk, self))

    def narrow(self, trunk: Trunk) -> int:
        """n, the side network's width."""
        n = trunk.width // self.reduction
        if n == 0 or n % self.heads:
            nearest = max((h for h in range(1, max(n, 1) + 1) if n % h == 0 and h <= self.heads), default=1)
            raise SettingsError(
                f"ladder: width {trunk.width} / reduction {self.reduction} = {n} at {trunk.path or 'the model'} is not "
                f"a multiple of heads={self.heads}; nearest: heads={nearest}"
            )
        return n

    def size(self, site: Site) -> int:
        stacks = [holder(block) for block in self.read(site.context.anatomy)]
        if site.path not in stacks:
            return 0
        trunk = Trunk.at(site.path, site.module, site.context.anatomy)
        d, n, layers = trunk.width, self.narrow(trunk), stacks.count(site.path)
        attentions = 2 if trunk.crosses and len(set(stacks)) > 1 else 1
        block = attentions * (4 * n * n + 2 * n) + 2 * n + 2 * MLP * n * n + (MLP + 1) * n
        last = 0 if trunk.encoder else n * d + d
        return (layers + 1) * (d * n + n) + layers * (1 + block) + 2 * n + last
