"""How numbers are kept: plainly, or quantised by another library.  The one file that knows such libraries.

    bitsandbytes   `Linear4bit`: nf4 or fp4, its scales perhaps quantised too (double quantisation);
                   `Linear8bitLt`: int8, one scale a row
    torchao        weight-only int8 and int4, a tensor subclass in an ordinary `nn.Linear`

What is kept quantised is decoded when it is read, and never changed: a merge puts a plain matrix in its place, or
encodes the new one in the same way.  None of these libraries is imported before a model holds something of theirs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pegbox.core.errors import CannotMerge, MissingExtra
from pegbox.core.layout import is_conv1d
from pegbox.core.low_rank import Matrix


@dataclass(frozen=True)
class Kept:
    """How a matrix is kept quantised: all that is needed to keep another one so.

    Attributes:
        format: `nf4`, `fp4`, `int8`, or `torchao int8`, `torchao int4`, ...
        dtype: of the plain numbers that were encoded; None where the format does not say.
        block: how many numbers share a scale; None for a row.
        double: the scales are quantised too.
        tensor: torchao's class of tensor.
    """

    format: str
    dtype: str | None = None
    block: int | None = None
    double: bool = False
    tensor: str | None = None

    def __str__(self) -> str:
        more = ", ".join(["double quantisation"] * self.double + ([f"from {self.dtype}"] if self.dtype else []))
        return f"{self.format} ({more})" if more else self.format

    @property
    def library(self) -> str:
        return "torchao" if self.tensor else "bitsandbytes"


class Storage(ABC):
    """One way of keeping a matrix quantised."""

    name: str
    rounds_inputs = False  # whether the module's own forward is not the product with its matrix

    @abstractmethod
    def decode(self, module: nn.Module, leaf: str) -> Tensor:
        """The matrix as plain numbers, in the module's own layout."""

    @abstractmethod
    def kept(self, module: nn.Module, leaf: str) -> Kept:
        """In which way exactly."""

    def encode(self, value: Tensor, module: nn.Module, leaf: str) -> nn.Parameter:
        """A plain matrix kept in the same way, with the same settings."""
        return encode(value, self.kept(module, leaf))

    def mark(self, module: nn.Module, leaf: str) -> Tensor:
        """What a fingerprint is taken of."""
        return self.decode(module, leaf)

    def still(self, module: nn.Module) -> tuple[str, Any] | None:
        """Keep the module from changing what it keeps when it is called: the attribute set, and what it was."""
        return None

    def widen(self, module: nn.Module, leaf: str) -> tuple[str, Any] | None:
        """Have the module compute in float32: the attribute set, and what it was."""
        return None

    def twin(self, module: nn.Module, leaf: str, kept: nn.Parameter) -> nn.Module:
        """The module with another parameter; the original is left as it is."""
        twin = copy.copy(module)
        twin.__dict__.pop("forward", None)  # a site, perhaps
        twin._parameters = {**module._parameters, leaf: kept}
        return twin

    def shape(self, module: nn.Module, leaf: str) -> torch.Size:
        """Of the matrix."""
        return getattr(module, leaf).shape

    def dtype(self, module: nn.Module, leaf: str) -> torch.dtype:
        """Of the decoded matrix."""
        return getattr(module, leaf).dtype

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        """What the module turns its input into; None for nothing."""
        return None


def of(module: nn.Module, leaf: str) -> Storage | None:
    """How a module keeps one of its parameters; None for plain numbers."""
    kept = getattr(module, leaf, None)
    if type(kept) is nn.Parameter or type(kept) is Tensor:
        return None
    return _of_library(kept)


def _of_library(kept: Any) -> Storage | None:
    library = type(kept).__module__.partition(".")[0]
    if library == "bitsandbytes":
        return _of_bitsandbytes(kept)
    return TorchAO(kept) if library == "torchao" else None


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


def _of_bitsandbytes(kept: Any) -> Storage | None:
    from bitsandbytes.nn import Int8Params, Params4bit

    if isinstance(kept, Params4bit):
        return FourBit(kept.quant_type) if kept.quant_state is not None else None
    if isinstance(kept, Int8Params):
        return EightBit() if kept.dtype == torch.int8 else None
    return None


