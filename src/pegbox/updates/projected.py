"""AdamW whose moments live in a low-rank subspace of the gradient, plain or on weight-normalised matrices.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024 (arXiv 2403.03507), and Huang
et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", 2025 (arXiv 2412.19616).

    every `gap` steps:  L, R = first r left and right singular vectors of D      L: (r, out)   R: (r, in)
    low = L D, or D R^T, or L D R^T                                              D: (out, in), the gradient
    W <- (1 - lr decay) W - lr scale back(m / (sqrt v + eps))                    m, v: Adam's moments of `low`
    back(x) = L^T x, or x R, or L^T x R

| projection | kept at out >= in | kept at out < in |
| --- | --- | --- |
| std | R | L |
| reverse_std | L | R |
| left | L | L |
| right | R | R |
| full | both | both |

The gradient is projected in `step`, so after accumulation.  Moments are kept as they are when the subspace changes.
`eps` is added after the bias correction, as in `torch.optim.AdamW`; GaLore's code adds it before.  Vectors, and
matrices whose smaller side is at most r, are AdamW's, unscaled: there is no subspace to gain from.  A convolution's
kernel is read as (out, in * k * k).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pegbox.core.errors import MissingExtra, SettingsError
from pegbox.updates.closures import evaluated

Projection = Literal["std", "reverse_std", "left", "right", "full"]
BLOCK = 256  # values that share a scale in 8 bits; Dettmers et al., 2022, arXiv 2110.02861, use 2048, bitsandbytes 256
TINY = torch.finfo(torch.float32).tiny


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW on projected gradients.

    With `normalised`, a projected matrix is W = g V / |V|, row by row, and g and V train.  W itself stands for V, so
    there is no second copy; what is held is g (out,) with moments of its own.  After each step every row of W has the
    length g.  Decay acts on g, V having no length that counts.  g stays above or at zero; a row of zeros, which has no
    direction, takes its first length from its first step.

    Args:
        params: parameters or groups; a group may have values of its own for all that follows.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled, as AdamW's.
        rank: r, the dimension of the subspace; None for plain AdamW.
        gap: steps between two subspaces.
        scale: of a projected update, times the learning rate.
        projection: the sides that are projected, see the table above.
        normalised: train lengths and directions of rows apart.
        bits: 8 keeps the moments of matrices quantised, the second as its root, in blocks of 256.

    Raises:
        SettingsError: a value out of range.
        MissingExtra: 8 bits, and bitsandbytes is not installed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = 4,
        gap: int = 200,
        scale: float = 1.0,
        projection: Projection = "std",
        normalised: bool = False,
        bits: Literal[8, 32] = 32,
    ) -> None:
        plain = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"rank": rank, "gap": gap, "scale": scale, "projection": projection}
        super().__init__(params, plain | own | {"normalised": normalised, "bits": bits})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; the state keeps its own dtypes, which torch would make the parameters'."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                kept = state_dict["state"][i].items()
                self.state[p] = {k: v.to("cpu" if k == "step" else p.device, copy=True) for k, v in kept}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As of any optimizer; a parameter without a gradient stays as it is."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", torch.zeros(())) + 1
                    _step(p, state, group)
        return loss


def is_projected(p: Tensor, rank: int | None) -> bool:
    """Whether a parameter has a side to project: a matrix whose sides are both above the rank."""
    return rank is not None and p.ndim > 1 and min(len(p), p.numel() // max(len(p), 1)) > rank


def apart(w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of W (out, in) as that of V at V = W, orthogonal to each row (out, in), and that of g (out,).

    Of W = g V / |V|:  dg = grad . V / |V|  and  dV = g / |V| (grad - dg V / |V|), Salimans and Kingma, 2016, arXiv
    1602.07868, equation 3.  A row of zeros has the gradient of W and none of g.
    """
    unit = w / w.norm(dim=1, keepdim=True).clamp_min(TINY)
    along = (grad * unit).sum(1)
    return grad - along[:, None] * unit, along


def _check(group: dict[str, Any]) -> None:
    for name, low in (("rank", 1), ("gap", 1), ("scale", 0.0)):
        if group[name] is not None and group[name] < low:
            raise SettingsError(f"{name} must be at least {low}, got {group[name]}")
    for name, known in (("projection", get_args(Projection)), ("bits", (8, 32))):
        if group[name] not in known:
            raise SettingsError(f"{name} must be one of {', '.join(map(repr, known))}, got {group[name]!r}")
    if group["bits"] == 8 and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantised", "bits=8")


