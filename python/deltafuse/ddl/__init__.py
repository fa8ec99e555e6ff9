"""Deep Delta Learning (arXiv 2601.00417): operators along time."""

from .ops_time import ddl_compress_tc, ddl_expand, token_shift
from .reference_time import naive_compress_tc, naive_expand, naive_token_shift

__all__ = [
    "ddl_compress_tc",
    "ddl_expand",
    "naive_compress_tc",
    "naive_expand",
    "naive_token_shift",
    "token_shift",
]
