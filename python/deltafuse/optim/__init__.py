"""MARS optimizers: Adam on a variance-reduced, clipped gradient (arXiv 2411.10438)."""

from .family import MARS_M, MARSAdamW, MARSLion, MARSShampoo
from .functional import mars_, mars_norm_, mars_reference_
from .groups import split_decay_groups
from .mars import MARS

__all__ = [
    "MARS",
    "MARS_M",
    "MARSAdamW",
    "MARSLion",
    "MARSShampoo",
    "mars_",
    "mars_norm_",
    "mars_reference_",
    "split_decay_groups",
]
