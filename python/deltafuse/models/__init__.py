"""Language models built from the package's modules."""

from .config import PRESETS, ModelConfig
from .gated_delta_lm import GatedDeltaLM

__all__ = ["PRESETS", "GatedDeltaLM", "ModelConfig"]
