"""A pipeline that is killed again and again: `python killed.py ROOT`.

Makes `ROOT/whole` without a break, and `ROOT/broken` in children of this process that kill themselves, each at a later
place than the one before; the last one is left alone.  Prints the exit code of each.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # what training imports is imported once, before the children
import transformers

from pegbox.evaluate import card, export
from pegbox.pretrain import corpus, curves, instruct, run, shards, tokenizer
from pegbox.pretrain.settings import recipe
from pegbox.train import run as train_run
from pegbox.train.progress import Progress
from pegbox.train.trainer import Trainer
from pretrain import small_recipe


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(place: Any, name: str, count: int = 1) -> Callable[[], None]:
    """Kill in the place of call number `count`."""

    def arm() -> None:
        plain, calls = getattr(place, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return die() if calls == count else plain(*args, **kwargs)

        setattr(place, name, counted)

    return arm


def at_step(steps: int, step: int) -> Callable[[], None]:
    """Kill once a step of the training of so many steps is done."""

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (state.max_steps, state.global_step) == (steps, step):
            die()

    return lambda: setattr(Progress, "on_step_end", on_step_end)


PLACES: dict[str, Callable[[], None]] = {
    "texts": at_call(corpus, "_put", 50),
    "tokenizer": at_call(tokenizer, "file_hash", 1 + 2),
    "shards": at_call(shards, "_note", 2),
    "a step": at_step(8, 5),
    "a checkpoint": at_call(Trainer, "_save_rng_state", 2),
    "the model": at_call(transformers.PreTrainedTokenizerBase, "save_pretrained"),
    "the choice": at_call(instruct, "_write"),
    "a step of instruction": at_step(3, 2),
    "the adapter": at_call(train_run, "_save"),
    "the merge": at_call(export, "_save_tokenizer"),
    "its card": at_call(card, "write"),
    "the picture": at_call(curves, "draw"),
}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    small_recipe.folder(root)
    for output, arm in (("whole", None), *(("broken", arm) for arm in PLACES.values()), ("broken", None)):
        child = os.fork()
        if child == 0:
            if arm is not None:
                arm()
            run.pretrain(recipe(small_recipe.values(root / output)), root)
            sys.stdout.flush()
            os._exit(0)
        print("ended", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
