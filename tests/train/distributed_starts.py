"""What two processes start from that have looked at different batches: `torchrun ... distributed_starts.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# a script of torchrun is not in the package of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

import pegbox
from pegbox.train import Callback, Trainer
from train import tiny
from train.launch import end

METHODS: dict[str, dict[str, Any]] = {
    "eva": {"rank": 2, "start_settings": {"batches": 3}},
    "lora_ga": {"rank": 2},
    "diffora": {"rank": 2, "search_steps": 4},
}


def started(method: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The settings and the values of an adapter that has looked at some rows."""
    tuned = pegbox.tune(tiny.llama(), method, **METHODS[method])
    Callback(tuned).calibrate([tiny.COLLATE(tiny.rows(4, seed=4 * seed + k)) for k in range(3)])
    return tuned.method, {key: value.tolist() for key, value in tuned.adapter().own_state().items()}


def trained(out: Path, method: str) -> int:
    """Steps of a run, which the processes could not make together from different ranks."""
    trainer = Trainer(
        pegbox.tune(tiny.llama(), method, **METHODS[method]),
        "causal_lm",
        tiny.arguments(out, max_steps=2),
        train_dataset=tiny.rows(64),
        data_collator=tiny.COLLATE,
    )
    trainer.train()
    return int(trainer.state.global_step)


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for method in METHODS:
        both: list[Any] = [None, None]
        dist.all_gather_object(both, started(method, dist.get_rank()))
        found[method] = {"same": both[0] == both[1], "values": both[0][1], "settings": repr(both[0][0])}
    found["steps"] = trained(out / "eva", "eva")
    end(found, out)


if __name__ == "__main__":
    main()
