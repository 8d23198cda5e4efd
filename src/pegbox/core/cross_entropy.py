"""Head and cross-entropy in chunks of tokens: all logits never exist at once.

    z_i = cap * tanh(scale * (W x_i + b) / cap)        (no cap: z_i = scale * (W x_i + b))
    loss_i = logsumexp(z_i) - (1 - s) * z_i[y_i] - s * mean(z_i)
    d loss_i / d z_i = softmax(z_i) - (1 - s) * onehot(y_i) - s / V

    x: hidden (N, D)   W: weight (V, D)   b: bias (V,)   y: labels (N,)   s: label smoothing

The loss and its gradients come out of one pass: a chunk of logits becomes its own gradient in place, is multiplied
into the gradients of x, W and b, and is overwritten by the next chunk.  Tokens without a label are never multiplied
with W.  Statistics are at least float32.  The pass is an operator of its own, so a compiled graph does not break on
the number of labelled tokens, which only the data knows.

`chunked_*` take a matrix.  `chunked_head_*` take any callable (a head with an adapter around it) and recompute each
chunk in the backward pass instead.  `*_token_*` give one value a token, the others their sum or mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pegbox.core.cpu import working_dtype
from pegbox.core.errors import SettingsError, did_you_mean

MIB = 1 << 20
CHUNK_BYTES = 32 * MIB  # of logits; larger chunks are no faster once the matrix product is bound by arithmetic
TRAINED_CHUNK_BYTES = 64 * MIB  # when W trains: each chunk also passes once over its (V, D) gradient
BLOCK_BYTES = 16 * MIB  # of float32 statistics of half-precision logits on a CPU; smaller blocks only wait for threads
DEFAULT_CHUNK = 256  # tokens at once through a head of unknown width
WIDENED_BYTES = 128 * MIB  # the largest float32 copy of W made where that is the faster way to multiply
PRODUCT_BYTES = 16 * MIB  # of one slice of a half-precision product on its way into the float32 gradient of W

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitRule:
    """What becomes of a head's output before the softmax: `softcap * tanh(scale * z / softcap)`, or `scale * z`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# -- a matrix ----------------------------------------------------------------------------------------------------------


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias`, and its exact gradients, without ever holding all logits.

    Args:
        hidden: (N, D)
        weight: (V, D), in the dtype of `hidden` (under autocast both are cast)
        labels: (N,) class of each token, or `ignore_index`
        bias: (V,) or None
        label_smoothing: share of the target spread evenly over the vocabulary
        reduction: "sum", or "mean": the sum divided by the labelled tokens' number, or by the sum of their weights.
            Without a labelled token either is 0, with gradients of 0, so that such a batch spoils no accumulation.
        token_weights: (N,) factors of the tokens' losses, or None
        logit_scale: factor of the logits
        softcap: cap of the logits, `softcap * tanh(logits / softcap)`, or None
        chunk: tokens whose logits exist at once; chosen for about 32 MiB (64 MiB when `weight` trains) if None

    Returns:
        A scalar, float32 (float64 for float64).  It can be differentiated once.

    Raises:
        SettingsError: an unknown reduction.
    """
    _check_reduction(reduction)
    rule = LogitRule(logit_scale, softcap)
    total, _ = _run(hidden, weight, labels, bias, token_weights, rule, label_smoothing, ignore_index, chunk)
    return total if reduction == "sum" else total / _count(labels, token_weights, ignore_index).to(total.dtype)


def chunked_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The loss of each token, 0 where it has no label; arguments as in `chunked_cross_entropy`.

    One pass while `weight` and `bias` are frozen; when they train, their chunks are recomputed in the backward pass,
    since their gradients depend on what becomes of each loss.

    Returns:
        (N,), float32 (float64 for float64).
    """
    rule = LogitRule(logit_scale, softcap)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _head_token_losses(
            lambda x: F.linear(x, weight, bias), hidden, labels, rule, label_smoothing, ignore_index, chunk
        )
    return _run(hidden, weight, labels, bias, None, rule, label_smoothing, ignore_index, chunk)[1]


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log p(label) of each token, (N,), 0 where it has no label; differentiable.  See `chunked_token_losses`."""
    return -chunked_token_losses(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk=chunk,
    )


# -- any head ----------------------------------------------------------------------------------------------------------


def chunked_head_loss(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `head(hidden)`; gradients reach whatever the head holds.

    Args:
        head: (..., t, D) -> (..., t, V), each token from its own; called twice a chunk when gradients are wanted
        hidden: (..., T, D).  The leading dimensions reach the head as they are, for one whose rows differ; tokens are
            left out where no row has a label
        labels: (..., T), and so `token_weights`
        chunk: tokens whose logits exist at once, or as many as the leading dimensions make; 256 if None

    The other arguments, the result and the errors are those of `chunked_cross_entropy`.
    """
    _check_reduction(reduction)
    rule = LogitRule(logit_scale, softcap)
    losses = _head_token_losses(head, hidden, labels, rule, label_smoothing, ignore_index, chunk)
    total = losses.sum() if token_weights is None else (losses * token_weights).sum()
    return total if reduction == "sum" else total / _count(labels, token_weights, ignore_index).to(total.dtype)


def chunked_head_token_losses(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`chunked_token_losses` for any head: (..., T), 0 where a token has no label; see `chunked_head_loss`."""
    rule = LogitRule(logit_scale, softcap)
    return _head_token_losses(head, hidden, labels, rule, label_smoothing, ignore_index, chunk)


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """The same loss from logits that exist already: (N, V), (N,) -> (N,), 0 where a token has no label."""
    logits = logits.to(_statistics(logits.dtype))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")


def _head_token_losses(
    head: Head, hidden: Tensor, labels: Tensor, rule: LogitRule, smoothing: float, ignore_index: int, chunk: int | None
) -> Tensor:
    """hidden (..., T, D) and labels (..., T) to losses (..., T)."""

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        z = rule(head(x)).flatten(0, -2)  # (c, V)
        return token_losses(z, y.flatten(), ignore_index=ignore_index, label_smoothing=smoothing).view(y.shape)

    at = None
    if not torch.compiler.is_compiling():  # a compiled graph cannot depend on how many tokens have labels
        at = _labelled(labels != ignore_index)
    x, y = (hidden, labels) if at is None else (hidden.index_select(-2, at), labels.index_select(-1, at))
    step = max(1, (chunk or DEFAULT_CHUNK) // (labels[..., :1].numel() or 1))
    pairs = list(zip(x.split(step, -2), y.split(step, -1), strict=True))
    if torch.is_grad_enabled():
        parts = [checkpoint(losses_of, *pair, use_reentrant=False) for pair in pairs]
    else:
        parts = [losses_of(*pair) for pair in pairs]
    losses = torch.cat(parts, -1)
    return losses if at is None else losses.new_zeros(labels.shape).index_copy(-1, at, losses)


def _labelled(has_label: Tensor) -> Tensor:
    """The positions (k,) of (..., T) that have a label in any row."""
    return has_label.reshape(-1, has_label.shape[-1]).any(0).nonzero().squeeze(1)


# -- the pass ----------------------------------------------------------------------------------------------------------


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise SettingsError(f"unknown reduction {reduction!r}{did_you_mean(reduction, ('sum', 'mean'))}")


def _count(labels: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: labelled tokens, or the sum of their weights; 1 where that is 0."""
    labelled = labels != ignore_index
    count = labelled.sum() if token_weights is None else (token_weights.detach() * labelled).sum()
    return torch.where(count == 0, torch.ones_like(count), count)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    rule: LogitRule,
    smoothing: float,
    ignore_index: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The sum of the weighted losses, and the losses (N,); only hidden's gradient flows through the latter."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if weight.numel() * 4 <= WIDENED_BYTES:
        hidden = hidden.to(working_dtype(hidden))
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    if token_weights is not None:
        token_weights = token_weights.to(_statistics(hidden.dtype))
    if chunk is None:
        budget = TRAINED_CHUNK_BYTES if wants[1] else CHUNK_BYTES
        chunk = max(16, budget // (weight.shape[0] * hidden.element_size()))
    settings = (ignore_index, smoothing, rule.scale, rule.softcap, chunk)
    with torch.autocast(device, enabled=False):
        total, losses, *_ = _pass(hidden, weight, bias, labels, token_weights, *settings, *wants)
    return total, losses


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # total, losses, gradients of hidden, weight and bias


@torch.library.custom_op(
    "pegbox::head_cross_entropy",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? token_weights, int ignore_index, "
        "float smoothing, float scale, float? softcap, int chunk, bool wants_hidden, bool wants_weight, "
        "bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    smoothing: float,
    scale: float,
    softcap: float | None,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Outputs:
    rule = LogitRule(scale, softcap)
    grads = _Gradients.of(hidden, weight, wants_hidden, wants_weight, wants_bias)
    rows = (labels != ignore_index).nonzero().squeeze(1)  # (M,)
    losses = hidden.new_zeros(len(labels), dtype=_statistics(hidden.dtype))
    chunks = rows.chunk(-(-len(rows) // chunk)) if len(rows) else ()  # of equal size, none larger than `chunk`
    buffer = hidden.new_empty(len(chunks[0]) if chunks else 0, weight.shape[0])  # (c, V)
    for at in chunks:
        x, y, z = hidden.index_select(0, at), labels.index_select(0, at), buffer[: len(at)]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        losses.index_copy_(0, at, _losses_and_errors(z, y, rule, smoothing, grads.wanted))
        grads.add(at, x, z, weight, scale, None if token_weights is None else token_weights.index_select(0, at))
    total = losses.sum() if token_weights is None else (losses * token_weights).sum()
    return total, losses, grads.hidden, grads.weight.to(weight.dtype), grads.bias.to(weight.dtype)


@_pass.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    smoothing: float,
    scale: float,
    softcap: float | None,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Outputs:
    grads = _Gradients.of(hidden, weight, wants_hidden, wants_weight, wants_bias)
    losses = hidden.new_empty(labels.shape[0], dtype=_statistics(hidden.dtype))
    return losses.new_empty(()), losses, grads.hidden, grads.weight.to(weight.dtype), grads.bias.to(weight.dtype)


@dataclass(frozen=True)
class _Gradients:
    """Buffers of the gradients that somebody wants; the others are empty."""

    hidden: Tensor  # (N, D), per unit of each token's loss
    weight: Tensor  # (V, D), at least float32, of the weighted sum
    bias: Tensor  # (V,), likewise

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, *wants: bool) -> _Gradients:
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        dtypes = (hidden.dtype, _statistics(weight.dtype), _statistics(weight.dtype))
        like = zip(wants, shapes, dtypes, strict=True)
        return cls(*(hidden.new_zeros(shape if want else (0,), dtype=dtype) for want, shape, dtype in like))

    @property
    def wanted(self) -> bool:
        return any(g.numel() for g in (self.hidden, self.weight, self.bias))

    def add(self, at: Tensor, x: Tensor, e: Tensor, weight: Tensor, scale: float, factors: Tensor | None) -> None:
        """Add one chunk: rows `at` (c,), hidden x (c, D), errors e (c, V), token weights (c,)."""
        if self.hidden.numel():
            self.hidden.index_copy_(0, at, _times(e @ weight, scale))
        if self.weight.numel():
            _add_product(self.weight, e, _times(x, scale, factors))
        if self.bias.numel():
            one = _times(e.new_ones(len(at), 1), scale, factors)
            _add_product(self.bias[:, None], e, one)


def _times(x: Tensor, scale: float, factors: Tensor | None = None) -> Tensor:
    """x (c, D) with its rows multiplied by `scale` and `factors` (c,), in the dtype of x."""
    if factors is not None:
        return (x * (scale * factors)[:, None]).to(x.dtype)
    return x if scale == 1.0 else x * scale


def _add_product(total: Tensor, e: Tensor, x: Tensor) -> None:
    """total (V, D) += e.T @ x, for e (c, V) and x (c, D)."""
    if e.dtype == total.dtype:
        total.addmm_(e.t(), x)
        return
    step = max(1, PRODUCT_BYTES // (x.shape[1] * x.element_size()))
    for part, columns in zip(total.split(step), e.split(step, dim=1), strict=True):
        part.add_(columns.t() @ x)


def _losses_and_errors(z: Tensor, y: Tensor, rule: LogitRule, smoothing: float, wants_errors: bool) -> Tensor:
    """Losses (c,) of raw logits z (c, V), which become d loss / d (scale * logits) if that is wanted."""
    dtype = _statistics(z.dtype)
    if z.dtype == dtype:
        return _block_losses(z, y, rule, smoothing)
    step = max(1, BLOCK_BYTES // (z.shape[1] * dtype.itemsize)) if z.device.type == "cpu" else len(z)
    scratch = z.new_empty(min(step, len(z)), z.shape[1], dtype=dtype)
    losses = z.new_empty(len(z), dtype=dtype)
    for part, target, out in zip(z.split(step), y.split(step), losses.split(step), strict=True):
        block = scratch[: len(part)].copy_(part)
        out.copy_(_block_losses(block, target, rule, smoothing))
        if wants_errors:
            part.copy_(block)
    return losses


def _block_losses(z: Tensor, y: Tensor, rule: LogitRule, smoothing: float) -> Tensor:
    """Losses (c,) of one block of raw logits (c, V), which becomes the errors in place."""
    slope = None
    if rule.scale != 1.0:
        z.mul_(rule.scale)
    if rule.softcap is not None:
        z.div_(rule.softcap).tanh_()
        slope = 1.0 - z * z
        z.mul_(rule.softcap)
    at = y[:, None]
    kept = 1.0 - smoothing
    target = kept * z.gather(1, at).squeeze(1)
    if smoothing:
        target += smoothing * z.mean(1)
    top = z.amax(1)
    torch.softmax(z, 1, out=z)
    losses = top - z.amax(1).log() - target  # the largest probability is at least 1/V, so its logarithm is exact enough
    if smoothing:
        z.sub_(smoothing / z.shape[1])
    z.scatter_add_(1, at, z.new_full((), -kept).expand(at.shape))
    if slope is not None:
        z.mul_(slope)
    return losses


# -- its derivative ----------------------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)
    _, losses, *grads = output
    token_weights = inputs[4]
    ctx.save_for_backward(token_weights, losses if _trains(token_weights) else None, *grads)


def _trains(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _backward(ctx: Any, g_total: Tensor | None, g_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and token weights, given those of the total () and of the losses (N,)."""
    if torch.is_grad_enabled():
        raise RuntimeError("the chunked cross-entropy can be differentiated once; compute this loss from full logits")
    token_weights, losses, hidden, weight, bias = ctx.saved_tensors
    wants_hidden, wants_weight, wants_bias, _, wants_tokens = ctx.needs_input_grad[:5]
    g_weight = g_bias = g_tokens = None
    if g_total is not None:
        g_weight = weight * g_total if wants_weight else None
        g_bias = bias * g_total if wants_bias else None
        g_tokens = losses * g_total if wants_tokens else None
    g_hidden = _rows_times(hidden, g_total, g_losses, token_weights) if wants_hidden else None
    return (g_hidden, g_weight, g_bias, None, g_tokens, *([None] * 8))


def _rows_times(x: Tensor, g_total: Tensor | None, g_losses: Tensor | None, token_weights: Tensor | None) -> Tensor:
    """Rows of x (N, D) times what each token's loss is worth."""
    if g_total is None:
        assert g_losses is not None
        return (x * g_losses[:, None]).to(x.dtype)
    worth = g_total if token_weights is None else g_total * token_weights
    worth = worth if g_losses is None else worth + g_losses
    return x * worth if worth.ndim == 0 else (x * worth[:, None]).to(x.dtype)


_pass.register_autograd(_backward, setup_context=_remember)
