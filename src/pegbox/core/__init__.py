"""Sites, grafts, methods and tuned models: what every method plugs into.  Needs torch alone."""

from pegbox.core.compose import Stack, Sum
from pegbox.core.context import Context
from pegbox.core.graft import CopyGraft, Graft, LowRankGraft, WeightGraft, low_rank_pair
from pegbox.core.low_rank import Down, rescale
from pegbox.core.method import Anatomy, Method, PeftLayout, Traits
from pegbox.core.settings import setting
from pegbox.core.site import Base, Site
from pegbox.core.tuned import Tuned

__all__ = [
    "Anatomy",
    "Base",
    "Context",
    "CopyGraft",
    "Down",
    "Graft",
    "LowRankGraft",
    "Method",
    "PeftLayout",
    "Site",
    "Stack",
    "Sum",
    "Traits",
    "Tuned",
    "WeightGraft",
    "low_rank_pair",
    "rescale",
    "setting",
]
