"""Low-rank factors that are mixed for each row of a batch by the row's task, before their product.

    y = W x + s B_t A_t x        head q of A_t = sum_k w_tqk A_kq, of B_t alike
    w_tq = sigmoid(z_tq), divided by its sum

With one task this is a weight graft like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import MethodError, SettingsError
from pegbox.core.graft import LowRankGraft, check_rank
from pegbox.core.low_rank import Down
from pegbox.core.site import Base, Site


class TaskMixtureGraft(LowRankGraft):
    """a (h, S, in / h, r), b (h, S, r, out / h) and z (T, h S), as HF PEFT keeps them.

    Args:
        tasks: T; 0 for one task without z, whose one skill has the weight 1.
        shape: h, S and r.
        scale: s.

    Attributes:
        rate: learning rate of z as a multiple of the factors'.
        sample: weights are drawn while training, from RelaxedBernoulli(z) at temperature 1.

    Raises:
        SettingsError: heads that do not divide the matrix, or a rank above what it can have.
    """

    rate = 1.0
    sample = False

    def __init__(self, site: Site, tasks: int, shape: tuple[int, int, int], scale: float, dropout: float) -> None:
        super().__init__()
        out, in_ = check_rank(site, shape[2])
        h, skills, rank = shape
        if out % h or in_ % h:
            raise SettingsError(f"heads must divide both sides of {site.path} ({out} x {in_}), got {h}")
        self.heads, self.tasks, self.scale, self.dropout = h, max(tasks, 1), scale, dropout
        bound = (in_ / h) ** -0.5  # of a linear layer's weight, a head at a time
        self.a = nn.Parameter(torch.empty(h, skills, in_ // h, rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(h, skills, rank, out // h))
        self.z = nn.Parameter(torch.empty(tasks, h * skills).uniform_(-1e-3, 1e-3)) if tasks else None
        if self.z is not None:
            self.z.requires_grad_(skills > 1)  # one skill has the weight 1, whatever z is
        self.maps = ("weight",) if self.tasks == 1 else ()

    def rates(self) -> dict[str, float]:
        return {} if self.z is None else {"z": self.rate}

    def shares(self, tasks: Tensor | None = None) -> Tensor:
        """(T, h, S), those of a head sum to 1: of all tasks, or of some."""
        if self.z is None:
            return self.a.new_ones(1, self.heads, 1)
        z = (self.z if tasks is None else self.z[tasks]).unflatten(1, (self.heads, -1))
        if self.sample and self.training:
            z = z + torch.rand_like(z).clamp(1e-6, 1 - 1e-6).logit()
        w = z.sigmoid()
        return w / w.sum(-1, keepdim=True)

    def mixed(self, tasks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A^T (T, in, r) and B^T (T, r, out) of tasks."""
        w = self.shares(tasks)
        a = torch.einsum("ths,hsir->thir", w, self.a).flatten(1, 2)
        b = torch.einsum("ths,hsro->trho", w, self.b).flatten(2)
        return a, b

    def factors(self) -> tuple[Down, Tensor, float]:
        a, b = self.mixed()
        return a[0].T, b[0].T, self.scale

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.tasks == 1:
            return super().forward(base, x)
        a, b = self.mixed(_tasks_of(base, x))  # of each row
        y = base(x)
        seen = F.dropout(x, self.dropout) if self.training and self.dropout else x
        h = torch.bmm(seen.reshape(len(x), -1, x.shape[-1]), a.to(x.dtype))  # (B, t, r)
        rows = y.reshape(len(y), -1, y.shape[-1])
        return torch.baddbmm(rows, h, (self.scale * b).to(x.dtype)).view_as(y)


def _tasks_of(base: Base, x: Tensor) -> Tensor:
    """(B,) of the rows of x; where a search has made copies of rows, of those too.

    Raises:
        MethodError: none are given, or another number of them.
    """
    given = base.site.context.read("task_ids")
    if given is None:
        raise MethodError(
            "this adapter knows several tasks, and rows must say theirs: a column task of the data, task=NAME for "
            "prompts, or in Python task_ids=..., one for each row, in the call or inside tuned.given(task_ids=...)"
        )
    tasks = torch.as_tensor(given, device=x.device).reshape(-1)
    if len(x) % len(tasks):
        raise MethodError(f"{len(tasks)} task_ids were given for the {len(x)} rows of {base.site.path}")
    return tasks.repeat_interleave(len(x) // len(tasks))
