"""The fused boundary against the composition of its parts, and their gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ddl_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_gradients,
    boundary_inputs,
    expected,
    leaves,
    normal,
    run,
)
from deltafuse import _library, ddl
from deltafuse.testing import assert_close

# N, d, d_v: tails, whole vectors, several partial sums of the weights' gradients
SHAPES = [(0, 8, 4), (3, 7, 1), (33, 97, 3), (5, 64, 4), (2, 33, 8), (300, 24, 2), (2, 768, 4)]
NAMES = [
    "x",
    "k",
    "v_logits",
    "beta_logits",
    "read_weight",
    "norm_weight",
    "W_v",
    "b_v",
    "W_beta",
    "b_beta",
]


def unfused(x, k, v, beta, read, norm, W_v, b_v, W_beta, b_beta, v_source="input"):
    """From the single functions and torch's own norm and projections."""
    y = ddl.delta_rewrite_logits(x, k, v, beta)
    x_in = ddl.ddl_compress(y, read)
    c = F.rms_norm(x_in.to(norm.dtype), norm.shape, norm, 1e-5)
    z_v = F.linear(c if v_source == "context" else x_in.to(norm.dtype), W_v, b_v)
    z_beta = F.linear(c, W_beta, b_beta).squeeze(-1)
    return y, c.to(k.dtype), z_v, z_beta


