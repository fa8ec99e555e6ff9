"""What the tests of TC, EC and the token shift share: shapes, inputs, the functions."""

import torch

from deltafuse.ddl import ddl_compress_tc, ddl_expand, token_shift
from layer_cases import normal

# B, T, d, d_v, K
SHAPES = {
    "no_token": (2, 0, 5, 4, 4),
    "one_token": (3, 1, 16, 4, 4),
    "two_tokens_one_feature": (1, 2, 1, 4, 4),
    "one_tap": (2, 9, 40, 2, 1),  # no state
    "as_many_as_taps": (2, 4, 33, 1, 4),  # a plain residual stream
    "two_taps": (1, 6, 20, 8, 2),
    "three_taps": (2, 11, 12, 2, 3),
    "seven_taps_odd_channels": (1, 12, 7, 3, 7),  # more taps and channels than have fast paths
    "widest_state": (1, 5, 9, 16, 4),
    "five_channels": (2, 6, 18, 5, 4),
    "a_step_and_a_half": (1, 70, 24, 4, 4),  # a tile of 64 tokens and its neighbour
}
LARGE = {  # beyond blocks and partial sums; for the CPU alone
    "next_block": (1, 9, 140, 4, 4),  # 512 channels a block
    "next_block_odd": (1, 9, 50, 11, 5),
    "next_partial_sum": (2, 200, 16, 2, 4),
    "long": (1, 600, 9, 1, 4),
}
SHIFTS = {  # B, T, H, D
    "no_token": (2, 0, 2, 16),
    "one_token": (3, 1, 2, 16),
    "two_tokens": (1, 2, 1, 33),
    "one_element": (2, 5, 3, 1),
    "a_tile_and_one": (2, 17, 2, 64),
    "odd_head": (1, 7, 2, 100),
    "wide_head": (1, 6, 1, 300),
    "two_tiles": (1, 40, 3, 16),
}
# empty, one token, shorter than the taps; tokens behind the last one are padding
PACKED = torch.tensor([0, 0, 1, 3, 3, 21, 24])
TOKENS = 27


def tc(x, weight, read, state=None, cu_seqlens=None, **options):
    options = {"output_final_state": True, **options}
    return ddl_compress_tc(x, weight, read, cu_seqlens=cu_seqlens, initial_state=state, **options)


def ec(x, weight, state=None, cu_seqlens=None, **options):
    options = {"output_final_state": True, **options}
    dv = weight.shape[0] // x.shape[2]
    return ddl_expand(x, weight, dv, cu_seqlens=cu_seqlens, initial_state=state, **options)


def shift(x, previous, current, cache=None, cu_seqlens=None, **options):
    options = {"output_cache": True, **options}
    return token_shift(x, previous, current, cu_seqlens=cu_seqlens, cache=cache, **options)


def make_tc(shape, dtype=torch.float32, states=None, seed=0):
    B, T, d, dv, K = shape
    x = normal(B, T, d, dv, dtype=dtype, seed=seed)
    weight, read = normal(d * dv, K, dtype=dtype, seed=seed), normal(dv, dtype=dtype, seed=seed)
    return x, weight, read, normal(states or B, d * dv, K - 1, dtype=dtype, seed=seed)


def make_ec(shape, dtype=torch.float32, states=None, seed=0):
    B, T, d, dv, K = shape
    x, weight = normal(B, T, d, dtype=dtype, seed=seed), normal(d * dv, 1, K, dtype=dtype)
    return x, weight, normal(states or B, d, K - 1, dtype=dtype, seed=seed)


def make_shift(shape, dtype=torch.float32, states=None, seed=0):
    B, T, H, D = shape
    x, previous = normal(B, T, H, D, dtype=dtype), normal(B, T, H, dtype=dtype, seed=1 + seed)
    current = normal(B, T, H, dtype=dtype, seed=2 + seed)
    return x, previous, current, normal(states or B, H, D, dtype=dtype, seed=seed)


# function, inputs, one small shape, number of tensors before the state
OPS = {
    "tc": (tc, make_tc, (2, 9, 20, 4, 4), 3),
    "ec": (ec, make_ec, (2, 9, 20, 4, 4), 2),
    "shift": (shift, make_shift, (2, 9, 2, 40), 3),
}


def packed(name, dtype=torch.float32):
    """Inputs of PACKED sequences, states included."""
    _, make, shape, _ = OPS[name]
    return make((1, TOKENS, *shape[2:]), dtype, states=len(PACKED) - 1)


def piece(name, tensors, a, b):
    """The tokens [a, b) of inputs without their state."""
    if name == "shift":
        return tuple(t[:, a:b] for t in tensors)
    return tensors[0][:, a:b], *tensors[1:]
