"""What two processes learn from pairs, and one: `torchrun --nproc-per-node 2 distributed_pairs.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

# a script of torchrun is not in the package of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

import pegbox
from pegbox.data.collate import PairCollator
from pegbox.data.encoded import EncodedPair
from pegbox.train import Trainer
from train import tiny
from train.distributed import FSDP2
from train.launch import end

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo ddp": ("dpo", {"ddp_find_unused_parameters": False}),
    "dpo fsdp2": ("dpo", FSDP2),
    "orpo ddp": ("orpo", {"ddp_find_unused_parameters": False}),
}


def pairs(count: int) -> list[EncodedPair]:
    both = zip(tiny.rows(count), tiny.rows(count, seed=1), strict=True)
    return [EncodedPair(chosen, rejected, chosen.id) for chosen, rejected in both]


def job(out: Path, objective: str, processes: int, **changes: Any) -> dict[str, Any]:
    """Six steps of sixteen pairs each; nine pairs to evaluate on, which two processes do not share evenly."""
    args = tiny.arguments(
        out, max_steps=6, per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2, **changes
    )
    trainer = Trainer(
        pegbox.tune(tiny.llama(), "lora", rank=4),
        objective,
        args,
        train_dataset=pairs(64),
        eval_dataset=pairs(9),
        data_collator=PairCollator(tiny.PAD),
    )
    trainer.train()
    measured = trainer.evaluate()
    return {"losses": tiny.losses(trainer)} | {k: measured[f"eval_{k}"] for k in ("loss", "reward_margin")}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {name: job(out / name, objective, 2, **changes) for name, (objective, changes) in JOBS.items()}
    end(found, out)


if __name__ == "__main__":
    main()
