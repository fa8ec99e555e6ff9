"""Gated delta rule (Gated DeltaNet): operators and their references."""

from .context_parallel import ContextParallel
from .nn import GatedDeltaNet, GatedDeltaNetCache, GatedRMSNorm, ShortConvolution
from .ops import chunk_gated_delta_rule, chunk_gdn
from .ops_decode import gated_delta_rule_decode
from .ops_layer import (
    causal_conv1d,
    causal_conv1d_update,
    fused_gdn_gate,
    gated_rms_norm,
    l2norm,
)
from .ops_recurrent import (
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    gated_delta_rule_step,
)
from .reference import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

__all__ = [
    "ContextParallel",
    "GatedDeltaNet",
    "GatedDeltaNetCache",
    "GatedRMSNorm",
    "ShortConvolution",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_gdn_gate",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "gated_delta_rule_decode",
    "gated_delta_rule_step",
    "gated_rms_norm",
    "l2norm",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]
