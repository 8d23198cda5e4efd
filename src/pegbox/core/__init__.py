"""Sites, grafts, methods and tuned models: what every method plugs into.  Needs torch alone.

Names are imported when first used, so that the error tree and the settings can be had without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegbox.core.calibration import Data
    from pegbox.core.compose import Stack, Sum
    from pegbox.core.context import Context
    from pegbox.core.graft import CopyGraft, Graft, LowRankGraft, WeightGraft, low_rank_pair
    from pegbox.core.low_rank import Down, rescale
    from pegbox.core.method import Anatomy, Method, PeftLayout, Preset, Traits, by_settings
    from pegbox.core.prefix import Pairs, Place, Survey, key_shape, prefix_graft, survey
    from pegbox.core.settings import setting
    from pegbox.core.site import Base, Site
    from pegbox.core.skips import FeatureGraft, Skip, Skips
    from pegbox.core.taps import SideGraft, Tape, Taps, Trunk, tap_graft, tap_sites
    from pegbox.core.tokens import (
        VirtualTokens,
        decoder_path,
        encoder_half,
        own_embeddings,
        token_graft,
        token_peft,
        token_sites,
    )
    from pegbox.core.tuned import Tuned

_FILES = {
    "calibration": ("Data",),
    "compose": ("Stack", "Sum"),
    "context": ("Context",),
    "graft": ("CopyGraft", "Graft", "LowRankGraft", "WeightGraft", "low_rank_pair"),
    "low_rank": ("Down", "rescale"),
    "method": ("Anatomy", "Method", "PeftLayout", "Preset", "Traits", "by_settings"),
    "prefix": ("Pairs", "Place", "Survey", "key_shape", "prefix_graft", "survey"),
    "settings": ("setting",),
    "site": ("Base", "Site"),
    "skips": ("FeatureGraft", "Skip", "Skips"),
    "taps": ("SideGraft", "Tape", "Taps", "Trunk", "tap_graft", "tap_sites"),
    "tokens": (
        "VirtualTokens",
        "decoder_path",
        "encoder_half",
        "own_embeddings",
        "token_graft",
        "token_peft",
        "token_sites",
    ),
    "tuned": ("Tuned",),
}
_WHERE = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "Anatomy",
    "Base",
    "Context",
    "CopyGraft",
    "Data",
    "Down",
    "FeatureGraft",
    "Graft",
    "LowRankGraft",
    "Method",
    "Pairs",
    "PeftLayout",
    "Place",
    "Preset",
    "SideGraft",
    "Site",
    "Skip",
    "Skips",
    "Stack",
    "Sum",
    "Survey",
    "Tape",
    "Taps",
    "Traits",
    "Trunk",
    "Tuned",
    "VirtualTokens",
    "WeightGraft",
    "by_settings",
    "decoder_path",
    "encoder_half",
    "key_shape",
    "low_rank_pair",
    "own_embeddings",
    "prefix_graft",
    "rescale",
    "setting",
    "survey",
    "tap_graft",
    "tap_sites",
    "token_graft",
    "token_peft",
    "token_sites",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pegbox.core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pegbox.core.{_WHERE[name]}"), name)
