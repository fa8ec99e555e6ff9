"""Deep Delta Learning: the rank-1 residual operator and what surrounds it."""

from .nn import (
    DeepDeltaResidual,
    DeepDeltaResidualExpanded,
    DeepDeltaResidualVdim1,
    RMSNorm,
)
from .nn_compress import InputEmbedExpander, ResidualCompressor
from .nn_shift import ShiftLinear
from .nn_stack import DDLBlock, DDLStack
from .nn_wrapper import DDLWrapper, reset_ddl_parameters
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
from .streams import get_init_and_expand_reduce_stream_functions

__all__ = [
    "DDLBlock",
    "DDLStack",
    "DDLWrapper",
    "DeepDeltaResidual",
    "DeepDeltaResidualExpanded",
    "DeepDeltaResidualVdim1",
    "InputEmbedExpander",
    "RMSNorm",
    "ResidualCompressor",
    "ShiftLinear",
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
    "get_init_and_expand_reduce_stream_functions",
    "naive_compress_tc",
    "naive_expand",
    "naive_token_shift",
    "reset_ddl_parameters",
    "token_shift",
]
