"""What methods go by from step to step and no adapter holds, in a checkpoint: `training_state.safetensors` beside each.

Averages of importance, say, by which ranks are cut; few methods have such a state, and the others have no such file.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from pegbox.core import Tuned, files
from pegbox.core.sharded import whole
from pegbox.train.callback import places

FILE = "training_state.safetensors"


def save_training_state(tuned: Tuned, folder: Path, *, writes: bool = True) -> None:
    """Write it for the adapters in use, into the places of these in a checkpoint.

    Args:
        writes: of a model that is sharded over processes all call this, and one writes.
    """
    for name, place in places(tuned, folder).items():
        adapter = tuned.adapter(name)
        state = {key: whole(value) for key, value in adapter.method.training_state(adapter).items()}
        if state and writes:
            save_file({key: value.cpu().clone().contiguous() for key, value in state.items()}, place / FILE)


def load_training_state(tuned: Tuned, folder: Path) -> None:
    """Put what a checkpoint holds into the methods, after their adapters.

    Raises:
        AdapterError: a file of it is damaged.
    """
    for name, place in places(tuned, folder).items():
        if (place / FILE).is_file():
            adapter = tuned.adapter(name)
            adapter.method.load_training_state(adapter, files.read_tensors(place / FILE)[1])
