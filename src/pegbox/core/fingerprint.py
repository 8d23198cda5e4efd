"""Whether a base is the one that an adapter was trained on.

A hash, `fingerprint`, says yes or no.  It cannot where the base was kept in another way then than it is now, quantised
for training and plain for merging say, so an adapter file also holds a `BaseRecord`: how each matrix was kept, and a
few values of each.  A matrix is taken for the same

    kept plainly then and now             if its values are the same
    quantised in the same way             if nearly all of its values are
    quantised then, plain now             if nearly all are, once it is encoded as it was then: one matrix at a time
    plain then, quantised now, or in two ways   if its values are near: what quantising lost cannot be checked
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core import storage
from pegbox.core.errors import AdapterError
from pegbox.core.layout import is_conv1d
from pegbox.core.sharded import whole
from pegbox.core.storage import Drifts, Kept

SAMPLES = 256  # values hashed per tensor; evenly spread
FEW = 8  # values kept per tensor
# Encoding on another device, or by another version of a library, may move a value: the last bit of its scale, or a
# number half-way between two codes.  Of another base nearly every value differs.
OTHERS = 0.01  # share of the values of all encoded matrices that may be others (one may); of each matrix, half
NEAR = 0.5  # relative distance of the values of one matrix; four bits cost 0.1 to 0.2, an unrelated matrix 1.4


@torch.no_grad()
def fingerprint(model: nn.Module, *, without: Iterable[str] = ()) -> str:
    """Hash of parameter names, shapes and sampled values.

    Values are compared as bfloat16, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint.
    Quantised ones are compared decoded.

    Args:
        without: paths of modules to leave out: those an adapter replaces whole, a fresh classification head say.
    """
    digest = hashlib.sha256()
    for name, module, leaf in _parameters(model, without):
        digest.update(_print(name, whole(storage.mark(module, leaf))))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class BaseDrift:
    """How far a base is from the one that an adapter was trained on, where the two are one base kept in two ways.

    Attributes:
        then, now: how the matrices that differ were kept, and are.
        drifts: of those matrices, relative to what they were in training.
        proven: encoded as they were then, the matrices are the same; else they are only near those of training.
        hint: what would prove more.
    """

    then: str
    now: str
    drifts: Drifts
    proven: bool
    hint: str = ""

    def __str__(self) -> str:
        what = (
            f"it is the same base, whose {len(self.drifts.of)} matrices differ from those of training by {self.drifts}"
            if self.proven
            else f"its other tensors are the same; {len(self.drifts.of)} matrices can only be told to be near, as "
            f"{FEW} values of each differ by {self.drifts}{self.hint}"
        )
        return f"the adapter was trained on a base kept as {self.then}, and this one is kept as {self.now}: {what}"


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter file says of its base.

    Attributes:
        fingerprint: as the function of this name gives it.
        names: hash of parameter names and shapes, matrices of linear layers as (out, in).
        plain: as `fingerprint`, of what is kept as plain numbers.
        kept: the ways in which matrices are kept quantised.
        how: of each parameter in the model's order, its place in `kept`; -1 for plain numbers.
        values: (parameters, FEW) bfloat16, evenly spread over each.
    """

    fingerprint: str
    names: str
    plain: str
    kept: tuple[Kept, ...]
    how: tuple[int, ...]
    values: Tensor = field(repr=False)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, *, without: Iterable[str] = ()) -> BaseRecord:
        """Args: without: as of `fingerprint`."""
        everything, plain = hashlib.sha256(), hashlib.sha256()
        kept: list[Kept | None] = []
        values, rest = [], storage.rest_dtype(model)
        for name, module, leaf in _parameters(model, without):
            mark = whole(storage.mark(module, leaf).detach())
            kept.append(_kept(module, leaf, rest))
            values.append(_few(_matrix(module, leaf, mark)))
            everything.update(printed := _print(name, mark))
            if kept[-1] is None:
                plain.update(printed)
        ways = tuple(dict.fromkeys(k for k in kept if k is not None))
        how = tuple(-1 if k is None else ways.index(k) for k in kept)
        few = torch.stack(values) if values else torch.empty(0, FEW, dtype=torch.bfloat16)
        return cls(everything.hexdigest()[:16], _names(model, without), plain.hexdigest()[:16], ways, how, few)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the header of a file, which has the fingerprint already."""
        return {
            "names": self.names,
            "plain": self.plain,
            "kept": [asdict(kept) for kept in self.kept],
            "how": list(self.how),
            "values": base64.b64encode(_bytes(self.values)).decode(),
        }

    @classmethod
    def from_json(cls, said: Any, fingerprint: str) -> BaseRecord | None:
        """None where there is none, or one of a form that this code does not know."""
        try:
            kept = tuple(Kept(**way) for way in said["kept"])
            how = tuple(range(-1, len(kept)).index(place) - 1 for place in said["how"])
            raw = bytearray(base64.b64decode(said["values"], validate=True))
            values = torch.frombuffer(raw, dtype=torch.bfloat16).reshape(len(how), FEW)
            return cls(fingerprint, str(said["names"]), str(said["plain"]), kept, how, values)
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None

    @torch.no_grad()
    def compare(self, model: nn.Module, *, without: Iterable[str] = ()) -> BaseDrift | None:
        """How a base with another fingerprint is kept otherwise than this one; None where it is kept so too.

        Raises:
            AdapterError: it is another base, and in what it differs.
        """
        if self.names != _names(model, without):
            raise AdapterError("names or shapes of its parameters differ")
        found, plain = _Comparison(storage.rest_dtype(model)), hashlib.sha256()
        listed = list(_parameters(model, without))
        for (name, module, leaf), place, few in zip(listed, self.how, self.values, strict=True):
            mark = whole(storage.mark(module, leaf).detach())
            found.add(name, module, leaf, mark, self.kept[place] if place >= 0 else None, few)
            if place < 0:
                plain.update(_print(name, mark))
        if not found.lost and plain.hexdigest()[:16] != self.plain:
            raise AdapterError("values that are kept as plain numbers differ")
        return found.concluded()


class _Comparison:
    """Goes through the parameters of a base one by one.

    Attributes:
        rest: dtype of the plain numbers of the base.
        lost: whether something that was plain is quantised now.
    """

    def __init__(self, rest: torch.dtype) -> None:
        self.rest = rest
        self.drifts: dict[str, float] = {}
        self.then: dict[str, None] = {}
        self.now: dict[str, None] = {}
        self.lost, self.proven, self.hint = False, True, ""
        self.same = self.compared = 0  # values of quantised matrices

    def add(self, name: str, module: nn.Module, leaf: str, mark: Tensor, then: Kept | None, few: Tensor) -> None:
        """Args: mark: its values now.  few: some of its values then."""
        now, value = _kept(module, leaf, self.rest), _matrix(module, leaf, mark)
        if now == then:
            self._alike(name, _few(value), few, exactly=now is None)
            return
        self.then[_in_words(then)] = self.now[_in_words(now)] = None
        path = name.removesuffix(".weight")
        if then is not None and now is None and not self._hindered(value, then):
            layer = storage.kept_as(value, then)
            self._alike(name, _few(storage.mark(layer, "weight")), few, exactly=False)
            self.drifts[path] = _distance(value, storage.decoded(layer, "weight"))
            return
        self.lost, self.proven = self.lost or then is None, False
        self.drifts[path] = _distance(_few(value), few)
        if not self.drifts[path] <= NEAR:
            raise AdapterError(f"{name} is {100 * self.drifts[path]:.0f} % off")

    def _hindered(self, value: Tensor, then: Kept) -> bool:
        """Whether a plain matrix cannot be encoded as it was then, which the hint explains."""
        if not storage.can_encode(then):
            self.hint = f"; encoding them as they were then needs {then.library}: pip install 'pegbox[quantised]'"
        elif then.dtype and torch.finfo(value.dtype).eps > torch.finfo(getattr(torch, then.dtype)).eps:
            self.hint = f"; they were encoded from {then.dtype}: load the base in that to compare all"
        else:
            return False
        return True

    def _alike(self, name: str, here: Tensor, few: Tensor, *, exactly: bool) -> None:
        same = int((here == few).sum())
        if same < len(few) * (1 if exactly else 0.5):
            raise AdapterError(f"{name} has other values{'' if exactly else ', kept as it was then'}")
        if not exactly:
            self.same, self.compared = self.same + same, self.compared + len(few)

    def concluded(self) -> BaseDrift | None:
        others = self.compared - self.same
        if others > max(1, OTHERS * self.compared):
            raise AdapterError(f"{others} of {self.compared} values of its matrices differ, kept as they were then")
        if not self.drifts:
            return None
        return BaseDrift(" and ".join(self.then), " and ".join(self.now), Drifts(self.drifts), self.proven, self.hint)


def _parameters(model: nn.Module, without: Iterable[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, the module that keeps it, its name there)"""
    skip = tuple(without)
    for name, _ in model.named_parameters():
        if not any(name.startswith(f"{path}.") for path in skip):
            path, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(path), leaf