@pytest.mark.parametrize("v_source", ["input", "context"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_8_against_float64(shape, dtypes, v_source):
    inputs = boundary_inputs(*shape, *dtypes)

    def boundary(*tensors):
        return ddl.ddl_boundary(*tensors, v_source=v_source, return_x_in=True)

    outputs, grads = run(boundary, inputs)
    exact, exact_grads = expected(boundary, inputs)
    half = [t for t in dtypes if t in (BF16, F16)]
    kind = half[0] if half else dtypes[0]
    limit = {F64: 1e-13, F32: 2e-6, BF16: 4e-3, F16: 5e-4}[kind]
    wide = F64 if dtypes[0] == F64 else F32
    assert [t.dtype for t in outputs] == [dtypes[0], dtypes[1], wide, wide, dtypes[1]]
    for i, (a, e) in enumerate(zip(outputs, exact, strict=True)):
        assert_close(f"output {i}", a, e, limit)
    assert_gradients(grads, exact_grads, kind, 4)


@pytest.mark.parametrize("v_source", ["input", "context"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", [(33, 97, 3), (5, 64, 4), (40, 48, 1)], ids=str)
def test_8_fused_equals_unfused(shape, dtype, v_source):
    inputs = boundary_inputs(*shape, dtype)
    fused = ddl.ddl_boundary(*inputs, v_source=v_source)
    parts = unfused(*inputs, v_source=v_source)
    assert torch.equal(fused[0], parts[0])  # one order of summation for both
    ulp = 2 * torch.finfo(dtype).eps
    noise = 8 * ulp if dtype != BF16 else 2**-7  # x_in is rounded between the parts
    for a, e in zip(fused[1:], parts[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=ulp, atol=noise)


@pytest.mark.parametrize("v_source", ["input", "context"])
@pytest.mark.parametrize("used", [*itertools.combinations(range(5), 1), (0, 1), (1, 3), (2, 4)])
def test_8_any_subset_of_gradients(used, v_source):
    """Outputs that nothing depends on have no gradient; the others' gradients are the same."""
    inputs = boundary_inputs(6, 9, 3, F64)

    def part(*tensors):
        outputs = ddl.ddl_boundary(*tensors, v_source=v_source, return_x_in=True)
        return tuple(outputs[i] for i in used)

    def gradients():
        tensors = leaves(inputs)
        loss = sum((t * normal(*t.shape, seed=3, dtype=F64)).sum() for t in part(*tensors))
        return torch.autograd.grad(loss, tensors, allow_unused=True)

    actual = gradients()
    with _library.use("reference"):
        wanted = gradients()
    for name, a, e in zip(NAMES, actual, wanted, strict=True):
        a = torch.zeros_like(e) if a is None and e is not None else a
        if e is None:
            assert a is None or a.eq(0).all(), name
        else:
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("v_source", ["input", "context"])
@pytest.mark.parametrize("d_v", [1, 3])
def test_2_gradcheck_of_the_boundary(d_v, v_source):
    inputs = leaves(boundary_inputs(3, 5, d_v, F64))
    assert torch.autograd.gradcheck(
        lambda *t: ddl.ddl_boundary(*t, v_source=v_source, return_x_in=True, k_eps=0.7), inputs
    )


@pytest.mark.parametrize("absent", [(4,), (5,), (6, 7), (8, 9), (7, 9), (4, 6, 7, 8, 9)], ids=str)
def test_2_gradcheck_without_some_weights(absent):
    inputs = leaves(boundary_inputs(3, 5, 2, F64))
    given = [t for i, t in enumerate(inputs) if i not in absent]

    def boundary(*tensors):
        left = iter(tensors)
        tensors = [None if i in absent else next(left) for i in range(10)]
        return tuple(t for t in ddl.ddl_boundary(*tensors) if t is not None)

    assert torch.autograd.gradcheck(boundary, given)


def test_2_gradcheck_of_head_and_tail():
    x, k, v, beta, *weights = leaves(boundary_inputs(3, 5, 2, F64))
    assert torch.autograd.gradcheck(
        lambda *t: ddl.ddl_head(*t, return_x_in=True, v_source="context"), (x, *weights)
    )
    assert torch.autograd.gradcheck(ddl.ddl_tail, (x, k, v, beta, *weights[:2]))


def test_2_gradcheck_of_two_layers_and_a_constant():
    x, k, _, beta, read, norm, *_ = leaves(boundary_inputs(3, 5, 2, F64))
    W1, w2, b1, b2 = leaves(normal(*s, dtype=F64) for s in [(4, 5), (1, 4), (4,), (1,)])

    def boundary(x, k, beta, W1, w2, b1, b2):
        gate = (W1, w2), (b1, b2)
        _, c, v, z = ddl.ddl_boundary(
            x, k, None, beta, read, norm, None, None, *gate, v_constant=2.0
        )
        assert v is None
        return c, z

    assert torch.autograd.gradcheck(boundary, (x, k, beta, W1, w2, b1, b2))
    c, z = boundary(x, k, beta, W1, w2, b1, b2)
    wanted = F.linear(torch.tanh(F.linear(c, W1, b1)), w2, b2).squeeze(-1)
    torch.testing.assert_close(z, wanted)


def test_head_and_tail_are_parts_of_the_boundary():
    x, k, v, beta, *weights = boundary_inputs(6, 20, 4)
    y, *behind = ddl.ddl_boundary(x, k, v, beta, *weights)
    for a, e in zip(ddl.ddl_head(y, *weights), behind, strict=True):
        assert torch.equal(a, e)
    assert all(map(torch.equal, ddl.ddl_tail(x, k, v, beta, *weights[:2]), (y, behind[0])))
    assert ddl.ddl_head(y.bfloat16(), *weights, out_dtype=F32)[0].dtype == F32


def test_vector_states_and_leading_dimensions():
    x, k, v, beta, *weights = boundary_inputs(6, 20, 1)
    rows = ddl.ddl_boundary(x, k, v, beta, *weights)
    batch = ddl.ddl_boundary(
        x.view(2, 3, 20), k.view(2, 3, 20), v.view(2, 3), beta.view(2, 3, 1), *weights
    )
    shapes = [(2, 3, 20), (2, 3, 20), (2, 3, 1), (2, 3)]
    assert [tuple(t.shape) for t in batch] == shapes
    assert all(torch.equal(a.reshape(e.shape), e) for a, e in zip(batch, rows, strict=True))
    vector = ddl.ddl_head(x[..., 0], None, weights[1])[0]
    assert torch.equal(vector, ddl.ddl_head(x, None, weights[1])[0])


def test_residual_is_projections_and_rewrite():
    x, k, *_, W_v, b_v, W_beta, b_beta = boundary_inputs(6, 20, 4)
    source, context = normal(6, 20, seed=1), normal(6, 20, seed=2)
    y = ddl.delta_residual(x, k, source, context, W_v, b_v, W_beta, b_beta, 1e-3, 3.0)
    v = 3 * torch.sigmoid(F.linear(source, W_v, b_v))
    beta = 2 * torch.sigmoid(F.linear(context, W_beta, b_beta))
    torch.testing.assert_close(y, ddl.delta_rewrite(x, k, v, beta, k_eps=1e-3))
    anchor = ddl.delta_residual(
        x, k, source, context, W_v, b_v, W_beta, b_beta, 1e-1, 3.0, anchor_eps=True
    )
    k_hat = k / (k.square().sum(-1, True) + 20 * 1e-2).sqrt()
    torch.testing.assert_close(anchor, ddl.delta_rewrite(x, k_hat, v, beta, normalize_k=False))


def test_writing_into_a_tensor():
    x, k, v, beta = boundary_inputs(6, 20, 4)[:4]
    y = ddl.delta_rewrite(x, k, v, beta)
    out = torch.empty_like(x)
    assert ddl.delta_rewrite(x, k, v, beta, out=out) is out and torch.equal(out, y)
    strided = torch.empty(4, 20, 6).permute(2, 1, 0)
    assert torch.equal(ddl.delta_rewrite(x, k, v, beta, out=strided), y)
    given = x.clone()
    assert ddl.delta_rewrite_(given, k, v, beta) is given and torch.equal(given, y)
    with pytest.raises(RuntimeError, match="no gradient"):
        ddl.delta_rewrite_(given, k.detach().requires_grad_(), v, beta)
    weight = torch.ones_like(given, requires_grad=True)
    product = (given * weight).sum()
    ddl.delta_rewrite_(given, k, v, beta)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.no_grad():
        ddl.delta_rewrite_(given, k, v, beta)
