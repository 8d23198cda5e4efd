"""Streams: several versions of the hidden states in one call of a block, one for each task.

    block([x; x; ...; x]) = [y; y_1; ...; y_T]        the shared stream first, then one for each task; rows: (1 + T) B

The block's rows are repeated, so that its residual sums, norms and activations run for all streams in one call.  Its
attention runs for the shared stream alone; the attention's last projection gives an output for each stream.  A linear
layer where the streams part has a graft that asks the `Flow` for its inputs and hands back its outputs.  The next block
goes on from y.  What follows the last block of a stage (`downsample`) is applied to every stream, and what comes out is
noted, for heads to read (`features`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import CannotMix, MethodError, SettingsError, TargetError
from pegbox.core.graft import Graft
from pegbox.core.layout import is_linear
from pegbox.core.method import Anatomy
from pegbox.core.site import Base, Site
from pegbox.core.taps import holder

if TYPE_CHECKING:
    from pegbox.core.tuned import Tuned

Size = tuple[int, int]  # height and width in tokens


def stages(anatomy: Anatomy) -> dict[str, list[str]]:
    """Blocks in depth order, by the path of the module that holds them."""
    held: dict[str, list[str]] = {}
    for block in anatomy.blocks:
        held.setdefault(holder(block), []).append(block)
    return held


def inside(path: str, root: str) -> bool:
    """Whether `path` is `root`, or lies in it."""
    return path == root or path.startswith((f"{root}.", f"{root}["))


def of_stage(site: Site, value: int | tuple[int, ...]) -> int:
    """A number for all, or that of a site's stage; 0 outside the stages, where they are listed.

    Raises:
        SettingsError: more or fewer are listed than the model has.
    """
    if isinstance(value, int):
        return value
    held = stages(site.context.anatomy)
    if len(held) != len(value):
        raise SettingsError(f"{value} lists {len(value)} stages, and this model has {len(held)}: {', '.join(held)}")
    listed = zip(held.items(), value, strict=True)
    return next((n for (stage, bs), n in listed if any(inside(site.path, b) for b in [*bs, stage] if b)), 0)


class Flow:
    """The streams in one block.  Begun where its attention begins, which runs again where the block is checkpointed.

    Attributes:
        width: how many streams there are.
        apart: whether they differ already.
        attending: the shared stream alone is in the attention.
        out: what the attention's last projection has given: the shared output, and one for each task.
    """

    def __init__(self, tasks: int) -> None:
        self.width = 1 + tasks
        self.apart = self.attending = False
        self.out: tuple[Tensor, list[Tensor]] | None = None

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Inside, the attention runs."""
        self.apart, self.attending = False, True
        try:
            yield
        finally:
            self.attending, self.out = False, None

    def parted(self, x: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """The shared stream's input, and those of the tasks; None while they are still the shared one."""
        if self.attending:
            return x, None
        shared, *own = x.chunk(self.width)
        return shared, own if self.apart else None

    def joined(self, shared: Tensor, own: list[Tensor]) -> Tensor:
        """What a linear layer gives back that has an output for each stream."""
        self.apart = True
        if self.attending:
            self.out = shared, own
            return shared
        return torch.cat([shared, *own])


@dataclass(frozen=True)
class Found:
    """Task streams (B, L, C) at the end of a stage, and (h, w) of the last block's tokens where it was told."""

    streams: list[Tensor]
    size: Size | None


class Streams(nn.Module):
    """What the grafts of one adapter share.

    Args:
        anatomy: of the base.
        tasks: names of the streams beside the shared one.
        everywhere: in all blocks, not only in the last of each stage.

    Raises:
        SettingsError: names that are no names, or not distinct.
        TargetError: a model whose blocks are unknown, or with another number of attentions in one than one.
    """

    def __init__(self, anatomy: Anatomy, tasks: tuple[str, ...], everywhere: bool) -> None:
        super().__init__()
        if len(set(tasks)) < len(tasks) or not all(task.isidentifier() for task in tasks):
            raise SettingsError(f"tasks must be distinct names of letters, digits and _, got {tasks!r}")
        self.tasks, self.stages, roles = tasks, stages(anatomy), anatomy.roles()
        if not self.stages:
            raise TargetError("streams of tasks run through blocks, and this model's anatomy has no module that is one")
        listed = self.stages.items()
        self.blocks = {block: stage for stage, all_ in listed for block in (all_ if everywhere else all_[-1:])}
        self.attentions = {self._attention(block, roles): block for block in self.blocks}
        self.outs = frozenset(roles.get("attn.out", ()))
        merging = [path for path in roles.get("downsample", ()) if path.rpartition(".")[0] in self.stages]
        self.downsamples = {path: path.rpartition(".")[0] for path in merging}
        within = [[name for name, m in anatomy.model.get_submodule(p).named_modules() if is_linear(m)] for p in merging]
        self.reductions = [f"{p}.{n}" if n else p for p, ns in zip(merging, within, strict=True) for n in ns]
        self.flows = {block: Flow(len(tasks)) for block in self.blocks}
        self.found: dict[str, Found] = {}  # by stage, of the last forward

    def _attention(self, block: str, roles: Mapping[str, list[str]]) -> str:
        cross = [path for path in roles.get("cross", ()) if inside(path, block)]
        attentions = [path for path in roles.get("attn", ()) if inside(path, block)]
        if len(attentions) != 1 or cross:
            found = ", ".join([*attentions, *cross]) or "none"
            raise TargetError(
                f"streams of tasks need blocks with one attn in each, self-attention; {block} has {found}"
            )
        return attentions[0]

    @property
    def paths(self) -> list[str]:
        """The modules that need a graft of their own for streams to run."""
        return [*self.blocks, *self.attentions, *self.downsamples]

    def flow_at(self, path: str) -> Flow | None:
        """The streams that part at a linear layer: in a block, where the attention ends or after it; None elsewhere."""
        block = next((block for block in self.blocks if inside(path, block)), None)
        attending = any(inside(path, attention) for attention in self.attentions) and path not in self.outs
        return None if block is None or attending else self.flows[block]

    def parting(self, paths: list[str]) -> list[str]:
        """The same paths.

        Raises:
            TargetError: there is a block where the streams part at none of them.
        """
        apart = [path for path in paths if self.flow_at(path)]
        if dry := [block for block in self.blocks if not any(inside(path, block) for path in apart)]:
            raise TargetError(f"targets name nothing in {dry[0]} where tasks can part: attn.out, mlp.up, mlp.down")
        return paths

    def graft(self, path: str) -> Graft:
        """The graft of one of `paths`."""
        if path in self.blocks:
            return BlockGraft(self, self.blocks[path], self.flows[path])
        if path in self.attentions:
            return AttentionGraft(self.flows[self.attentions[path]])
        return DownsampleGraft(self, self.downsamples[path])

    def taken(self) -> dict[str, list[Tensor]]:
        """By task, the features of each stage of the last forward; handed out once.

        Raises:
            MethodError: there was none with this adapter, or reentrant checkpointing has cut it off its gradients.
        """
        found, self.found = [self.found[stage] for stage in self.stages if stage in self.found], {}
        if not found:
            raise MethodError("no forward with the adapter of tasks has run since its features were last taken")
        if torch.is_grad_enabled() and self.training and not found[-1].streams[0].requires_grad:
            raise MethodError(
                "the features of tasks have no gradient: run the model with gradients, and where it checkpoints with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return {task: [_as_map(f.streams[k], f.size) for f in found] for k, task in enumerate(self.tasks)}


class BlockGraft(Graft):
    """Around a block: streams in, the shared one out."""

    sums = False

    def __init__(self, streams: Streams, stage: str, flow: Flow) -> None:
        super().__init__()
        self.owner, self.stage, self.flow = (streams,), stage, flow  # shared, so not registered here

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(graft, BlockGraft) for graft in base.grafts):
            raise CannotMix(f"two adapters part streams of tasks at {base.site.path}; use one of them")
        args, kwargs = _with_states(lambda x: torch.cat([x] * self.flow.width), args, kwargs)
        whole, rest = _parts(base(*args, **kwargs))
        shared, *own = whole.chunk(self.flow.width)
        self.owner[0].found[self.stage] = Found(own, _size((*args, *kwargs.values())))
        return shared if rest is None else (shared, *rest)


class AttentionGraft(Graft):
    """Around the attention of such a block, which sees the shared stream alone."""

    sums = False

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        flow = self.flow
        args, kwargs = _with_states(lambda x: x.chunk(flow.width)[0], args, kwargs)
        with flow.begun():
            shared, rest = _parts(base(*args, **kwargs))
            given, own = flow.out or (shared, [shared] * (flow.width - 1))
        if given is not shared and not _same(given, shared):
            raise MethodError(
                f"{base.site.path} ({type(base.site.module).__name__}) does more with the output of its last "
                "projection than to return it, or another adapter does, so that tasks have no streams after it"
            )
        whole = torch.cat([shared, *own])
        return whole if rest is None else (whole, *rest)


class DownsampleGraft(Graft):
    """Around what ends a stage, which every stream passes."""

    sums = False

    def __init__(self, streams: Streams, stage: str) -> None:
        super().__init__()
        self.owner, self.stage = (streams,), stage

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        (streams,) = self.owner
        found = streams.found[self.stage]
        args, kwargs = _with_states(lambda x: torch.cat([x, *found.streams]), args, kwargs)
        whole, rest = _parts(base(*args, **kwargs))
        shared, *own = whole.chunk(1 + len(found.streams))
        streams.found[self.stage] = Found(own, found.size)
        return shared if rest is None else (shared, *rest)


def features(tuned: Tuned, *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
    """By task, what its stream is at the end of each stage, downsampled: the input of a dense head.

        features(tuned, pixel_values)                   runs the model
        out = tuned(pixel_values); features(tuned)      of the forward that has run

    Returns:
        (B, C, h, w) of each stage where blocks are told the size of their grid, as Swin's are; else (B, L, C).

    Raises:
        MethodError: no adapter in use has tasks; or see `Streams.taken`.
    """
    shared = [tuned.adapter(name).shared for name in tuned.active]
    streams = next((module for module in shared if isinstance(module, Streams)), None)
    if streams is None:
        raise MethodError("no adapter in use has tasks; give the method their names, tasks=('semseg', 'depth')")
    if args or kwargs:
        streams.found = {}
        tuned(*args, **kwargs)
    return streams.taken()


def _with_states(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of a block or of a part of it, with other hidden states."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _parts(out: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The hidden states of an output, and what else is in it; None where it is one tensor."""
    return (out, None) if isinstance(out, Tensor) else (out[0], tuple(out[1:]))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one memory in one shape."""
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


def _size(values: tuple[Any, ...]) -> Size | None:
    """The pair of whole numbers among the arguments of a block, its grid."""
    pairs = (v for v in values if isinstance(v, tuple) and len(v) == 2 and all(isinstance(n, int) for n in v))
    return next(pairs, None)


def _as_map(x: Tensor, size: Size | None) -> Tensor:
    """(B, L, C) -> (B, C, h, w), of the grid or of half of it, rounded up; as it is where none is known."""
    if size is None:
        return x
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    h, w = next(s for s in (size, half) if s[0] * s[1] == x.shape[1])
    return x.transpose(1, 2).unflatten(2, (h, w))
