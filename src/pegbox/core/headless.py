"""The head of a language model: found, proven, and run as something else.

A model that ends in `logits = rule(head(hidden))` need not make its logits to be trained: while `through_head` runs it,
the head computes a loss from its input instead, inside the model's own forward, where wrappers (DDP, FSDP, compiled
models) have the head's weights ready.  That the model does end so is proven once per model, by planting known logits
in the place of the head's and looking at what the model makes of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pegbox.core.cross_entropy import (
    CHUNK_BYTES,
    LogitRule,
    chunked_cross_entropy,
    chunked_head_loss,
    chunked_head_token_losses,
    chunked_token_losses,
)
from pegbox.core.errors import ModelError
from pegbox.core.seeding import seeded
from pegbox.core.tuned import Tuned

WRAPPED_AS = ("_orig_mod", "_fsdp_wrapped_module")  # child names of torch.compile's and FSDP1's wrappers
SOFTCAPS = ("final_logit_softcapping", "softcap")  # config keys: Gemma, jev
SCALES = ("logit_scale", "logits_scaling", "output_multiplier")  # Cohere multiplies, Granite divides, MuP-like
SHIFT = "final_logits_bias"  # a buffer (1, V) that BART and its kin add to their logits; zeros as a rule
PLANTED = 60.0  # planted logits run from minus to plus this, so that any softcap shows

log = logging.getLogger("pegbox")


def unwrap(model: nn.Module) -> nn.Module:
    """The base model inside `Tuned`, DDP, FSDP1 and torch.compile wrappers."""
    *_, base = _layers(model)
    return base


def tuned_in(model: nn.Module) -> Tuned | None:
    """The `Tuned` inside such wrappers, if there is one."""
    return next((layer for layer in _layers(model) if isinstance(layer, Tuned)), None)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps, what that wraps, down to the base."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif isinstance(inner, Tuned):
            inner = inner.model
        else:
            inner = next((inner._modules[name] for name in WRAPPED_AS if name in inner._modules), None)


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, a mapping or object with `logits`, or a tuple that starts so.

    Raises:
        ModelError: none of these.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, tuple) and output:
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"no logits in what the model returned ({type(output).__name__}); expected a tensor or `logits`"
        )
    return output


def find_head(model: nn.Module) -> tuple[nn.Module, bool] | None:
    """The output embeddings, and whether they are a plain `nn.Linear` with no graft on it; None if there are none."""
    getter = getattr(unwrap(model), "get_output_embeddings", None)  # custom modules need not have it
    head = getter() if getter is not None else None
    if head is None:
        return None
    return head, type(head) is nn.Linear and "forward" not in head.__dict__


# -- the head as something else ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs `forward`; afterwards its own forward again, be that its class's or a graft."""
    own = module.__dict__
    before = own.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            own.pop("forward")  # not `del module.forward`, which a compiled graph cannot follow
        else:
            module.forward = before


def _same(hidden: Tensor) -> Tensor:
    return hidden