class FourBit(Storage):
    """`bitsandbytes.nn.Linear4bit`.

    On a CPU with bf16 units the module repacks its codes for a faster kernel when it is called in eval, and rounds its
    scales to bfloat16 for good.  `still` keeps it from that while it carries adapters.
    """

    def __init__(self, kind: str) -> None:
        self.name = kind

    def decode(self, module: nn.Module, leaf: str) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self._unpacked(getattr(module, leaf)))

    def mark(self, module: nn.Module, leaf: str) -> Tensor:
        """Decoded with scales as repacking rounds them, so that it changes no fingerprint."""
        from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

        codes, state = self._unpacked(getattr(module, leaf))
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.absmax, state.nested = scales.to(torch.bfloat16).float(), False
        return dequantize_4bit(codes, state)

    def kept(self, module: nn.Module, leaf: str) -> Kept:
        kept: Any = getattr(module, leaf)
        dtype = str(self.dtype(module, leaf)).removeprefix("torch.")
        return Kept(kept.quant_type, dtype, kept.blocksize, kept.compress_statistics)

    def encode(self, value: Tensor, module: nn.Module, leaf: str) -> nn.Parameter:
        return _four_bit(value, self.kept(module, leaf), getattr(module, leaf).quant_storage)

    def shape(self, module: nn.Module, leaf: str) -> torch.Size:
        return torch.Size(getattr(module, leaf).quant_state.shape)

    def dtype(self, module: nn.Module, leaf: str) -> torch.dtype:
        state: Any = getattr(module, leaf).quant_state
        packed = getattr(state, "packing_format_for_cpu", False)
        found: torch.dtype = state.original_dtype if packed else state.dtype
        return found

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        return module.compute_dtype  # type: ignore[return-value]

    def still(self, module: nn.Module) -> tuple[str, Any] | None:
        before = module.support_avx512bf16_for_cpu
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return "support_avx512bf16_for_cpu", before

    def widen(self, module: nn.Module, leaf: str) -> tuple[str, Any] | None:
        before = module.compute_dtype
        module.compute_dtype = torch.float32  # type: ignore[assignment]
        return "compute_dtype", before

    def _unpacked(self, kept: Any) -> tuple[Tensor, Any]:
        """Codes and a copy of the quantisation state, in bitsandbytes' usual order."""
        state = copy.copy(kept.quant_state)
        if not getattr(state, "packing_format_for_cpu", False):
            return kept.data, state
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scales, state.original_nested = state.absmax, False
        codes, state = _convert_weight_packed_for_cpu_inverse(kept.data, state)
        state.absmax = scales.T.reshape(-1).float()
        return codes, state


class EightBit(Storage):
    """`bitsandbytes.nn.Linear8bitLt`: W = CB * SCB / 127, row by row.

    The module rounds its inputs to int8 as well.  Where a graft runs, the decoded matrix is used instead.
    """

    name = "int8"
    rounds_inputs = True

    def decode(self, module: nn.Module, leaf: str) -> Tensor:
        codes, scales = self._pieces(module, leaf)
        return codes.to(torch.float32).mul_(scales.to(torch.float32)[:, None] / 127)

    def kept(self, module: nn.Module, leaf: str) -> Kept:
        return Kept(self.name)

    def dtype(self, module: nn.Module, leaf: str) -> torch.dtype:
        return torch.float32

    def twin(self, module: nn.Module, leaf: str, kept: nn.Parameter) -> nn.Module:
        twin: Any = super().twin(module, leaf, kept)
        twin.state = copy.copy(module.state)
        twin.state.CB = twin.state.SCB = None
        return twin

    def _pieces(self, module: nn.Module, leaf: str) -> tuple[Tensor, Tensor]:
        """Codes (out, in) and scales (out,); the module takes the scales to its state when first called."""
        kept, owner = getattr(module, leaf), cast(Any, module)
        return kept.data, kept.SCB if kept.SCB is not None else owner.state.SCB


# -- torchao ---------------------------------------------------------------------------------------------------------


