"""Gated delta rule (Gated DeltaNet): operators and their references."""

from .ops import chunk_gated_delta_rule, chunk_gdn
from .ops_decode import gated_delta_rule_decode
from .ops_recurrent import (
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    gated_delta_rule_step,
)
from .reference import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "gated_delta_rule_decode",
    "gated_delta_rule_step",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]
