"""The small pipeline in as many processes as there are: `torchrun in_processes.py ROOT OUTPUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from pegbox.pretrain.run import pretrain
from pegbox.pretrain.settings import recipe
from pretrain import small_recipe

root, output = map(Path, sys.argv[1:])
torch.set_num_threads(1)
values = small_recipe.values(output)
values["train"]["batch"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
pretrain(recipe(values), root)
