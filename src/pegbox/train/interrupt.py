"""Ctrl-C during training: the first saves a checkpoint and stops after the step under way, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback

CODE = 130  # a shell's code of a program ended by SIGINT


class Interrupted(SystemExit):
    """Training was stopped by Ctrl-C, and its checkpoint is saved; exits with code 130."""

    def __init__(self) -> None:
        super().__init__(CODE)


class Interrupt(TrainerCallback):
    """Inside `with`, takes SIGINT as a wish to stop; on another thread than the main one it does nothing."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again stops at once, without a checkpoint", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wanted:
            control.should_save = control.should_training_stop = True
