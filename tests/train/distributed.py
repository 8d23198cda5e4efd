"""What two processes train, and one: `torchrun --nproc-per-node 2 distributed.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

# a script of torchrun is not in the package of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

import pegbox
from pegbox.train import Trainer
from train import tiny
from train.launch import end

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("lora", {"ddp_find_unused_parameters": False}),
    "fsdp2": ("lora", FSDP2),
    "fsdp2-full": ("full", FSDP2),
    "ddp-lisa": ("lisa", {}),
}
SETTINGS = {"lisa": {"active": 1, "period": 2}}
STEPS = 10


def job(out: Path, method: str, processes: int, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """Ten steps of sixteen rows each."""
    args = tiny.arguments(
        out,
        max_steps=STEPS,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
        **changes,
    )
    trainer = Trainer(
        pegbox.tune(tiny.llama(), method, **SETTINGS.get(method, {})),
        "causal_lm",
        args,
        train_dataset=tiny.rows(64),
        eval_dataset=tiny.rows(7),
        data_collator=tiny.COLLATE,
    )
    trainer.train(resume_from_checkpoint=resume)
    measured = trainer.evaluate()
    trainer.save_model()
    return {"losses": tiny.losses(trainer), "loss": measured["eval_loss"], "as": type(trainer.model_wrapped).__name__}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {}
    for name, (method, changes) in JOBS.items():
        found[name] = job(out / name, method, 2, **changes)
        found[f"{name} resumed"] = job(out / name, method, 2, str(out / name / "checkpoint-5"), **changes)
    end(found, out)


if __name__ == "__main__":
    main()
