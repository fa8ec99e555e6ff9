"""Gated RMS norm, l2norm and the gate against their float64 references."""

import pytest
import torch
import torch.nn.functional as F

from deltafuse import _library
from deltafuse.gated_delta import fused_gdn_gate, gated_rms_norm, l2norm
from layer_cases import DTYPES, compare, normal, require_kernel, run

# rows, V: less than a vector, cut vectors, whole ones; rows in one and in several partial sums. On
# CUDA 1 to 32 lanes a row, then a warp that holds it or reads parts of it again
SHAPES = [(0, 8), (1, 3), (5, 37), (300, 16), (600, 64), (3, 1000), (9, 256), (2, 2056), (3, 1031)]


def norm_inputs(rows, V, dtype=torch.float32, device="cpu"):
    return (
        normal(rows, V, dtype=dtype).to(device),
        normal(V, dtype=dtype).to(device),
        2 * normal(rows, V, seed=1, dtype=dtype).to(device),
    )


def gate_inputs(rows, HV, dtype=torch.float32, device="cpu"):
    return (
        3 * normal(rows, HV, dtype=dtype).to(device),
        normal(HV, dtype=dtype).to(device),
        normal(HV, seed=1, dtype=dtype).to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_rms_norm(device, shape, dtype):
    x, weight, gate = norm_inputs(*shape, dtype, device)
    compare(gated_rms_norm, (x, weight, gate))
    compare(gated_rms_norm, (x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2norm(device, shape, dtype):
    compare(l2norm, (normal(*shape, dtype=dtype).to(device),))


GATES = [(0, 4), (1, 1), (15, 3), (16, 6), (1029, 5), (70, 8), (3, 1030)]


# rows, HV: heads are taken 16 rows at a time, a partial sum covers 1024 rows; on CUDA 4 heads a
# thread, more than 1024 in two blocks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATES, ids=str)
def test_gate(device, shape, dtype):
    a, A_log, dt_bias = gate_inputs(*shape, dtype, device)
    compare(fused_gdn_gate, (a, A_log, dt_bias))
    compare(fused_gdn_gate, (a, A_log))


def test_references_are_torchs():
    x, weight, gate = norm_inputs(5, 12, torch.float64)
    a, A_log, dt_bias = gate_inputs(5, 4, torch.float64)
    with _library.use("reference"):
        expected = F.rms_norm(x, (12,), weight, 1e-5) * F.silu(gate)
        torch.testing.assert_close(gated_rms_norm(x, weight, gate), expected)
        torch.testing.assert_close(l2norm(x, 0), F.normalize(x, dim=-1))
        expected = -A_log.exp() * F.softplus(a + dt_bias)
        torch.testing.assert_close(fused_gdn_gate(a, A_log, dt_bias), expected)


def test_zero_rows_and_large_gates_stay_finite(device):
    x = torch.zeros(2, 5, device=device).requires_grad_()
    ones, low = torch.ones(5, device=device), torch.full((2, 5), -200.0, device=device)
    for y in (l2norm(x), gated_rms_norm(x, ones, low)):
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.eq(0).all() and dx.isfinite().all()
    a = torch.tensor([[-1e4, -50.0, 25.0, 1e4]], device=device)
    g = fused_gdn_gate(a, torch.zeros(4, device=device))
    torch.testing.assert_close(g.cpu(), torch.tensor([[-0.0, -1.9287e-22, -25.0, -1e4]]))


def test_shapes_strides_and_dtypes(device):
    x, gate = normal(2, 7, 3, 40)[..., 4:24], normal(2, 3, 7, 20).transpose(1, 2)
    x, gate, weight = x.to(device), gate.to(device), normal(20).to(device)
    expected = gated_rms_norm(x.contiguous(), weight, gate.contiguous())
    assert torch.equal(gated_rms_norm(x, weight, gate), expected)
    assert torch.equal(l2norm(x), l2norm(x.contiguous()))
    half = gated_rms_norm(x.bfloat16(), weight, gate)  # promoted, then rounded
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, gated_rms_norm(x.bfloat16().float(), weight, gate).bfloat16())
    a, A_log = normal(2, 7, 4).bfloat16().to(device), normal(4).to(device)
    assert fused_gdn_gate(a, A_log).dtype == torch.float32
    assert fused_gdn_gate(a, A_log, output_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64], ids=str)
def test_weights_of_another_type(device, other):
    x, weight, gate = norm_inputs(9, 40, torch.bfloat16, device)
    a, A_log, dt_bias = gate_inputs(9, 4, torch.bfloat16, device)
    for function, same, mixed in (
        (gated_rms_norm, (x, weight, gate), (x, weight.to(other), gate)),
        (fused_gdn_gate, (a, A_log, dt_bias), (a, A_log.to(other), dt_bias.to(other))),
    ):
        (expected,), expected_grads = run(function, same)
        (actual,), grads = run(function, mixed)
        torch.testing.assert_close(actual, expected)
        for got, want, given in zip(grads, expected_grads, mixed, strict=True):
            assert got.dtype == given.dtype
            torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-2, atol=1e-2)


