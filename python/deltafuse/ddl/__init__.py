"""Deep Delta Learning: the rank-1 residual operator and what surrounds it."""

from .ops import (
    cc_weight,
    ddl_compress,
    ddl_compress_cc,
    delta_residual,
    delta_rewrite,
    delta_rewrite_,
    delta_rewrite_logits,
)
from .ops_boundary import ddl_boundary, ddl_head, ddl_tail
from .ops_time import ddl_compress_tc, ddl_expand, token_shift
from .reference_time import naive_compress_tc, naive_expand, naive_token_shift

__all__ = [
    "cc_weight",
    "ddl_boundary",
    "ddl_compress",
    "ddl_compress_cc",
    "ddl_compress_tc",
    "ddl_expand",
    "ddl_head",
    "ddl_tail",
    "delta_residual",
    "delta_rewrite",
    "delta_rewrite_",
    "delta_rewrite_logits",
    "naive_compress_tc",
    "naive_expand",
    "naive_token_shift",
    "token_shift",
]
