"""deltafuse: fused CPU and CUDA kernels for linear-attention language models."""

from . import _library, ddl, gated_delta, grape, optim
from .ddl import DDLWrapper, delta_rewrite
from .gated_delta import (
    GatedDeltaNet,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from .grape import RotaryEmbedding, apply_rotary_emb, rotary_qk
from .optim import MARS

backend_info = _library.backend_info
build_info = _library.build_info
has_cuda = _library.has_cuda
__version__ = "0.1.0"
__all__ = [
    "DDLWrapper",
    "GatedDeltaNet",
    "MARS",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "backend_info",
    "build_info",
    "chunk_gated_delta_rule",
    "ddl",
    "delta_rewrite",
    "fused_recurrent_gated_delta_rule",
    "gated_delta",
    "grape",
    "has_cuda",
    "optim",
    "rotary_qk",
]
