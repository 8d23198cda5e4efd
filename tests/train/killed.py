"""Runs that kill themselves: `python killed.py SETTINGS.json`.

Reads a list of [settings, where]; does each run in a child of its own, one after the other, and prints its exit code.
`where` is null, or ["step", n]: SIGKILL once step n is done, or ["saving", n]: amid the writing of checkpoint n.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what training imports is imported once, before the children
import transformers

from pegbox.train import run_settings, train
from pegbox.train.progress import Progress
from pegbox.train.trainer import Trainer


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: list[Any] | None) -> None:
    if where is None:
        return
    kind, step = where
    if kind == "step":
        Progress.on_step_end = lambda self, args, state, control, **_: die() if state.global_step == step else None
    else:
        write = Trainer._save_rng_state
        Trainer._save_rng_state = lambda self, folder: die() if self.state.global_step == step else write(self, folder)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for settings, where in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            arm(where)
            train(run_settings(settings))
            sys.stdout.flush()
            os._exit(0)
        print("ended", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
