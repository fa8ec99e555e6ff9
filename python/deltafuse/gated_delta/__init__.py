"""Gated delta rule (Gated DeltaNet): operators, references."""

from .reference import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

__all__ = ["naive_chunk_gated_delta_rule", "naive_recurrent_gated_delta_rule"]