class TorchAO(Storage):
    """A weight-only tensor subclass of torchao, in a module of an ordinary class."""

    def __init__(self, kept: Any) -> None:
        self.name = f"torchao {_bits(kept)}"
        self.rounds_inputs = any(getattr(kept, word, None) is not None for word in _INPUTS_TOO)

    def decode(self, module: nn.Module, leaf: str) -> Tensor:
        return getattr(module, leaf).dequantize()

    def kept(self, module: nn.Module, leaf: str) -> Kept:
        kept: Any = getattr(module, leaf)
        block = tuple(getattr(kept, "block_size", ()))
        shared = None if not block or block[-1] == kept.shape[-1] else int(block[-1])
        dtype = str(kept.dtype).removeprefix("torch.")
        return Kept(self.name, dtype, shared, tensor=type(kept).__name__ + self._oddity(kept))

    def widen(self, module: nn.Module, leaf: str) -> tuple[str, Any] | None:
        before = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(before.to(torch.float32), requires_grad=False))
        return leaf, before

    def _oddity(self, kept: Any) -> str:
        """What else its class may do, and `encode` does not."""
        if self.rounds_inputs:
            return ", inputs rounded too"
        if next(iter(getattr(kept, "block_size", (1,)))) != 1:
            return ", one scale for several rows"
        zero = getattr(kept, "zero_point", None)
        return ", asymmetric" if zero is not None and bool(zero.any()) else ""


_INPUTS_TOO = ("act_quant_kwargs", "activation_quantization")  # set where inputs are rounded too


def _bits(kept: Any) -> str:
    target = getattr(kept, "target_dtype", None)
    if target is not None:
        return str(target).removeprefix("torch.")
    found = re.search(r"Int(\d+)", type(kept).__name__)
    return f"int{found[1]}" if found else type(kept).__name__


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode(value: Tensor, how: Kept) -> nn.Parameter:
    """A plain matrix (out, in) as a quantised parameter.

    Raises:
        MissingExtra: the library is not installed.  CannotMerge: there is no telling how it is encoded.
    """
    if importlib.util.find_spec(how.library) is None:
        raise MissingExtra(how.library, "quantised", f"keeping a matrix as {how.format}")
    if how.tensor:
        return _torchao(value, how)
    return _eight_bit(value, how) if how.format == EightBit.name else _four_bit(value, how)


def can_encode(how: Kept) -> bool:
    """Whether `encode` knows the format, and finds its library here."""
    known = how.tensor in TORCHAO if how.tensor else how.format in ("nf4", "fp4", EightBit.name)
    return known and importlib.util.find_spec(how.library) is not None


def _four_bit(value: Tensor, how: Kept, packed: torch.dtype = torch.uint8) -> nn.Parameter:
    """Args: packed: the dtype in which the codes are kept."""
    from bitsandbytes.nn import Params4bit

    plain = Params4bit(
        value.to(getattr(torch, str(how.dtype))),
        requires_grad=False,
        blocksize=how.block,
        compress_statistics=how.double,
        quant_type=how.format,
        quant_storage=packed,
    )
    return plain.to(value.device)


def _eight_bit(value: Tensor, how: Kept) -> nn.Parameter:
    from bitsandbytes.nn import Int8Params

    plain = value.to(getattr(torch, how.dtype)) if how.dtype else value
    half = plain.to("cpu", torch.float16)  # it is encoded when it leaves the CPU
    return Int8Params(half, requires_grad=False, has_fp16_weights=False).to(value.device)


TORCHAO = ("Int8Tensor", "IntxUnpackedToInt8Tensor")  # classes of tensor of which the settings can be read off


