"""Several examples in one row, each attending to itself alone, and the models that can do that.

A packed row has no attention mask and positions that restart at 0; transformers builds the block-diagonal causal mask
from the restarts (`find_packed_sequence_indices` in transformers/masking_utils.py) where there is neither a mask nor a
cache, so a packed batch has to be run with `use_cache=False`.
"""

from __future__ import annotations

import bisect
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pegbox.core.errors import DataError, ModelError
from pegbox.data.encoded import IGNORE, Encoded, EncodedPair

if TYPE_CHECKING:
    from torch import Tensor, nn

R = TypeVar("R", "Packed", "PackedPairs")


@dataclass(frozen=True, slots=True)
class Packed:
    """Examples end to end: (T,) each, positions from 0 in each example, its first label -100.

    A model's labels are shifted by one, so the first label of an example would be predicted by the last token of the
    one before it.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    position_ids: Sequence[int]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """Preferences end to end, in one row of a model: of each pair the chosen answer, then the rejected."""

    pairs: tuple[EncodedPair, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(pair.id for pair in self.pairs)

    def __len__(self) -> int:
        return sum(map(_pair_size, self.pairs))


@dataclass(frozen=True)
class Packing(Generic[R]):
    """All examples of a data set in rows of at most `length` tokens."""

    rows: list[R]
    length: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens, 0 to 1."""
        return self.tokens / (len(self.rows) * self.length) if self.rows else 0.0

    def __str__(self) -> str:
        examples = sum(len(row.ids) for row in self.rows)
        return f"{examples} examples in {len(self.rows)} rows of {self.length} tokens, {self.efficiency:.1%} full"


def pack(rows: Sequence[Encoded], length: int, *, seed: int = 0) -> Packing[Packed]:
    """Pack by best fit, longest first; no example is split.

    Args:
        length: tokens of a packed row.
        seed: decides which of equally long examples meet, their order in a row, and the order of the rows; another
            seed an epoch keeps the batches of packed data as random as those of loose data.

    Raises:
        DataError: an example is longer than `length`.

    Source: best-fit decreasing, Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    longest = max(rows, key=len, default=None)
    if longest is not None and len(longest) > length:
        raise DataError(
            f"example {longest.id!r} has {len(longest)} tokens, more than a packed row's {length}; "
            f"encode with max_length={length} or less"
        )
    bins = _bins([len(row) for row in rows], length, seed)
    return Packing([_join([rows[i] for i in members]) for members in bins], length)


def pack_pairs(rows: Sequence[EncodedPair], length: int, *, seed: int = 0) -> Packing[PackedPairs]:
    """Pack preferences; both answers of a pair share a row.  Arguments as of `pack`.

    Raises:
        DataError: the two answers of a pair, each with its prompt, are longer than `length` together.
    """
    longest = max(rows, key=_pair_size, default=None)
    if longest is not None and _pair_size(longest) > length:
        raise DataError(
            f"pair {longest.id!r} has {_pair_size(longest)} tokens in its two answers, more than a packed row's "
            f"{length}; encode with max_length={length // 2} or less"
        )
    bins = _bins([_pair_size(row) for row in rows], length, seed)
    return Packing([PackedPairs(tuple(rows[i] for i in members)) for members in bins], length)


def _pair_size(pair: EncodedPair) -> int:
    return len(pair.chosen) + len(pair.rejected)


def _bins(sizes: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """Numbers of the items that share a row, in random order."""
    draw = random.Random(seed)
    order = draw.sample(range(len(sizes)), len(sizes))
    order.sort(key=lambda i: -sizes[i])
    bins = _best_fit([(i, sizes[i]) for i in order], length)
    draw.shuffle(bins)
    for members in bins:
        draw.shuffle(members)
    return bins


def _best_fit(items: Sequence[tuple[int, int]], length: int) -> list[list[int]]:
    """Each (item, size) into the fullest bin that still has room."""
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # its keys, sorted
    for item, size in items:
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, chosen = length, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[chosen].append(item)
        left = room - size
        if left and left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        if left:
            with_room[left].append(chosen)
    return bins


def _join(rows: Sequence[Encoded]) -> Packed:
    ids, labels, positions = array("i"), array("i"), array("i")
    count = array("i", range(max(map(len, rows))))
    for row in rows:
        ids.extend(row.input_ids)
        labels.append(IGNORE)
        labels.extend(row.labels[1:])
        positions.extend(count[: len(row)])
    return Packed(ids, labels, positions, tuple(row.id for row in rows))


# -- can a model do it ---------------------------------------------------------------------------------------------


def require_packing(model: nn.Module) -> None:
    """Refuse a model that gives an example of a packed row anything but what it gets alone, found by running both.

    Args:
        model: a language model on any device, in any dtype; its mode and parameters stay as they are.

    Raises:
        ModelError: with the reason and the way out.
    """
    fault = _fault(model)
    if fault is not None:
        raise ModelError(
            f"{type(model).__name__} cannot be trained on packed rows: {fault}; turn packing off (examples are then "
            "padded and grouped by length), or load the model with attn_implementation='sdpa' or 'eager'"
        )


def _fault(model: nn.Module) -> str | None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _probe(model)
    except (TypeError, ValueError, AttributeError) as error:
        return f"its forward does not run on input_ids and position_ids alone ({error})"
    finally:
        for module, training in modes:
            module.training = training


def _probe(model: nn.Module) -> str | None:
    """Run two examples packed, the second alone, and with another first; compare what the second gets."""
    import torch

    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(size, (n,), generator=generator) for n in (7, 7, 9))
    restarted = torch.cat([torch.arange(7), torch.arange(9)])
    alone = _run(model, second, torch.arange(9))
    packed = _run(model, torch.cat([first, second]), restarted)[7:]
    beside = _run(model, torch.cat([other, second]), restarted)[7:]
    # what a causal model that does not separate them would show
    mixed = [_run(model, torch.cat([one, second]), torch.arange(16))[7:] for one in (first, other)]
    if _gap(packed, beside) > 0.1 * _gap(*mixed):
        return "an example sees the tokens of the one before it"
    if not _gap(packed, alone) <= _rounding(alone):
        return "positions do not restart with each example"
    return None


def _run(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """(T,) ids and positions -> (T, V) logits."""
    import torch

    device = next(model.parameters()).device
    batch: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    with torch.no_grad():
        out = model(**batch, use_cache=False)
    logits: Tensor = out[0][0]
    return logits


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _rounding(logits: Tensor) -> float:
    """Largest difference that rounding explains: a few units in the last place of the largest logit."""
    import torch

    return max(1e-4, 8 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
