"""What comes too late in a vision tower to be read, by the configuration of the model that holds it.

LLaVA and its kin take the hidden states after one block of the tower, or after several; what follows the last of these
runs, and nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pegbox.anatomy.paths import ancestry, within

KEYS = ("vision_feature_layer", "vision_feature_layers")  # places among h_0 .. h_L, h_l of block l, or from the end
AFTER = ("norm.final", "pooler")  # roles of what follows a tower's blocks


def unread(model: nn.Module, found: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """Paths of blocks of vision towers, and of what follows them, that are not read.

    Args:
        found: role to paths of `model`.
    """
    modules = dict(model.named_modules())
    late: list[str] = []
    for tower in found.get("vision", ()):
        blocks = [path for path in found.get("vision.block", ()) if within(path, {tower})]
        taken = _taken(modules, tower)
        last = max((place % (len(blocks) + 1) for place in taken), default=len(blocks))
        if last < len(blocks):
            late += blocks[last:]
            late += [path for role in AFTER for path in found.get(role, ()) if within(path, {tower})]
    return frozenset(late)


def _taken(modules: Mapping[str, nn.Module], tower: str) -> list[int]:
    """Which hidden states of a tower the model above it takes; none if it does not say."""
    for place in [*reversed(ancestry(tower)), ""]:
        # Any module may have a configuration, or none: an answer, not an error.
        config = getattr(modules.get(place), "config", None)
        given = next((found for key in KEYS if (found := getattr(config, key, None)) is not None), None)
        if given is not None:
            return [given] if isinstance(given, int) else list(given)
    return []
