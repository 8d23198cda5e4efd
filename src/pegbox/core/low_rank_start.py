"""The factors of a low-rank update, and where they start.

    W' = W + s (B A - B_0 A_0)        A: (r, in)   B: (out, r)

`default`, `gaussian`: B starts at zero, and there is no B_0 A_0.
`pissa`:   Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024), arXiv:2404.02948.
           W = U S V^T;  B = U_r (S_r / s)^1/2,  A = (S_r / s)^1/2 V_r^T
`olora`:   Orthonormal Low-Rank Adaptation (Büyükakyüz, 2024), arXiv:2406.01775.
           W = Q R;  B = Q_r,  A = R_r

The latter two take A and B from W itself and, in their authors' code and HF PEFT's, take s B_0 A_0 out of the base.
Here the base stays as it is, and the frozen A_0 and B_0 stand beside A and B.  The change is computed as

    B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)

which is zero to the last bit at the start, and no difference of large numbers in low precision later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.core.errors import SettingsError
from pegbox.core.graft import check_rank, low_rank_pair
from pegbox.core.method import Method
from pegbox.core.settings import setting
from pegbox.core.site import Site

PEFT_FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
PEFT_FIXED = {
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
# the others take something out of the base that the file does not hold, or draw it anew: `loftq`, `pissa_niter_N`
PEFT_STARTS = (True, False, "gaussian", "orthogonal", "eva", "pissa", "olora")

# what `peft_loads_ours` meets where the factors start from W
PEFT_TRAINS_ALL = "PEFT loads A_0 and B_0 as part of one LoRA, and so gives them gradients; here they are frozen"


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """The settings of LoRA and what is built on it, and how HF PEFT's files hold its factors."""

    rank: int = setting(16, "rank of the update: rows of A, columns of B", at_least=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    start: Literal["default", "gaussian", "pissa", "olora"] = setting(
        "default", "A drawn uniform or normal and B = 0, or both from W's largest singular values, or from its QR"
    )
    niter: int | None = setting(None, "for pissa: iterations of a fast, drawn SVD; the exact one if none", at_least=0)

    @property
    def factor(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def from_base(self) -> bool:
        """Whether the factors start from W itself."""
        return self.start in ("pissa", "olora")

    def size(self, site: Site) -> int | None:
        return self.rank * sum(site.shape)

    # HF PEFT's files hold such a start as the LoRA of twice the rank that it is: [A; A_0], [B, -B_0].

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        if not self.from_base:
            return {}
        return {"r": 2 * self.rank, "lora_alpha": self.alpha * (math.sqrt(2) if self.rslora else 2)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        start = config.get("init_lora_weights")
        return {"start": start} if start in ("pissa", "olora") else {}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.from_base:
            return dict(tensors)
        kept = dict(tensors)
        a0, b0 = kept.pop("a0"), kept.pop("b0")
        return kept | {"a": torch.cat([kept["a"], a0]), "b": torch.cat([kept["b"], -b0], dim=1)}

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.from_base or not {"a", "b"} <= tensors.keys():
            return dict(tensors)
        a, b = tensors["a"], tensors["b"]
        if len(a) == self.rank:  # PEFT's unconverted file: it too takes A_0 and B_0 from the base
            return {**tensors, "a0": own["a0"], "b0": own["b0"]}
        parts = {"a": a[: self.rank], "a0": a[self.rank :], "b": b[:, : self.rank], "b0": -b[:, self.rank :]}
        return {**tensors, **parts}


class StartedFactors(nn.Module):
    """Holds A and B, and A_0 and B_0 where they start from W."""

    a0: Tensor | None
    b0: Tensor | None

    def start(self, site: Site, method: LowRankMethod) -> None:
        """Make the factors.

        Raises:
            SettingsError: a rank above what the site's matrix can have, or `niter` for another start than pissa.
        """
        if method.niter is not None and method.start != "pissa":
            raise SettingsError(f"niter is of start='pissa', and start is {method.start!r}")
        a0, b0 = _of_base(site, method) if method.from_base else (None, None)
        self.register_buffer("a0", a0)
        self.register_buffer("b0", b0)
        if a0 is not None and b0 is not None:
            self.a, self.b = nn.Parameter(a0.clone()), nn.Parameter(b0.clone())
            return
        self.a, self.b = low_rank_pair(site, method.rank)
        if method.start == "gaussian":
            nn.init.normal_(self.a, std=1 / method.rank)

    def difference(self) -> tuple[Tensor, Tensor]:
        """Factors of B A - B_0 A_0: down (r or 2r, in), up (out, r or 2r)."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], dim=1)


@torch.no_grad()
def _of_base(site: Site, method: LowRankMethod) -> tuple[Tensor, Tensor]:
    """A_0 (r, in) and B_0 (out, r) of a site's matrix."""
    check_rank(site, method.rank)
    w, r = site.read("weight").detach().float(), method.rank
    if method.start == "olora":
        q, upper = torch.linalg.qr(w)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if method.niter is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, r, niter=method.niter)
        vt = v.T
    root = (s[:r] / method.factor).sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root
