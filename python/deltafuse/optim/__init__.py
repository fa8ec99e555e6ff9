"""MARS optimizers: Adam on a variance-reduced, clipped gradient (arXiv 2411.10438)."""

from .family import MARS_M, MARSAdamW, MARSLion, MARSShampoo
from .functional import mars_, mars_norm_
from .groups import split_decay_groups
from .mars import MARS
from .reference import mars_reference_

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