def _names(model: nn.Module, without: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name, module, leaf in _parameters(model, without):
        shape = tuple(storage.shape(module, leaf))
        digest.update(f"{name}{shape[::-1] if _turned(module, leaf) else shape}".encode())
    return digest.hexdigest()[:16]


def _kept(module: nn.Module, leaf: str, rest: torch.dtype) -> Kept | None:
    """How a parameter is kept; encoded from what the model keeps the rest in, where the format does not say."""
    kept = storage.kept(module, leaf)
    return replace(kept, dtype=str(rest).removeprefix("torch.")) if kept and not kept.dtype else kept


def _turned(module: nn.Module, leaf: str) -> bool:
    """Whether a plain linear layer keeps (in, out), which bitsandbytes would keep as (out, in)."""
    return leaf == "weight" and is_conv1d(module)


def _matrix(module: nn.Module, leaf: str, value: Tensor) -> Tensor:
    return value.T.contiguous() if _turned(module, leaf) else value


def _print(name: str, value: Tensor) -> bytes:
    """What a hash is made of."""
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return f"{name}{tuple(value.shape)}".encode() + _bytes(flat[::step][:SAMPLES].to(torch.bfloat16))


def _few(value: Tensor) -> Tensor:
    """(FEW,) bfloat16, from the first number to the last."""
    flat = value.detach().reshape(-1)
    places = torch.arange(FEW, device=flat.device) * max(flat.numel() - 1, 0) // (FEW - 1)
    return flat[places].to(torch.bfloat16).cpu() if flat.numel() else torch.zeros(FEW, dtype=torch.bfloat16)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.int16).cpu().numpy().tobytes()


def _distance(here: Tensor, then: Tensor) -> float:
    was = then.float()
    return float((here.float() - was).norm() / was.norm().clamp(min=1e-30))


def _in_words(kept: Kept | None) -> str:
    return "plain numbers" if kept is None else str(kept)