def test_eps_is_used(device):
    x = 1e-3 * normal(3, 8).to(device)
    torch.testing.assert_close(l2norm(x, 1.0), x * (x.square().sum(-1, True) + 1).rsqrt())
    expected = x * (x.square().mean(-1, True) + 1).rsqrt()
    torch.testing.assert_close(gated_rms_norm(x, torch.ones(8, device=device), eps=1.0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_instruction_sets(cpu_isa, dtype):
    compare(gated_rms_norm, norm_inputs(300, 37, dtype))
    compare(l2norm, norm_inputs(5, 37, dtype)[:1])
    compare(fused_gdn_gate, gate_inputs(37, 3, dtype))


CALLS = {
    "gated_rms_norm": (gated_rms_norm, norm_inputs(2000, 33)),
    "l2norm": (l2norm, norm_inputs(2000, 33)[:1]),
    "gate": (fused_gdn_gate, gate_inputs(5000, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_for_any_number_of_threads(name, threads):
    results = []
    for count in (1, 2, 8, 1):
        threads(count)
        outputs, grads = run(*CALLS[name])
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", CALLS)
def test_every_element_is_written(device, name, nan_filled_memory):
    function, inputs = CALLS[name]
    outputs, grads = run(function, [t[:70].to(device) for t in inputs])
    assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_and_no_second_derivative(name, threads):
    threads(1)
    function, _ = CALLS[name]
    make = gate_inputs if name == "gate" else norm_inputs
    x = [t.requires_grad_() for t in make(4, 5, torch.float64)]
    x = x[:1] if name == "l2norm" else x
    assert torch.autograd.gradcheck(function, x)
    (dx,) = torch.autograd.grad(function(*x).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of the gradient is not implemented"):
        dx.sum().backward()


def test_opcheck():
    require_kernel("gated_rms_norm_fwd")
    ops = torch.ops.deltafuse
    x, weight, gate = (t.requires_grad_() for t in norm_inputs(6, 5))
    for options in ((gate, 1e-5), (None, 1e-5)):
        torch.library.opcheck(ops.gated_rms_norm_fwd.default, (x, weight, *options))
        detached = [t if not isinstance(t, torch.Tensor) else t.detach() for t in options]
        bwd = (torch.randn(6, 5), x.detach(), weight.detach(), *detached)
        torch.library.opcheck(ops.gated_rms_norm_bwd.default, bwd)
    torch.library.opcheck(ops.l2norm_fwd.default, (x, 1e-6))
    torch.library.opcheck(ops.l2norm_bwd.default, (torch.randn(6, 5), x.detach(), 1e-6))
    for dt_bias in (weight, None):
        torch.library.opcheck(ops.gdn_gate_fwd.default, (x, weight, dt_bias))
        dt_bias = dt_bias if dt_bias is None else dt_bias.detach()
        bwd = (torch.randn(6, 5), x.detach(), weight.detach(), dt_bias)
        torch.library.opcheck(ops.gdn_gate_bwd.default, bwd)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gated_rms_norm(normal(3, 4), normal(5)), r"weight must be \[V\].*\(4,\).*\(5,\)"),
        (lambda: gated_rms_norm(normal(3, 4), normal(4), normal(4)), r"gate must be"),
        (lambda: gated_rms_norm(normal(3, 4)[:, :0], normal(4)[:0]), "last dimension"),
        (lambda: l2norm(torch.tensor(1.0)), "last dimension"),
        (lambda: fused_gdn_gate(normal(3, 4), normal(3)), r"A_log must be \[HV\]"),
        (lambda: fused_gdn_gate(normal(3, 4), normal(4), normal(3)), r"dt_bias must be \[HV\]"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_dtypes():
    for call in (
        l2norm,
        lambda x: gated_rms_norm(x, normal(4)),
        lambda x: fused_gdn_gate(x, normal(4)),
    ):
        with pytest.raises(TypeError, match="floating point"):
            call(torch.ones(3, 4, dtype=torch.int64))
