"""GRAPE: position encodings as group actions (arXiv 2512.07805)."""

from .ops_frame import basis_rotate, frame_rotate, mixture_rotate, rank2_rotate
from .orthogonal import cayley_basis, householder_basis
from .prepare import prepare_frame

__all__ = [
    "basis_rotate",
    "cayley_basis",
    "frame_rotate",
    "householder_basis",
    "mixture_rotate",
    "prepare_frame",
    "rank2_rotate",
]