@dataclass(frozen=True)
class Head:
    """A head at work: hidden states (..., D) and labels (...) to losses, a chunk of logits at a time."""

    call: Callable[[Tensor], Tensor]  # (..., D) -> (..., V)
    linear: nn.Linear | None = None  # the same as a matrix, where it is one
    rule: LogitRule = field(default_factory=LogitRule)
    chunk: int | None = None  # tokens at once through `call`

    def cross_entropy(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """A scalar: see `pegbox.core.cross_entropy.chunked_cross_entropy`."""
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction, **self._rule()}
        if not self._is_matrix():
            options["chunk"] = self.chunk
            return chunked_head_loss(self.call, hidden, labels, token_weights=token_weights, **options)
        options["token_weights"] = None if token_weights is None else token_weights.flatten()
        return chunked_cross_entropy(hidden.flatten(0, -2), *self._matrix(labels), **options)

    def token_losses(self, hidden: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each token in the shape of `labels`, 0 where there is none; differentiable."""
        options: dict[str, Any] = {"label_smoothing": label_smoothing, **self._rule()}
        if not self._is_matrix():
            return chunked_head_token_losses(self.call, hidden, labels, chunk=self.chunk, **options)
        return chunked_token_losses(hidden.flatten(0, -2), *self._matrix(labels), **options).view(labels.shape)

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p(label) of each token in the shape of `labels`, 0 where there is none; differentiable."""
        return -self.token_losses(hidden, labels)

    def _rule(self) -> dict[str, Any]:
        return {"logit_scale": self.rule.scale, "softcap": self.rule.softcap}

    def _is_matrix(self) -> bool:
        """Whether the head is one matrix, and that an ordinary tensor: neither quantised nor sharded."""
        return self.linear is not None and type(self.linear.weight) in (nn.Parameter, Tensor)

    def _matrix(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight (V, D), labels (N,), bias (V,)."""
        assert self.linear is not None
        return self.linear.weight, labels.flatten(), self.linear.bias


def through_head(
    model: nn.Module, inputs: Mapping[str, Any], length: int, use: Callable[[Head, Tensor], Tensor]
) -> tuple[Tensor, Any]:
    """Run the model with `use(head, hidden)` in the place of its head.

    Args:
        model: a model that returns logits, as it is or wrapped
        inputs: its keyword arguments, without labels
        length: positions T that have labels; any before them (virtual tokens of a prompt) are cut off
        use: from a head and its input (B, T, D) to a scalar or (B, T)

    Returns:
        What `use` returned, and what the model returned, whose logits mean nothing.  Where no head can be proven, the
        model makes all its logits and `use` gets them, with the identity as head.
    """
    found = find_head(model)
    rule = None if found is None else logit_rule(model, inputs)
    if found is None or rule is None:
        output = model(**inputs)
        return use(Head(_same), logits_of(output)[..., -length:, :]), output
    module, plain = found
    chunk = max(16, CHUNK_BYTES // (4 * module.out_features)) if isinstance(module, nn.Linear) else None
    head = Head(module.forward, module if plain and isinstance(module, nn.Linear) else None, rule, chunk)
    values: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        result = use(head, hidden[..., -length:, :])
        values.append(result.detach())
        return _carry(result - result.detach(), hidden.shape[:-1])

    with replaced(module, forward), _narrow_shift(unwrap(model)):
        output = model(**inputs)
    if len(values) != 1:
        raise ModelError(f"the model called its head {len(values)} times in one forward, expected 1")
    return _arrived(logits_of(output), values[0]) / rule.scale + values[0], output


@contextlib.contextmanager
def _narrow_shift(base: nn.Module) -> Iterator[None]:
    """Inside, a shift of the logits is (1, 1), so that adding it makes none of width V; the proof found it to be 0."""
    shift = base._buffers.get(SHIFT)
    if shift is None:
        yield
        return
    base._buffers[SHIFT] = shift.new_zeros(1, 1)
    try:
        yield
    finally:
        base._buffers[SHIFT] = shift


def _carry(zero: Tensor, shape: torch.Size) -> Tensor:
    """A value of 0 that has the gradient of a result, shaped as logits (B, T', 1).

    The gradient leaves the model through its output, as wrappers expect, and zeros pass every logit rule unchanged.
    """
    if zero.ndim == 0:
        return zero.expand(*shape, 1).clone()  # FSDP warns of views
    return nn.functional.pad(zero[..., None], (0, 0, shape[-1] - zero.shape[-1], 0))


def _arrived(logits: Tensor, value: Tensor) -> Tensor:
    """What `_carry` sent, in the shape of `value`, from logits (B, T or T', 1)."""
    if value.ndim == 0:
        return logits.flatten()[-1]
    return logits[..., -value.shape[-1] :, 0]


# -- proof -------------------------------------------------------------------------------------------------------------

_proven: WeakKeyDictionary[nn.Module, LogitRule | None] = WeakKeyDictionary()


def logit_rule(model: nn.Module, inputs: Mapping[str, Any]) -> LogitRule | None:
    """What the model does to its head's output, proven once per model; None, with the reason logged, if unknown.

    Args:
        model: as it is or wrapped
        inputs: any batch for it, of which the first tokens are used

    The proof is no part of a compiled graph: where a whole training step is compiled in one, call this once before.
    """
    base = unwrap(model)
    if not _is_proven(base):
        found = find_head(base)
        with _given(model, inputs):
            result = "it has no output embeddings" if found is None else _prove(_callable(model), found[0], inputs)
        if isinstance(result, str):
            log.warning("%s is trained from full logits, which takes more memory: %s", type(base).__name__, result)
        _proven[base] = None if isinstance(result, str) else result
    return _rule(base)


# Constants of a compiled graph: guards on the dictionary itself would break when another model in it is collected.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_proven(base: nn.Module) -> bool:
    return base in _proven


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rule(base: nn.Module) -> LogitRule | None:
    return _proven[base]


def _given(model: nn.Module, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """What of the inputs is for adapters, handed to them: the base, which a proof runs, knows nothing of it."""
    tuned = tuned_in(model)
    return contextlib.nullcontext() if tuned is None else tuned.given(**tuned.aside(inputs))


def _callable(model: nn.Module) -> nn.Module:
    """What a proof runs: the base, or the whole of a sharded model, whose parameters are there only in its forward."""
    if not torch.distributed.is_available():
        return unwrap(model)
    from torch.distributed.fsdp import FSDPModule  # loads much, and is needed once a model

    return model if isinstance(model, FSDPModule) else unwrap(model)


def _prove(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> LogitRule | str:
    """The rule, or why there is none."""
    planted: list[Tensor] = []
    own = head.forward

    def plant(hidden: Tensor) -> Tensor:
        real = own(hidden)  # (B, T', V)
        known = torch.linspace(-PLANTED, PLANTED, real.numel(), dtype=torch.float32, device=real.device)
        planted.append(known.to(real.dtype).view_as(real))
        return planted[-1]

    try:
        with torch.no_grad(), evaluating(model), seeded(0, "proof"), replaced(head, plant):
            logits = logits_of(model(**_first_tokens(inputs)))
    except (ModelError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        return f"a few tokens alone fail ({type(error).__name__}: {error})"
    if len(planted) != 1:
        return f"it calls its head {len(planted)} times in one forward, expected 1"
    return _matching(logits, planted[0], _candidates(unwrap(model)))


def _matching(logits: Tensor, planted: Tensor, rules: list[LogitRule]) -> LogitRule | str:
    """The first rule by which `planted` (B, T', V) becomes `logits` (B, T, V)."""
    if logits.ndim != 3 or logits.shape[1] > planted.shape[1]:
        return f"its logits have shape {tuple(logits.shape)}, expected (batch, tokens, vocabulary)"
    tolerance = 1e-4 if torch.finfo(planted.dtype).bits >= 32 else 2e-2  # a softcap in bfloat16 rounds three times
    planted = planted[:, planted.shape[1] - logits.shape[1] :]
    for rule in rules:
        expected = rule(planted.float())
        if expected.shape == logits.shape and (expected - logits).abs().max() <= tolerance * expected.abs().max():
            return rule
    return "it changes its logits in a way that its config does not tell"


def _candidates(base: nn.Module) -> list[LogitRule]:
    """Rules that the config may mean, the plain one last."""
    scales = [s for value in _declared(base, SCALES) for s in (value, 1.0 / value)]
    return [LogitRule(scale, cap) for scale, cap in product([*scales, 1.0], [*_declared(base, SOFTCAPS), None])]


def _declared(base: nn.Module, keys: tuple[str, ...]) -> list[float]:
    config = getattr(base, "config", None)
    text = getattr(config, "get_text_config", None)
    values = [getattr(text() if text else config, key, None) for key in keys]
    return [float(v) for v in values if isinstance(v, int | float) and v]


def _first_tokens(inputs: Mapping[str, Any], tokens: int = 4) -> dict[str, Any]:
    """A few tokens of every row (adapters may differ by row), and the arguments that are not tensors."""
    cut = {k: inputs[k][:, :tokens] for k in ("input_ids", "inputs_embeds", "decoder_input_ids") if k in inputs}
    return cut | {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout draws a number and no statistic moves; grafts beside a base may still draw."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