def _torchao(value: Tensor, how: Kept) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow

    if how.tensor not in TORCHAO:
        raise CannotMerge(
            f"a weight kept as {how.tensor} cannot be encoded anew; merge without requantise leaves a plain layer, "
            "which torchao can quantise again"
        )
    if how.tensor == "Int8Tensor":
        grain = PerGroup(how.block) if how.block else PerRow()
        config: Any = Int8WeightOnlyConfig(granularity=grain, set_inductor_config=False)
    else:
        bits = getattr(torch, how.format.removeprefix("torchao "))
        config = IntxWeightOnlyConfig(bits, PerGroup(how.block) if how.block else PerAxis(0))
    holder = nn.Sequential(nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta"))
    holder[0].weight = nn.Parameter(value.to(getattr(torch, str(how.dtype))), requires_grad=False)
    quantize_(holder, config)
    return holder[0].weight


# -- what sites ask ----------------------------------------------------------------------------------------------------


def name(module: nn.Module, leaf: str) -> str | None:
    """The word for how a parameter is kept, or None for plain numbers."""
    kept = of(module, leaf)
    return kept.name if kept else None


def decoded(module: nn.Module, leaf: str) -> Tensor:
    """A parameter as plain numbers, in the module's own layout."""
    kept = of(module, leaf)
    value: Tensor = kept.decode(module, leaf) if kept else getattr(module, leaf)
    return value


def kept(module: nn.Module, leaf: str) -> Kept | None:
    """How a parameter is kept quantised; None for plain numbers."""
    found = of(module, leaf)
    return found.kept(module, leaf) if found else None


def kept_as(value: Tensor, how: Kept) -> nn.Module:
    """A module whose `weight` is a plain matrix (out, in), kept quantised; raises as `encode`."""
    holder = nn.Module()
    holder.weight = encode(value, how)
    return holder


def mark(module: nn.Module, leaf: str) -> Tensor:
    """What a fingerprint is taken of: a parameter as plain numbers."""
    kept = of(module, leaf)
    value: Tensor = kept.mark(module, leaf) if kept else getattr(module, leaf)
    return value


Before = list[tuple[nn.Module, str, Any]]  # attributes of modules, and what they were


def still(model: nn.Module) -> Before:
    """Keep quantised modules from changing what they keep when they are called."""
    return [(module, *before) for module, kept in _quantised(model) if (before := kept.still(module))]


def widen(model: nn.Module) -> Before:
    """Have quantised modules compute in float32."""
    return [(module, *before) for module, kept in _quantised(model) if (before := kept.widen(module, "weight"))]


def _quantised(model: nn.Module) -> Iterator[tuple[nn.Module, Storage]]:
    for module in list(model.modules()):
        kept = of(module, "weight") if "weight" in module._parameters else None
        if kept:
            yield module, kept


def numbers(value: Tensor) -> Tensor:
    """A tensor of a state, decoded where its own class says how."""
    library = type(value).__module__.partition(".")[0]
    return value.dequantize() if library == "torchao" else value


def matrix(module: nn.Module, leaf: str) -> Matrix:
    """A parameter as plain numbers, or what decodes it."""
    kept = of(module, leaf)
    return (lambda: kept.decode(module, leaf)) if kept else getattr(module, leaf)


def shape(module: nn.Module, leaf: str) -> torch.Size:
    """Of a parameter as plain numbers; decodes nothing."""
    kept = of(module, leaf)
    value: torch.Size = kept.shape(module, leaf) if kept else getattr(module, leaf).shape
    return value


def dtype(module: nn.Module, leaf: str) -> torch.dtype:
    """Of a parameter as plain numbers."""
    kept = of(module, leaf)
    value: torch.dtype = kept.dtype(module, leaf) if kept else getattr(module, leaf).dtype
    return value


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """What a module with a quantised weight turns its input into; None for nothing."""
    kept = of(module, "weight")
    return kept.compute_dtype(module) if kept else None


def rounds_inputs(module: nn.Module) -> bool:
    """Whether a module with a quantised weight does not compute the product with the decoded one."""
    kept = of(module, "weight")
    return kept is not None and kept.rounds_inputs


def quantised_parameters(model: nn.Module) -> dict[str, str]:
    """Name of every parameter of a model that is kept quantised, to how."""
    found = {}
    for path, module in model.named_modules():
        for leaf in module._parameters:
            word = name(module, leaf)
            if word is not None:
                found[f"{path}.{leaf}" if path else leaf] = word
    return found


def rest_dtype(model: nn.Module) -> torch.dtype:
    """What a model keeps its plain numbers in."""
    plain = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next(plain, torch.float32)


# -- merging -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drifts:
    """How far each of several matrices is from another: the norm of the difference over another norm.

    Attributes:
        of: by path.
    """

    of: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.of.values()) / len(self.of)

    @property
    def worst(self) -> str:
        """The path of the matrix that is furthest off."""
        return max(self.of, key=lambda path: self.of[path])

    @property
    def largest(self) -> float:
        return self.of[self.worst]

    def __str__(self) -> str:
        return f"{100 * self.mean:.2g} % on average, {100 * self.largest:.2g} % at most ({self.worst})"


