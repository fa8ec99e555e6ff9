"""Extreme values, empty inputs, and the list of bad ones."""

import pytest
import torch

from ddl_cases import BF16, F16, F32, F64, boundary_inputs, leaves, normal, rewrite_inputs
from deltafuse import _library, ddl


def finite_gradients(y, inputs):
    return all(g.isfinite().all() for g in torch.autograd.grad(y.float().sum(), inputs))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_12_nan_stays_in_its_token(dtype):
    tensors = boundary_inputs(9, 40, 4, dtype)
    clean = ddl.ddl_boundary(*tensors)
    for index, bad in ((0, float("nan")), (1, float("inf")), (2, float("nan"))):
        given = [t.clone() for t in tensors]
        given[index][5] = bad
        dirty = ddl.ddl_boundary(*given)
        keep = torch.arange(9) != 5
        for a, e in zip(dirty, clean, strict=True):
            assert torch.equal(a[keep], e[keep])
        assert dirty[0][5].isnan().any()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_12_large_logits(dtype):
    x, k, v, beta = (t.to(dtype) for t in rewrite_inputs(4, 8, 2))
    z_v = torch.tensor([[1e4, -1e4]] * 4, dtype=dtype, requires_grad=True)
    z_beta = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    y = ddl.delta_rewrite_logits(x, k, z_v, z_beta)
    limits = torch.tensor([4.0, 0.0], dtype=dtype).expand(4, 2)
    exact = torch.tensor([2.0, 0.0, 2.0, 0.0], dtype=dtype)
    assert torch.equal(y, ddl.delta_rewrite(x, k, limits, exact))
    for grad in torch.autograd.grad(y.sum(), (z_v, z_beta)):
        assert grad.eq(0).all()


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e20, 1e36])
@pytest.mark.parametrize("k_eps", [0.0, 1e-5])
def test_12_directions_of_any_size(size, k_eps):
    """Squares overflow or vanish; the result is that of float64."""
    x, k, v, beta = rewrite_inputs(5, 37, 3)
    inputs = leaves([x, size * k, v, beta])
    y = ddl.delta_rewrite(*inputs, k_eps=k_eps)
    exact = leaves(inputs, F64)
    with _library.use("reference"):
        wanted = ddl.delta_rewrite(*exact, k_eps=k_eps)
        wanted_grads = torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y.sum(), inputs)
    for i in (0, 2, 3):
        torch.testing.assert_close(grads[i].double(), wanted_grads[i], rtol=1e-4, atol=1e-5)
    largest = wanted_grads[1].abs().max()
    if largest < 1e38:
        error = (grads[1].double() - wanted_grads[1]).abs().max()
        assert error <= 1e-4 * largest or largest < 1e-30  # what is below flushes to 0


def test_12_large_states_in_bfloat16():
    x, k, v, beta = rewrite_inputs(5, 768, 4, BF16)
    inputs = leaves([1e4 * x, k, v, beta])
    y = ddl.delta_rewrite(*inputs)
    assert y.isfinite().all() and finite_gradients(y, inputs)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_12_zero_direction_without_eps(dtype):
    x, k, v, beta = rewrite_inputs(3, 9, 2, dtype)
    inputs = leaves([x, torch.zeros_like(k), v, beta])
    y = ddl.delta_rewrite(*inputs, k_eps=0.0)
    assert torch.equal(y, x)
    grads = torch.autograd.grad(y.double().square().sum(), inputs)
    assert grads[1].eq(0).all() and grads[2].eq(0).all() and grads[3].eq(0).all()


def test_subnormal_states_are_kept():
    x, k, v, beta = rewrite_inputs(3, 16, 4)
    x = x * 1e-40
    assert x.ne(0).any()
    assert torch.equal(ddl.delta_rewrite(x, k, v, torch.zeros_like(beta)), x)


def test_no_tokens():
    for shape in ((0, 8, 4), (2, 0, 8, 4)):
        x, k = torch.empty(shape), torch.empty(shape[:-1])
        v, beta = torch.empty(*shape[:-2], 4), torch.empty(shape[:-2])
        weights = leaves(boundary_inputs(1, 8, 4)[4:])
        y, c, z_v, z_beta = ddl.ddl_boundary(x, k, v, beta, *weights)
        assert [t.shape for t in (y, c, z_v, z_beta)] == [x.shape, k.shape, v.shape, beta.shape]
        for grad in torch.autograd.grad(c.sum() + z_v.sum() + z_beta.sum(), weights):
            assert grad.eq(0).all()


