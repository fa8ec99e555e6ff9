"""Gated delta rule (Gated DeltaNet): operators and their references."""

from .ops import chunk_gated_delta_rule, chunk_gdn
from .ops_decode import gated_delta_rule_decode
from .reference import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "gated_delta_rule_decode",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]
