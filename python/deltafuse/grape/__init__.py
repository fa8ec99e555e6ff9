"""GRAPE: position encodings as group actions (arXiv 2512.07805)."""

from .cache import GrapeCache
from .frequencies import rotary_frequencies
from .nn import GrapeM, GrapeMContext, GrapeMixture
from .nn_rotary import RotaryEmbedding
from .ops_frame import basis_rotate, frame_rotate, mixture_rotate, rank2_rotate
from .ops_phase import cumulative_phase
from .ops_rotary import apply_rotary_emb, apply_rotary_pos_emb, rotary_qk
from .orthogonal import cayley_basis, householder_basis
from .prepare import prepare_frame

__all__ = [
    "GrapeCache",
    "GrapeM",
    "GrapeMContext",
    "GrapeMixture",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_pos_emb",
    "basis_rotate",
    "cayley_basis",
    "cumulative_phase",
    "frame_rotate",
    "householder_basis",
    "mixture_rotate",
    "prepare_frame",
    "rank2_rotate",
    "rotary_frequencies",
    "rotary_qk",
]
