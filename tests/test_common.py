"""csrc/common: vector math, conversions and the tile product, in every instruction set.

The test doors take numpy buffers; the truth is float64 (longdouble for float64 functions).
"""

import numpy as np
import pytest
import torch

from deltafuse import _library

pytestmark = pytest.mark.usefixtures("cpu_isa")
C = _library._C

# function: (truth in a wider type, interesting range, bound in ulp for float32 and float64)
FUNCTIONS = {
    "exp": (np.exp, (-90, 88.7), 1.5, 2),
    "log": (np.log, (1e-30, 1e30), 2, 2),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), (-80, 80), 4, 4),
    "silu": (lambda x: x / (1 + np.exp(-x)), (-80, 80), 4, 4),
    "softplus": (lambda x: np.log1p(np.exp(x)), (-80, 20), 4, 4),
}


def apply(name, x):
    y = np.empty_like(x)
    C.door_math(getattr(C.DoorFn, name), x, y)
    return y


def samples(low, high, dtype):
    rng = np.random.default_rng(0)
    if low > 0:  # log: all magnitudes
        return np.exp(rng.uniform(np.log(low), np.log(high), 20001)).astype(dtype)
    return np.concatenate([rng.uniform(low, high, 10001), rng.uniform(-1, 1, 10001)]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_within_their_bound(name, dtype):
    truth, domain, ulp32, ulp64 = FUNCTIONS[name]
    x = samples(*domain, dtype)
    wide = np.float64 if dtype == np.float32 else np.longdouble
    expected = truth(x.astype(wide))
    ulps = np.abs(apply(name, x) - expected) / np.spacing(np.abs(expected).astype(dtype))
    assert ulps.max() <= (ulp32 if dtype == np.float32 else ulp64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_at_the_edges(dtype):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1e4, 0.0, -0.0, 1e4, inf, nan], dtype=dtype)
    np.testing.assert_array_equal(apply("exp", x), np.array([0, 0, 1, 1, inf, inf, nan], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_and_softplus_at_the_edges(dtype):
    inf, nan = np.inf, np.nan
    x = np.array([0.0, 1.0, inf, -1.0, nan], dtype=dtype)
    np.testing.assert_array_equal(apply("log", x), np.array([-inf, 0, inf, nan, nan], dtype))
    x = np.array([-1e4, 25.0, 1e4, nan], dtype=dtype)
    np.testing.assert_array_equal(apply("softplus", x), np.array([0, 25, 1e4, nan], dtype))


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
def test_half_conversions_have_torchs_bits(half):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200003, dtype=np.uint32)  # every exponent, NaN included
    edges = [
        0x0,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x477FEFFF,
        0x477FF000,
        0x33000000,
        0x387FF000,
    ]
    x = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    stored, back = np.empty(x.size, np.uint16), np.empty_like(x)
    C.door_round_trip(half, x, stored, back)
    expected = torch.from_numpy(x).to(torch.float16 if half else torch.bfloat16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(stored[~nan], expected.view(torch.uint16).numpy()[~nan])
    np.testing.assert_array_equal(back[~nan], expected.float().numpy()[~nan])
    assert np.isnan(back[nan]).all()


def lanes(dtype):
    return {"scalar": 16, "avx2": 32, "avx512": 64}[C.cpu_isa()] // dtype().itemsize


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [0, 1, 2], ids=["full", "lower", "upper"])
def test_gemm_against_numpy(dtype, transposed, add, shape):
    rng = np.random.default_rng(0)
    # below, at and above the rows of a micro-kernel; whole column blocks and every rest
    for m, vectors in ((1, 7), (5, 6), (6, 5), (13, 7), (64, 6)):
        k = m if shape else 37
        n = vectors * lanes(dtype)
        a = rng.standard_normal((m, k))
        a = (a, np.tril(a), np.triu(a))[shape].astype(dtype)
        b, c = (rng.standard_normal(s).astype(dtype) for s in ((k, n), (m, n)))
        expected = a.astype(np.float64) @ b + (c if add else 0)
        stored = np.ascontiguousarray(a.T) if transposed else a
        C.door_gemm(stored, b, c, transposed=transposed, shape=shape, add=add)
        np.testing.assert_allclose(c, expected, rtol=0, atol=100 * np.finfo(dtype).eps)
