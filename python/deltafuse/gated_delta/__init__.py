"""Gated delta rule (Gated DeltaNet): operators and their references."""

from .ops import chunk_gated_delta_rule, chunk_gdn
from .reference import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]
