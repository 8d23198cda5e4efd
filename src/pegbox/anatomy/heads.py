"""How many heads of keys and values an attention has, by the configuration of the model it is in."""

from __future__ import annotations

from torch import nn

from pegbox.anatomy.paths import ancestry
from pegbox.core.errors import TargetError

KEYS = ("num_key_value_heads", "num_attention_heads")  # transformers maps other names of the latter to it


def kv_heads(model: nn.Module, path: str) -> int:
    """Heads of keys and values of the attention that holds the module at `path`.

    In grouped-query attention they are fewer than the heads of queries, a group of which shares one of them.

    Raises:
        TargetError: no configuration above the module says.
    """
    modules = dict(model.named_modules())
    for place in [*reversed(ancestry(path)), ""]:
        # Any module may have a configuration, or none: an answer, not an error.
        config = getattr(modules.get(place), "config", None)
        counts = [getattr(config, key, None) for key in KEYS]
        if found := next((count for count in counts if isinstance(count, int)), None):
            return found
    raise TargetError(f"the number of key and value heads at {path} is not known: no configuration has {KEYS[0]}")
