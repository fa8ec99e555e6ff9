"""Deep Delta Learning under torch.compile, opcheck, checkpointing, autocast and functorch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ddl_cases import BF16, F32, boundary_inputs, leaves, normal, rewrite_inputs
from deltafuse import _library, ddl
from deltafuse.ddl import raw

ALL = raw.Options(v_logits=True, beta_logits=True, x_in=True, norm=True)


def raw_arguments(absent=(), grad=False, **options):
    """Of ddl_boundary_fwd; absent names tensors' places."""
    x, k, v, beta, *weights = boundary_inputs(5, 12, 3)
    tensors = [x, k, v, beta, None, *weights]
    tensors = [t if i not in absent else None for i, t in enumerate(tensors)]
    if grad:
        tensors = [t if t is None else t.requires_grad_() for t in tensors]
    chosen = ALL._replace(**options)
    numbers = (chosen.k_eps, chosen.norm_eps, chosen.v_scale)
    return *tensors, raw.DTYPES.index(F32), *numbers, chosen.flags(save=grad)


CASES = {
    "boundary": ((), {}),
    "from context": ((), {"v_from_context": True}),
    "head": ((1, 2, 3), {"v_logits": False, "beta_logits": False}),
    "no weights": (tuple(range(4, 11)), {"x_in": False}),
    "rewrite": (tuple(range(4, 11)), {"x_in": False, "norm": False}),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_15_opcheck_forward(name, grad):
    absent, options = CASES[name]
    op = _library.kernel("ddl_boundary_fwd", torch.empty(0)).default
    torch.library.opcheck(op, raw_arguments(absent, grad, **options))


@pytest.mark.parametrize("name", CASES)
def test_15_opcheck_backward(name):
    absent, options = CASES[name]
    *tensors, act, _, norm_eps, v_scale, flags = raw_arguments(absent, **options)
    flags |= raw.SAVE
    forward = _library.kernel("ddl_boundary_fwd", torch.empty(0))
    y, x_in, c, z_v, z_beta, saved = forward(*tensors, act, 1e-5, norm_eps, v_scale, flags)
    grads = [torch.randn_like(t) if t.numel() else None for t in (y, x_in, c, z_v, z_beta)]
    state = tensors[0] if tensors[1] is None else y
    op = _library.kernel("ddl_boundary_bwd", torch.empty(0)).default
    torch.library.opcheck(op, (*grads, state, *tensors[1:], saved, act, v_scale, flags))


def test_15_opcheck_in_place():
    x, k, v, beta = rewrite_inputs(5, 12, 3)
    op = _library.kernel("ddl_rewrite_out", torch.empty(0)).default
    torch.library.opcheck(op, (x, k, v, beta, None, torch.empty_like(x), 1e-5, 4.0, 4))


def loss_of(tensors):
    outputs = ddl.ddl_boundary(*tensors, return_x_in=True, v_source="context")
    y = ddl.delta_rewrite(outputs[0], outputs[1], outputs[2].tanh(), outputs[3].sigmoid())
    return sum((t * 2).tanh().sum() for t in (*outputs, y))


def gradients(function, tensors):
    return torch.autograd.grad(function(tensors), tensors)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_15_compile_whole_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=dynamic)
    for N in (6, 9):
        tensors = leaves(boundary_inputs(N, 20, 4))
        for a, e in zip(gradients(compiled, tensors), gradients(loss_of, tensors), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_15_compile_in_place():
    torch._dynamo.reset()
    x, k, v, beta = rewrite_inputs(5, 12, 3)
    expected = ddl.delta_rewrite(x, k, v, beta) + 1

    def step(x, k, v, beta):
        ddl.delta_rewrite_(x, k, v, beta)
        return x + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, k, v, beta), expected)


def test_15_activation_checkpointing():
    tensors = leaves(boundary_inputs(6, 20, 4))

    def kept(tensors):
        return checkpoint(lambda *t: loss_of(t), *tensors, use_reentrant=False)

    assert all(map(torch.equal, gradients(kept, tensors), gradients(loss_of, tensors)))


def test_15_autocast_changes_nothing():
    x, k, v, beta, *weights = boundary_inputs(6, 20, 4)
    k = k.to(BF16)
    plain = ddl.ddl_boundary(x, k, v, beta, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ddl.ddl_boundary(x, k, v, beta, *weights)
    assert cast[0].dtype == F32 and cast[1].dtype == BF16
    assert all(map(torch.equal, cast, plain))


def test_second_derivatives_are_refused():
    tensors = leaves(rewrite_inputs(3, 5, 2))
    (dx, *_) = torch.autograd.grad(ddl.delta_rewrite(*tensors).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the gradient is not implemented"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_one_by_one():
    batches = [torch.stack([a, b]) for a, b in zip(*two_inputs(), strict=True)]
    y = torch.vmap(ddl.delta_rewrite)(*batches)
    for i, tensors in enumerate(two_inputs()):
        assert torch.equal(y[i], ddl.delta_rewrite(*tensors))


def two_inputs():
    return [rewrite_inputs(3, 5, 2, seed=seed) for seed in (0, 1)]


def test_second_derivative_of_the_reference():
    tensors = leaves(rewrite_inputs(2, 3, 2, torch.float64))
    with _library.use("reference"):
        assert torch.autograd.gradgradcheck(ddl.delta_rewrite, tensors)


def test_memory_is_given_back():
    import gc

    def step():
        tensors = leaves(boundary_inputs(6, 20, 4))
        loss_of(tensors).backward()

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    step()
    before = alive()
    for _ in range(20):
        step()
    assert alive() <= before


def test_backends_are_listed():
    from deltafuse import backend_info

    ops = backend_info()["ops"]
    assert {"ddl_boundary_fwd", "ddl_boundary_bwd", "ddl_rewrite_out"} <= set(ops)
    assert ops["ddl_boundary_fwd"]["cpu"] == "cpu"
    assert ops["ddl_boundary_fwd"]["cuda float64"] == "reference"
    x, k, v, beta = rewrite_inputs(2, 5, 3)
    y = normal(2, 5, 3)
    with _library.use("reference"):
        assert backend_info()["ops"]["ddl_rewrite_out"]["cpu"] == "reference"
        ddl.delta_rewrite(x, k, v, beta, out=y)
    torch.testing.assert_close(y, ddl.delta_rewrite(x, k, v, beta))
