"""MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning (Agiza, Neseem and Reda, 2024),
arXiv:2403.20320.

    y   = W x + s B A x'                                       A: (r, in)   B: (out, r), zero at the start
    y_t = W x + s_t B_t A_t x_t'   for every task t            A_t: (r_t, in)   B_t: (out, r_t), alike

    x' = dropout(x)        x_t' = x' where the streams still are one, then the task's own stream x_t

Every linear layer has A and B.  In the last block of each stage, attn.out and what follows it have factors of each task
too: there a task gets a stream of its own through residual sums, norms and activations; attention is shared.  The end
of a stage downsamples every stream.  The next stage goes on from y alone, as does what the model returns; the streams
at the ends of stages are `features(tuned, pixel_values)`, for heads such as those of core/dense_heads.py.

`mode=matrixv2` adds s B A x' to y_t too.  In `addition`, y = W x + LayerNorm(sum_t y_t) at layers with tasks, not the
base's at the start.  With tasks, norms, patch embedding, tables of positions and linear layers of `downsample` train
whole, as differences from the base's; MTLoRA+ has A and B in the latter.  Without tasks this is LoRA, and merges.  The
authors' code may have task factors in all blocks, of which only `addition` reads all, so `intermediate` is refused
elsewhere.  It keeps q, k and v in one matrix, with one A, and may train s and s_t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Down, Graft, LowRankGraft, Method, Preset, Site, Traits, by_settings, setting
from pegbox.core.difference import DifferenceGraft, norms, patches_and_positions
from pegbox.core.errors import SettingsError
from pegbox.core.graft import low_rank_pair
from pegbox.core.layout import is_linear
from pegbox.core.low_rank import low_rank_product
from pegbox.core.streams import Flow, Streams, features, of_stage

__all__ = ["MTLoRA", "features"]


class Update(LowRankGraft):
    """W + s B A."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = low_rank_pair(site, rank)
        self.scale, self.dropout = scale, dropout

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.a, self.b, self.scale


class SplitGraft(Graft):
    """Where the streams part, and after it."""

    sums = False

    def __init__(self, site: Site, method: MTLoRA, flow: Flow) -> None:
        super().__init__()
        if site.path != site.module_path or not is_linear(site.module):
            raise SettingsError(f"mtlora's tasks have factors at linear layers, and {site.path} is none; exclude it")
        self.flow, self.mode, self.dropout = flow, method.mode, method.dropout
        rank, task_rank = of_stage(site, method.rank), of_stage(site, method.task_rank)
        self.shared = Update(site, rank, method.scale) if method.mode != "addition" else None
        self.norm = nn.LayerNorm(site.shape[0]) if method.mode == "addition" else None
        self.tasks = nn.ModuleDict({task: Update(site, task_rank, method.task_scale) for task in method.tasks})

    def forward(self, base: Base, x: Tensor) -> Tensor:
        x, own = self.flow.parted(x)
        w, seen = base(x), F.dropout(x, self.dropout, self.training)
        updates: list[Update] = list(self.tasks.values())  # type: ignore[arg-type]
        pairs = zip(own or [seen] * len(updates), updates, strict=True)
        ys = [w + low_rank_product(x_t, *update.factors()) for x_t, update in pairs]
        if self.norm is not None:
            change = self.norm(torch.stack(ys).sum(0))
        elif self.shared is not None:
            change = low_rank_product(seen, *self.shared.factors())
        ys = [y + change for y in ys] if self.mode == "matrixv2" else ys
        return self.flow.joined(w + change, ys)


ONE = Traits(seams=("weight",), card="mtlora", to_lora=True)
MANY = replace(ONE, seams=("weight", "output"), merge="no", to_lora=False, per_row=False, needs=("blocks",))
ADDS = replace(MANY, identity=False)
PASCAL = {"tasks": ("semseg", "normals", "sal", "human_parts"), "rank": 64, "dropout": 0.05}


@dataclass(frozen=True, kw_only=True)
class MTLoRA(Method):
    tasks: tuple[str, ...] = setting((), "names of the tasks that have streams; none is LoRA")
    rank: int | tuple[int, ...] = setting(16, "r, one for all or one for each stage in turn", at_least=1)
    task_rank: int | tuple[int, ...] = setting(4, "r_t of every task, in the same way", at_least=1)
    scale: float = setting(4.0, "s, a plain factor", above=0)
    task_scale: float = setting(4.0, "s_t of every task", above=0)
    dropout: float = setting(0.0, "share of an update's inputs dropped while training", at_least=0, below=1)
    mode: Literal["matrix", "matrixv2", "addition"] = setting("matrix", "how shared and tasks' updates meet")
    intermediate: bool = setting(False, "task factors in all blocks (mode=addition)")
    downsample: Literal["whole", "lora", "none"] = setting("whole", "with tasks, how its linear layers train")
    norms: bool = setting(True, "with tasks, train the norms")
    embeddings: bool = setting(True, "with tasks, train the patch embedding and modules of positions")

    traits: ClassVar[Traits] = by_settings(ONE, lambda m: (ADDS if m.mode == "addition" else MANY) if m.tasks else ONE)
    presets: ClassVar[dict[str, Preset]] = {
        "pascal": Preset("Agiza et al., 2024, arXiv:2403.20320, code: mtlora_tiny_448_r64_scale4_pertask", PASCAL),
        "pascal+": Preset("Agiza et al., 2024, arXiv:2403.20320: MTLoRA+", {**PASCAL, "downsample": "lora"}),
    }

    def read_aside(self) -> str | None:
        return "the streams of mtlora.tasks, by features(tuned, ...)" if self.tasks else None

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        linears, streams = super().sites(model, anatomy), self.shared(model, anatomy)
        if streams is None:
            return linears
        kept = streams.parting([path for path in linears if path not in streams.reductions])
        ends = streams.reductions if self.downsample == "lora" else []
        return list(dict.fromkeys([*streams.paths, *self.whole(anatomy, streams), *kept, *ends]))

    def whole(self, anatomy: Anatomy, streams: Streams) -> list[str]:
        """Paths of what trains whole."""
        ends = [*streams.reductions] if self.downsample == "whole" else []
        return ends + self.embeddings * patches_and_positions(anatomy) + self.norms * norms(anatomy)

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Streams | None:
        if self.intermediate and self.mode != "addition":
            raise SettingsError(f"mtlora.intermediate needs mode=addition: in {self.mode} nothing reads those factors")
        return Streams(anatomy, self.tasks, self.intermediate) if self.tasks else None

    def graft(self, site: Site, shared: nn.Module | None) -> Graft | None:
        if isinstance(shared, Streams):
            if site.path in shared.paths:
                return shared.graft(site.path)
            if site.path in self.whole(site.context.anatomy, shared):
                return DifferenceGraft(site)
            if flow := shared.flow_at(site.path):
                return SplitGraft(site, self, flow)
        rank = of_stage(site, self.rank)
        return Update(site, rank, self.scale, self.dropout) if rank else None

    def size(self, site: Site) -> int:
        anatomy = site.context.anatomy
        streams = self.shared(anatomy.model, anatomy)
        if streams is not None and site.path in streams.paths:
            return 0
        if streams is not None and site.path in self.whole(anatomy, streams):
            return sum(p.numel() for p in site.module.parameters(recurse=False))
        one, more = (of_stage(site, rank) * sum(site.shape) for rank in (self.rank, self.task_rank))
        if streams is None or not streams.flow_at(site.path):
            return one
        return len(self.tasks) * more + (one if self.mode != "addition" else 2 * site.shape[0])
