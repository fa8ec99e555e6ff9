"""GRAPE position encodings (arXiv 2512.07805): rotations of q and k."""

from .frequencies import rotary_frequencies
from .ops_phase import cumulative_phase
from .ops_rotary import apply_rotary_emb, apply_rotary_pos_emb, rotary_qk

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_pos_emb",
    "cumulative_phase",
    "rotary_frequencies",
    "rotary_qk",
]
