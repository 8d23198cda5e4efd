"""What two processes train from scratch, and one: `torchrun --nproc-per-node 2 distributed.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

# a script of torchrun is not in the package of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from pegbox.train.prepare import is_main
from pretrain.fitting import ROWS, Counting, run, settings
from train.launch import end

JOBS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-muon": {"train.optimizer": "muon", "train.accumulate": 2},
    "fsdp2": {"train.shard": True},
}


def job(out: Path, name: str, processes: int) -> dict[str, Any]:
    """Forty updates, one batch rejected and one gone back before; what was trained, and how well."""
    changes = JOBS[name]
    batch = ROWS // processes // changes.get("train.accumulate", 1)
    made = settings(
        out, **{"train.steps": 40, "train.batch": batch, "train.save_steps": 16, "guard.rejects": 1} | changes
    )
    found = run(made, Counting(noisy=[25, 30, 31]))
    if is_main():
        torch.save(found.model.state_dict(), out / "weights.pt")
    return {"bits": dict(found.bits), "steps": found.steps}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {name: job(out / name, name, 2) for name in JOBS}
    end(found, out)


if __name__ == "__main__":
    main()