def _step(p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    grad, lr, decay = p.grad.float(), float(group["lr"]), group["weight_decay"]  # type: ignore[union-attr]
    if not is_projected(p, group["rank"]):
        bits = group["bits"] if p.ndim > 1 else 32
        p.mul_(1 - lr * decay).sub_(_adam(state, grad, group, bits=bits), alpha=lr)
    elif group["normalised"]:
        _normalised(p, grad.flatten(1), state, group)
    else:
        change = _projected(state, grad.flatten(1), group)
        p.mul_(1 - lr * decay).sub_(change.view(p.shape), alpha=lr * group["scale"])


def _normalised(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    lr, w = float(group["lr"]), p.float().flatten(1)
    if "g" not in state:
        state["g"] = w.norm(dim=1)
    grad_v, grad_g = apart(w, grad)
    v = w - lr * group["scale"] * _projected(state, grad_v, group)
    length = v.norm(dim=1)
    g = state["g"] * (1 - lr * group["weight_decay"]) - lr * _adam(state, grad_g, group, of="g_")
    state["g"] = torch.where(state["g"] > 0, g.clamp_min(0), length)
    p.copy_(((state["g"] / length.clamp_min(TINY))[:, None] * v).view(p.shape))


def _projected(state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's change of a matrix (out, in), by way of the subspace."""
    if (int(state["step"]) - 1) % group["gap"] == 0:
        state.update(_subspace(grad, group["rank"], group["projection"]))
    left, right = state.get("left"), state.get("right")
    low = grad if left is None else left @ grad
    low = low if right is None else low @ right.T
    change = _adam(state, low, group, bits=group["bits"])
    change = change if left is None else left.T @ change
    return change if right is None else change @ right


def _subspace(grad: Tensor, rank: int, projection: Projection) -> dict[str, Tensor]:
    """The projectors that are kept, `left` (r, out) and `right` (r, in), with orthonormal rows."""
    tall = len(grad) >= grad.shape[1]
    sides = {
        "std": ("right",) if tall else ("left",),
        "reverse_std": ("left",) if tall else ("right",),
        "left": ("left",),
        "right": ("right",),
        "full": ("left", "right"),
    }[projection]
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    vectors = {"left": u.T, "right": vh}
    return {side: vectors[side][:rank].clone(memory_format=torch.contiguous_format) for side in sides}


def _adam(state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], *, of: str = "", bits: int = 32) -> Tensor:
    """Take a gradient into the moments named `of`; returns the change that they give, for a learning rate of 1."""
    (b1, b2), t = group["betas"], int(state["step"])
    m, v = _read(state, f"{of}exp_avg", grad), _read(state, f"{of}exp_avg_sq", grad)
    m.lerp_(grad, 1 - b1)
    v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
    change = (m / (1 - b1**t)).div_((v.sqrt() / math.sqrt(1 - b2**t)).add_(group["eps"]))
    _write(state, f"{of}exp_avg", m, bits)
    _write(state, f"{of}exp_avg_sq", v, bits)
    return change


@functools.cache
def _code(signed: bool) -> Tensor:
    """The 256 values that eight bits stand for."""
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map(signed=signed)
    return code


def _read(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A moment in float32; zeros before the first step."""
    if name not in state:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    if f"{name}_absmax" not in state:
        return state[name]
    from bitsandbytes.functional import dequantize_blockwise

    second = name.endswith("_sq")
    code, absmax = _code(not second).to(like.device), state[f"{name}_absmax"]
    value: Tensor = dequantize_blockwise(state[name], absmax=absmax, code=code, blocksize=BLOCK)
    return value.square_() if second else value


def _write(state: dict[str, Tensor], name: str, value: Tensor, bits: int) -> None:
    """Keep a moment; of the second in 8 bits the root, whose range is half as wide in powers of ten."""
    if bits == 32:
        state[name] = value
        return
    from bitsandbytes.functional import quantize_blockwise

    second = name.endswith("_sq")
    code = _code(not second).to(value.device)
    state[name], kept = quantize_blockwise(value.sqrt() if second else value, code=code, blocksize=BLOCK)
    state[f"{name}_absmax"] = kept.absmax
