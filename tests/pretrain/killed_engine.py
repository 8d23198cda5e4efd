"""Trainings that kill themselves, each in a child of its own: `python killed_engine.py OUTPUT`, see test_engine.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what training imports is imported once, before the children
import transformers

# a script is not in the package of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from pegbox.train.progress import Progress
from pegbox.train.trainer import Trainer
from pretrain.fitting import Counting, run, settings
from pretrain.test_engine import KILLED


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def amid_step(step: int) -> None:
    Progress.on_step_end = lambda self, args, state, control, **_: die() if state.global_step == step else None


def amid_saving(step: int) -> None:
    write = Trainer._save_rng_state
    Trainer._save_rng_state = lambda self, folder: die() if self.state.global_step == step else write(self, folder)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    output = Path(sys.argv[1])
    for name, changes in KILLED.items():
        for kind, arm in (("whole", None), ("cut", (amid_step, 14)), ("cut", (amid_saving, 30)), ("cut", None)):
            child = os.fork()
            if child == 0:
                if arm is not None:
                    arm[0](arm[1])
                found = run(settings(output / f"{name}-{kind}", **changes), Counting(noisy=[22, 27]))
                torch.save(found.model.state_dict(), output / f"{name}-{kind}.pt")
                sys.stdout.flush()
                os._exit(0)
            print("ended", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
