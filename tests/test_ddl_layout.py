"""Any memory layout of inputs and of incoming gradients, any number of threads, each processor."""

import pytest
import torch

from ddl_cases import BF16, F16, F32, F64, boundary_inputs, leaves, normal, rewrite_inputs
from deltafuse import _library, ddl
from deltafuse.testing import assert_close


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


def channel_first(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def odd_offset(t):
    flat = torch.empty(t.numel() + 3, dtype=t.dtype)[3:]
    return flat.copy_(t.flatten()).view(t.shape)


def wide_rows(t):
    """Whole rows, but more between them than they are long."""
    parent = torch.empty(t.shape[0], t[0].numel() + 5, dtype=t.dtype)
    parent[:, 2:-3] = t.flatten(1)
    return parent[:, 2:-3].unflatten(1, t.shape[1:])


def reversed_twice(t):
    return t.flip(0).contiguous().flip(0)


LAYOUTS = {
    "contiguous": torch.clone,
    "strided": strided,
    "channel first": channel_first,
    "odd offset": odd_offset,
    "wide rows": wide_rows,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "flipped": reversed_twice,
}
GRADIENTS = {
    **LAYOUTS,
    "expanded": lambda t: t[:1].clone().expand(t.shape),
    "one number": lambda t: t.new_full((), 0.5).expand(t.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_10_layouts(layout, gradient, dtype):
    plain = boundary_inputs(6, 20, 4, dtype)
    outputs = ddl.ddl_boundary(*leaves(plain))
    d_outputs = [GRADIENTS[gradient](normal(*t.shape).to(t.dtype)) for t in outputs[:2]]

    def gradients(tensors, d_outputs):
        results = ddl.ddl_boundary(*tensors)[:2]
        return [*results, *torch.autograd.grad(results, tensors[:4], d_outputs)]

    wanted = gradients(leaves(plain), [t.contiguous() for t in d_outputs])
    given = [(LAYOUTS[layout](t) if t.dim() > 1 else t).detach().requires_grad_() for t in plain]
    for a, e in zip(gradients(given, d_outputs), wanted, strict=True):
        assert torch.equal(a, e)


def test_10_expanded_inputs():
    x, k, v, beta = rewrite_inputs(1, 20, 4)
    many = [t.expand(5, *t.shape[1:]) for t in (x, k, v, beta)]
    y = ddl.delta_rewrite(*many)
    assert torch.equal(y, ddl.delta_rewrite(x, k, v, beta).expand_as(y))


def test_10_sum_backward():
    inputs = leaves(rewrite_inputs(5, 20, 4))
    ddl.delta_rewrite(*inputs).sum().backward()
    ones = leaves(rewrite_inputs(5, 20, 4))
    y = ddl.delta_rewrite(*ones)
    y.backward(torch.ones_like(y).contiguous())
    assert all(torch.equal(a.grad, e.grad) for a, e in zip(inputs, ones, strict=True))


def results(N=700, d=40, d_v=4, dtype=F32):
    inputs = leaves(boundary_inputs(N, d, d_v, dtype))
    outputs = ddl.ddl_boundary(*inputs, return_x_in=True)
    d_outputs = [normal(*t.shape, seed=1).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]


def test_11_same_bits_for_any_number_of_threads(threads):
    runs = []
    for count in (1, 2, 8, *[1] * 7):
        threads(count)
        runs.append(results())
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_11_a_token_does_not_depend_on_the_others(dtype):
    x, k, v, beta, *weights = boundary_inputs(70, 97, 4, dtype)
    whole = ddl.ddl_boundary(x, k, v, beta, *weights)
    for n in (0, 5, 69):
        one = ddl.ddl_boundary(*(t[n : n + 1] for t in (x, k, v, beta)), *weights)
        assert all(torch.equal(a[0], e[n]) for a, e in zip(one, whole, strict=True))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d_v", [1, 2, 3, 4, 8, 16])
def test_instruction_sets(cpu_isa, d_v, dtype):
    actual = results(40, 37, d_v, dtype)
    with _library.use("reference"):
        wanted = results(40, 37, d_v, dtype)
    limit = {F64: 1e-12, F32: 1e-5, BF16: 8e-3, F16: 2e-3}[dtype]
    for i, (a, e) in enumerate(zip(actual, wanted, strict=True)):
        assert_close(f"result {i}", a, e.double(), limit)


def test_every_element_is_written(nan_filled_memory):
    for d_v in (1, 3, 4):
        assert all(t.isfinite().all() for t in results(33, 37, d_v))
    assert ddl.ddl_compress(normal(5, 7, 3)).isfinite().all()


def test_large_states_go_past_the_caches():
    """Above 16 MB the result is stored by other instructions: the same bits."""
    x, k, v, beta = rewrite_inputs(2200, 512, 4)
    y = ddl.delta_rewrite(x, k, v, beta)
    for part in (slice(0, 3), slice(2190, 2200)):
        small = ddl.delta_rewrite(*(t[part] for t in (x, k, v, beta)))
        assert torch.equal(y[part], small)