X, K, V, B = normal(3, 8, 4), normal(3, 8), normal(3, 4), normal(3)
R, G = normal(8, 4), normal(8)
BAD = {
    "rank": (lambda: ddl.delta_rewrite(normal(8), K, V, B), r"x \(8,\) and k \(3, 8\)"),
    "d": (lambda: ddl.delta_rewrite(X, K[:, :7], V, B), r"x \(3, 8, 4\) and k \(3, 7\)"),
    "N is not broadcast": (lambda: ddl.delta_rewrite(X, K[:1], V, B), r"k \(1, 8\)"),
    "d_v": (lambda: ddl.delta_rewrite(X, K, V[:, :3], B), r"v must have shape \(3, 4\).*\(3, 3\)"),
    "beta": (lambda: ddl.delta_rewrite(X, K, V, V), r"beta must have shape \(3,\).*got \(3, 4\)"),
    "beta_erase": (lambda: ddl.delta_rewrite(X, K, V, B, beta_erase=V), "beta_erase must have"),
    "erase twice": (
        lambda: ddl.delta_rewrite(X, K, V, B, beta_erase=B, erase=False),
        "no meaning with erase=False",
    ),
    "channels": (lambda: ddl.delta_rewrite(normal(3, 8, 17), K, normal(3, 17), B), r"1\.\.16"),
    "no features": (lambda: ddl.delta_rewrite(X[:, :0], K[:, :0], V, B), "d must be positive"),
    "k_eps": (lambda: ddl.delta_rewrite(X, K, V, B, k_eps=-1e-3), "k_eps must be at least 0"),
    "k_eps NaN": (lambda: ddl.delta_rewrite(X, K, V, B, k_eps=float("nan")), "k_eps must be"),
    "out": (lambda: ddl.delta_rewrite(X, K, V, B, out=K), "out must be the shape of x"),
    "out dtype": (lambda: ddl.delta_rewrite(X, K, V, B, out=X.half()), "expected one dtype"),
    "CC taps": (lambda: ddl.ddl_compress_cc(X, normal(8, 3), normal(4)), "K = d_v"),
    "no taps": (lambda: ddl.ddl_compress_cc(X, normal(8, 0), normal(0)), "K = d_v at least 1"),
    "weight": (lambda: ddl.ddl_compress(X, normal(7, 4)), r"\(7, 4\).*got \(3, 8, 4\)"),
    "read_weight": (lambda: ddl.ddl_tail(X, K, V, B, R.T, G), r"read_weight must be \[d, d_v\]"),
    "norm_weight": (lambda: ddl.ddl_tail(X, K, V, B, R, R), r"norm_weight must be \[d\]"),
    "norm_eps": (lambda: ddl.ddl_tail(X, K, V, B, R, G, norm_eps=-1.0), "norm_eps must be"),
    "W_v": (lambda: ddl.ddl_head(X, R, G, R), r"W_v must be \[d_v, d\]"),
    "bias alone": (lambda: ddl.ddl_head(X, R, G, None, V[0]), "b_v .* without its weight"),
    "ambiguous": (lambda: ddl.ddl_head(normal(4, 4), None, normal(4)), "give read_weight"),
    "nothing": (lambda: ddl.ddl_head(X, None, None), "one of read_weight"),
    "v_source": (
        lambda: ddl.ddl_head(X, R, G, v_source="state"),
        "v_source must be 'input' or 'context', got 'state'",
    ),
    "activation": (lambda: ddl.delta_rewrite_logits(X, K, V, B, v_activation="tanh"), "sigmoid"),
    "two v": (lambda: ddl.ddl_tail(X, K, V, B, R, G, v_constant=2.0), "exactly one of v_logits"),
    "no v": (lambda: ddl.ddl_tail(X, K, None, B, R, G), "exactly one of v_logits"),
    "two layers": (
        lambda: ddl.ddl_head(X, R, G, None, None, (normal(5, 7), normal(1, 5))),
        r"W_beta\[0\] must be \[hidden, d\]",
    ),
    "context": (
        lambda: ddl.delta_residual(X, K, K, K[:2], R.T, None, G[None], None),
        "context must be the shape of k_in",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ddl.delta_rewrite(X.long(), K, V, B), "x must be floating point"),
        (lambda: ddl.delta_rewrite(X, K.to(torch.complex64), V, B), "k must be floating point"),
        (lambda: ddl.delta_rewrite(X, K.to("meta"), V, B), "one device, got x on cpu, k on meta"),
        (lambda: ddl.ddl_head(X, R.int(), G), "read_weight must be floating point"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