@dataclass(frozen=True)
class Drift:
    """How far encoding has moved a merged matrix: the norm of the difference over another norm.

    Attributes:
        of_matrix: over that of the matrix.
        of_change: over that of what the adapter had changed.
    """

    of_matrix: float
    of_change: float


def encoded(layer: nn.Module, leaf: str, value: Tensor) -> nn.Parameter:
    """Another matrix, in the layer's own layout, kept as the layer keeps its own.

    Raises:
        CannotMerge: there is no telling how it was encoded.
    """
    found = of(layer, leaf)
    assert found is not None
    return found.encode(value, layer, leaf)


def rebuilt(layer: nn.Module, leaf: str, value: Tensor) -> nn.Module:
    """A layer in the place of a quantised one, with another matrix: plain, or encoded before by `encoded`.

    Args:
        value: the new matrix, in the layer's own layout.
    """
    kept = of(layer, leaf)
    assert kept is not None
    if type(value) not in (Tensor, nn.Parameter):
        return kept.twin(layer, leaf, value)  # type: ignore[arg-type]
    source = layer.__dict__.get("source_cls", nn.Linear)  # transformers notes what class the base has there
    if not is_conv1d(source):
        return linear(layer, value)
    with torch.device("meta"):
        turned = source(layer.out_features, layer.in_features)
    return _with(turned, layer, value.T.contiguous())


def linear(layer: nn.Module, value: Tensor) -> nn.Module:
    """A plain `nn.Linear` in the place of a quantised layer.  Args: value: (out, in)"""
    assert isinstance(layer, nn.Linear)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    return _with(plain, layer, value)


def _with(plain: nn.Module, layer: nn.Module, weight: Tensor) -> nn.Module:
    """A layer with a weight, and the bias of another."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return plain.train(layer.training)


def drift(before: nn.Module, after: nn.Module, leaf: str, value: Tensor) -> Drift:
    """How far `after`, encoded anew, is from `value`, the matrix that it was to have."""
    wanted, old, have = (t.float() for t in (value, decoded(before, leaf), decoded(after, leaf)))
    moved = (have - wanted).norm()
    return Drift(float(moved / wanted.norm()), float(moved / (wanted - old).norm()))


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Inside, every linear layer that is kept quantised is a plain one, and the configuration says so: to be saved."""
    dtype_, replaced = rest_dtype(model), []
    for path in [name_.rpartition(".")[0] for name_ in quantised_parameters(model) if name_.endswith(".weight")]:
        parent, _, child = path.rpartition(".")
        holder, layer = model.get_submodule(parent), model.get_submodule(path)
        setattr(holder, child, rebuilt(layer, "weight", decoded(layer, "weight").to(dtype_)))
        replaced.append((holder, child, layer))
    told = [(owner, _silenced(owner)) for owner in _saying_so(model)]
    try:
        with savable(model):
            yield
    finally:
        for owner, said in told:
            owner.__dict__.update(said)
        for holder, child, layer in replaced:
            setattr(holder, child, layer)


@contextlib.contextmanager
def savable(model: nn.Module) -> Iterator[None]:
    """Inside, transformers can save a model whose files were quantised already.

    It notes by which steps it read them and undoes those when it saves; decoding it cannot undo, nor need to.
    """
    noted = [(m, m.__dict__[STEPS]) for m in model.modules() if m.__dict__.get(STEPS)]
    for owner, steps in noted:
        owner.__dict__[STEPS] = [step for step in steps if not _decodes(step)]
    try:
        yield
    finally:
        for owner, steps in noted:
            owner.__dict__[STEPS] = steps


STEPS = "_weight_conversions"
DECODING = ("transformers.integrations.bitsandbytes", "transformers.integrations.torchao")
SAID = ("quantization_config", "is_quantized", "hf_quantizer")  # by transformers, of models and configurations


def _decodes(step: Any) -> bool:
    return any(type(operation).__module__ in DECODING for operation in getattr(step, "operations", ()))


def _saying_so(model: nn.Module) -> list[Any]:
    """Models within a model, and their configurations."""
    models = [m for m in model.modules() if hasattr(m, "config")]
    return list({id(owner): owner for m in models for owner in (m, m.config)}.values())


def _silenced(owner: Any) -> dict[str, Any]:
    return {word: owner.__dict__.pop(word) for word in SAID if word in owner.__dict__}
