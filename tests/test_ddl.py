"""The Delta operator against its float64 reference, and the identities that define it."""

import pytest
import torch

from ddl_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_gradients,
    assert_rounded_once,
    expected,
    leaves,
    normal,
    rewrite_inputs,
    run,
)
from deltafuse import ddl
from deltafuse.gated_delta import chunk_gated_delta_rule
from deltafuse.testing import assert_close

# N, d, d_v
SHAPES = [
    (0, 8, 4),  # no token
    (33, 1, 1),  # one feature
    (2, 3, 2),  # less than a vector
    (33, 64, 4),  # whole vectors
    (33, 97, 3),  # a tail, d_v without a fast path
    (5, 97, 8),
    (3, 40, 5),
    (2, 17, 16),  # the most channels
    (1000, 24, 1),  # several tasks
    (2, 768, 4),
    (2, 1024, 2),
    (1, 2048, 8),
    (1, 4096, 4),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_1_forward_and_backward(shape, dtypes):
    inputs = rewrite_inputs(*shape, *dtypes)

    def rewrite(*tensors):
        # with one feature and a small eps the gradient of k is what cancellation leaves of 0
        return ddl.delta_rewrite(*tensors, k_eps=0.5 if shape[1] == 1 else 1e-5)

    (y,), grads = run(rewrite, inputs)
    (exact,), exact_grads = expected(rewrite, inputs)
    assert y.dtype == dtypes[0] and [g.dtype for g in grads] == [t.dtype for t in inputs]
    assert_rounded_once(y, exact, shape[1])
    half = [t for t in dtypes if t in (BF16, F16)]
    assert_gradients(grads, exact_grads, half[0] if half else dtypes[0], 4)


def test_reference_is_the_equation():
    """Written out for one token: paper equation 2.2 with k = k~ / sqrt(|k~|^2 + eps^2)."""
    x, k, v, beta = (t[0] for t in rewrite_inputs(1, 5, 3, F64))
    k_hat = k / (k @ k + 0.25).sqrt()
    y = x + beta * torch.outer(k_hat, v - k_hat @ x)
    torch.testing.assert_close(ddl.delta_rewrite(x, k, v, beta, k_eps=0.5), y)
    torch.testing.assert_close(
        ddl.delta_rewrite(x, k, v, beta, normalize_k=False), x + beta * torch.outer(k, v - k @ x)
    )


GATES = {
    "plain": {},
    "eps 0": {"k_eps": 0.0},
    "eps 0.7": {"k_eps": 0.7},
    "as given": {"normalize_k": False},
    "write only": {"erase": False},
    "write only, eps 0.7": {"erase": False, "k_eps": 0.7},
}


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
@pytest.mark.parametrize("d_v", [1, 3, 4])
def test_2_gradcheck_of_the_rewrite(d_v, options):
    inputs = leaves(rewrite_inputs(3, 5, d_v, F64))
    assert torch.autograd.gradcheck(lambda *t: ddl.delta_rewrite(*t, **options), inputs)


@pytest.mark.parametrize("d_v", [1, 3])
def test_2_gradcheck_of_separate_gates(d_v):
    inputs = leaves([*rewrite_inputs(3, 5, d_v, F64), normal(3, seed=9, dtype=F64)])

    def separate(x, k, v, beta, beta_erase):
        return ddl.delta_rewrite(x, k, v, beta, beta_erase=beta_erase, k_eps=0.3)

    assert torch.autograd.gradcheck(separate, inputs)


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_2_gradcheck_of_logits_and_residual(activation):
    inputs = leaves(rewrite_inputs(3, 5, 2, F64))
    assert torch.autograd.gradcheck(
        lambda *t: ddl.delta_rewrite_logits(*t, v_activation=activation, v_scale=3.0), inputs
    )
    x, k = inputs[:2]
    rest = leaves(normal(*s, dtype=F64) for s in [(3, 5), (3, 5), (2, 5), (2,), (1, 5), (1,)])
    assert torch.autograd.gradcheck(
        lambda *t: ddl.delta_residual(*t, v_activation=activation), [x, k, *rest]
    )


def test_2_gradcheck_of_read_outs():
    x, weight, read = leaves([normal(4, 5, 3, dtype=F64), normal(5, 3, dtype=F64), normal(3)])
    read = read.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(ddl.ddl_compress, (x, weight))
    assert torch.autograd.gradcheck(ddl.ddl_compress, (x,))
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, causal=causal: ddl.ddl_compress_cc(*t, causal=causal), (x, weight, read)
        )


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(33, 97, 3), (5, 64, 4), (4, 20, 8), (7, 16, 1)], ids=str)
def test_3_gates_that_leave_the_state_alone(shape, dtype):
    x, k, v, beta = rewrite_inputs(*shape, dtype)
    assert torch.equal(ddl.delta_rewrite(x, k, v, torch.zeros_like(beta)), x)
    inputs = leaves([x, torch.zeros_like(k), v, beta])
    # the gradient of a zero direction is dk / k_eps: beyond float16 for the default
    y = ddl.delta_rewrite(*inputs, k_eps=0.1 if dtype == F16 else 1e-5)
    assert torch.equal(y, x)
    grads = torch.autograd.grad(y.double().square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert grads[2].eq(0).all() and grads[3].eq(0).all()


@pytest.mark.parametrize("shape", [(33, 97, 3), (5, 768, 4)], ids=str)
def test_3_special_gates(shape):
    x, k, v, beta = rewrite_inputs(*shape)
    one = torch.ones_like(beta)
    k_hat = k / (k.square().sum(-1, True) + 1e-10).sqrt()

    def readout(state):
        return torch.einsum("nd,ndv->nv", k_hat, state)

    assert (ddl.delta_rewrite(x, k, readout(x), beta) - x).abs().max() <= 1e-6
    replaced = ddl.delta_rewrite(x, k, v, one)
    bound = 1e-5 * x.flatten(1).norm(dim=1).clamp(min=1)
    assert ((readout(replaced) - v).abs().amax(-1) <= bound).all()
    twice = ddl.delta_rewrite(ddl.delta_rewrite(x, k, v, 2 * one), k, v, 2 * one)
    assert_close("reflection twice", twice, x, 1e-5)


@pytest.mark.parametrize("factor", [None, -1.0, 3.0])
def test_4_readout_error_and_directions(factor):
    x, k, v, beta = rewrite_inputs(65, 97, 4)
    beta = beta if factor is None else torch.full_like(beta, factor)
    y = ddl.delta_rewrite(x, k, v, beta, k_eps=0.5).double()
    k_hat = (k / (k.square().sum(-1, True) + 0.25).sqrt()).double()
    p, q = (torch.einsum("nd,ndv->nv", k_hat, t.double()) for t in (x, y))
    kappa = k_hat.square().sum(-1)
    torch.testing.assert_close(q - v, (1 - beta * kappa)[:, None] * (p - v), rtol=1e-5, atol=1e-5)
    unit = k_hat / k_hat.norm(dim=-1, keepdim=True)
    change = y - x
    across = change - unit[..., None] * torch.einsum("nd,ndv->nv", unit, change)[:, None]
    assert across.abs().max() <= 1e-6 * x.flatten(1).norm(dim=1).max()
    orthogonal = (
        x - unit[..., None] * torch.einsum("nd,ndv->nv", unit, x.double())[:, None]
    ).float()
    kept = ddl.delta_rewrite(orthogonal, k, torch.zeros_like(v), beta)
    assert_close("orthogonal columns", kept, orthogonal, 1e-6)


def operator_matrix(k, beta, dtype):
    """A of Y = A X, materialised: the op on the identity, v = 0."""
    d = k.shape[0]
    eye, zero = torch.eye(d, dtype=dtype), torch.zeros(d, dtype=dtype)
    return ddl.delta_rewrite(eye, k, zero, torch.tensor(beta, dtype=dtype), k_eps=0.0)


@pytest.mark.parametrize("dtype, limit", [(F64, 1e-12), (F32, 1e-5)], ids=str)
@pytest.mark.parametrize("d", [2, 5, 16])
def test_5_spectrum(d, dtype, limit):
    k = normal(d, dtype=dtype)
    for beta in (0.0, 0.3, 1.0, 1.7, 2.0, -1.0, 3.0):
        A = operator_matrix(k, beta, dtype).double()
        wanted = torch.tensor(sorted([1.0] * (d - 1) + [1 - beta]), dtype=F64)
        torch.testing.assert_close(torch.linalg.eigvalsh(A), wanted, rtol=0, atol=limit)
        torch.testing.assert_close(A.det(), wanted.prod(), rtol=0, atol=4 * limit)
        assert abs(torch.linalg.matrix_norm(A, 2) - max(1, abs(1 - beta))) <= limit
        torch.testing.assert_close(A, A.T, rtol=0, atol=limit)
    eye = torch.eye(d, dtype=F64)
    P, R = (operator_matrix(k, beta, dtype).double() for beta in (1.0, 2.0))
    torch.testing.assert_close(P @ P, P, rtol=0, atol=limit)
    torch.testing.assert_close(R.T @ R, eye, rtol=0, atol=limit)
    both = operator_matrix(k, 0.3, dtype).double() @ operator_matrix(k, 1.4, dtype).double()
    composed = operator_matrix(k, 0.3 + 1.4 - 0.3 * 1.4, dtype).double()
    torch.testing.assert_close(both, composed, rtol=0, atol=limit)


def test_6_norm_identity_and_inversion():
    x, k, v, beta = rewrite_inputs(65, 97, 4)
    y = ddl.delta_rewrite(x, k, v, beta, k_eps=0.5)
    k_hat = (k / (k.square().sum(-1, True) + 0.25).sqrt()).double()
    p = torch.einsum("nd,ndv->nv", k_hat, x.double())
    e, kappa = v - p, k_hat.square().sum(-1)
    norm = x.double().square().sum((1, 2)) + 2 * beta * (e * p).sum(-1)
    norm += beta.square() * kappa * e.square().sum(-1)
    torch.testing.assert_close(y.double().square().sum((1, 2)), norm, rtol=1e-5, atol=0)
    back = y - beta[:, None, None] * k_hat[..., None] * e[:, None]
    assert_close("inversion", back, x, 1e-6)


def test_7_forms_of_one_channel():
    x, k, v, beta = rewrite_inputs(33, 97, 1)
    dead = torch.zeros(33, 97, 3)
    wide = ddl.delta_rewrite(
        torch.cat([x, dead], -1), k, torch.cat([v, torch.zeros(33, 3)], -1), beta
    )
    y = ddl.delta_rewrite(x, k, v, beta)
    torch.testing.assert_close(wide[..., :1], y, rtol=0, atol=1e-6)
    assert wide[..., 1:].eq(0).all()
    for flat in (v, v[:, 0]):
        for gate in (beta, beta[:, None]):
            assert torch.equal(ddl.delta_rewrite(x[..., 0], k, flat, gate), y[..., 0])
    inputs = leaves([x[..., 0], k, v[:, 0], beta[:, None]])
    grads = torch.autograd.grad(ddl.delta_rewrite(*inputs).sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_7_read_outs_agree_with_convolutions():
    x, weight, read = normal(6, 10, 4), normal(10, 4), normal(4)
    for causal in (False, True):
        before = 3 if causal else 1
        padded = torch.nn.functional.pad(x, (before, 3 - before))
        conv = torch.nn.functional.conv1d(padded, weight[:, None], groups=10) @ read
        torch.testing.assert_close(ddl.ddl_compress_cc(x, weight, read, causal=causal), conv)
        linear = ddl.ddl_compress(x, ddl.cc_weight(weight, read, causal=causal))
        torch.testing.assert_close(linear, conv)
    torch.testing.assert_close(ddl.ddl_compress(x, weight), torch.einsum("ndv,dv->nd", x, weight))
    torch.testing.assert_close(ddl.ddl_compress(x), x.mean(-1))


def test_7_symmetries_and_the_write_only_control():
    x, k, v, beta = rewrite_inputs(33, 97, 4)
    y = ddl.delta_rewrite(x, k, v, beta, k_eps=0.0)
    scaled = ddl.delta_rewrite(x, 37.5 * k, v, beta, k_eps=0.0)
    torch.testing.assert_close(scaled, y, rtol=0, atol=2e-6)
    torch.testing.assert_close(ddl.delta_rewrite(x, -k, -v, beta, k_eps=0.0), y)
    inputs = leaves([x, k, v, beta])
    (dk,) = torch.autograd.grad(
        (ddl.delta_rewrite(*inputs, k_eps=0.0) * normal(33, 97, 4, seed=5)).sum(), inputs[1]
    )
    assert ((dk * k).sum(-1).abs() <= 1e-5 * dk.norm(dim=-1) * k.norm(dim=-1)).all()
    k_hat = k / (k.square().sum(-1, True) + 1e-10).sqrt()
    written = x + beta[:, None, None] * k_hat[..., None] * v[:, None]
    torch.testing.assert_close(ddl.delta_rewrite(x, k, v, beta, erase=False), written)
    same = ddl.delta_rewrite(x, k, v, beta, beta_erase=beta)
    assert torch.equal(same, ddl.delta_rewrite(x, k, v, beta))


def test_9_layers_of_rewrites_are_the_delta_rule():
    """The state over layers follows the recurrence that the chunked kernel computes over time."""
    L, d, d_v = 70, 16, 4
    k, v = normal(L, d), normal(L, d_v)
    beta = torch.rand(L, generator=torch.Generator().manual_seed(1))
    k = k / k.norm(dim=-1, keepdim=True)
    state = normal(d, d_v)
    first = state[None, None].clone()
    for layer in range(L):
        state = ddl.delta_rewrite(state, k[layer], v[layer], beta[layer], k_eps=0.0)
    q, keys, values = k[None, :, None], k[None, :, None], v[None, :, None]
    g = torch.zeros(1, L, 1)
    _, final = chunk_gated_delta_rule(
        q, keys, values, g, beta[None, :, None], initial_state=first, output_final_state=True
    )
    torch.testing.assert_close(state, final[0, 0], rtol=1e-4, atol=1e-4)
