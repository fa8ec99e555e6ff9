"""Chunked gated delta rule under torch.compile, torch.export, opcheck and autocast."""

import pytest
import torch

from deltafuse import _library
from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule, ops
from deltafuse.testing import assert_close
from gated_delta_cases import CASES, FUSED, Case, exactly, make, offsets, outputs_and_gradients

CASE = Case(B=2, T=70, H=1, HV=2, K=8, V=12)
OPCHECK_CASES = {
    "plain": (CASE, False, False),
    "without_state": (CASE._replace(h0=False), False, False),
    "fused": (CASE, True, False),
    "v_first": (CASE, True, True),
    "packed": (CASES["packed"], True, False),
}


def raw_arguments(case, fused, v_first):
    """Of gated_delta_fwd, without output_final_state and save."""
    x = make(case, fused=fused)
    state = x.get("initial_state")
    if v_first:
        state = state.detach().mT.contiguous().requires_grad_()
    tensors = [x[name] for name in ("q", "k", "v", "g", "beta")]
    tensors += [state, *(x.get(name) for name in ("cu_seqlens", "A_log", "dt_bias"))]
    return *tensors, 0.3, fused, 2.0 if fused else 0.0, v_first, 64, fused, 0, False


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_forward(name, grad):
    args = raw_arguments(*OPCHECK_CASES[name])
    if not grad:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    op = _library.kernel("gated_delta_fwd", args[0]).default
    for output_final_state in (False, True):
        torch.library.opcheck(op, (*args, output_final_state, ops.NOTHING))


def test_opcheck_forward_that_saves():
    args = raw_arguments(Case(B=2, T=128, K=16, V=32), True, False)  # without padding, unspecified
    op = _library.kernel("gated_delta_fwd", args[0]).default
    torch.library.opcheck(op, (*args, True, ops.STATES))


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_backward(name):
    args = raw_arguments(*OPCHECK_CASES[name])
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    op = _library.kernel("gated_delta_fwd", args[0])
    o, ht, saved = op(*args, True, ops.STATES)
    bwd = _library.kernel("gated_delta_bwd", args[0]).default
    for d_state, of_forward in ((None, saved), (torch.randn_like(ht), None)):
        torch.library.opcheck(bwd, (torch.randn_like(o), d_state, of_forward, *args))


def loss_of(x, **options):
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True, **options)
    return (o * 2).tanh().sum() + ht.square().sum()


def gradients(function, x, **options):
    leaves = [t for t in x.values() if t.is_floating_point()]
    return torch.autograd.grad(function(x, **options), leaves)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_whole_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in (70, 33):
        x = make(CASE._replace(T=T), fused=True)
        torch.testing.assert_close(
            gradients(compiled, x, **FUSED), gradients(loss_of, x, **FUSED), rtol=1e-5, atol=1e-5
        )


def test_compile_packed_without_recompiling_for_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter, dynamic=True)
    for T in (64, 65, 100, 200):
        x = make(CASE._replace(B=1, T=T, lengths=(T // 2, T // 4)))
        torch.testing.assert_close(gradients(compiled, x), gradients(loss_of, x))
    assert counter.frame_count <= 2


def test_compile_with_a_pool_of_states():
    def step(x, pool, indices):
        o, _ = chunk_gated_delta_rule(
            **x, initial_state=pool, output_state=pool, state_indices=indices
        )
        return o + 1

    torch._dynamo.reset()
    x = {name: t.detach() for name, t in make(CASE._replace(h0=False)).items()}
    pool, indices = torch.randn(4, 2, 8, 12), torch.tensor([3, -1])
    expected_pool = pool.clone()
    expected = step(x, expected_pool, indices)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, pool, indices), expected)
    torch.testing.assert_close(pool, expected_pool)


def test_compile_changing_offsets():
    """The same graph for other lengths of the same total: offsets are read at run time."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    x = make(CASE._replace(B=1, lengths=(30, 40)))
    for lengths in ((30, 40), (1, 69), (0, 50)):
        x["cu_seqlens"] = offsets(lengths)
        torch.testing.assert_close(compiled(x), loss_of(x))
    assert counter.frame_count == 1


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

    x = make(CASE._replace(h0=False))
    args = tuple(t.detach() for t in x.values())
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Module(), args, dynamic_shapes=[{1: length}] * 5)
    longer = tuple(t.detach() for t in make(CASE._replace(h0=False, T=99)).values())
    torch.testing.assert_close(program.module()(*longer), Module()(*longer))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_q_k_v_only(compiled):
    torch._dynamo.reset()
    x = make(CASE)
    function = chunk_gated_delta_rule
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        result = outputs_and_gradients(function, x)
    assert result["o"].dtype == torch.bfloat16
    assert result["ht"].dtype == torch.float32
    rounded = exactly(x)
    for name in ("q", "k", "v"):
        rounded[name] = x[name].detach().bfloat16().double().requires_grad_()
    expected = outputs_and_gradients(naive_recurrent_gated_delta_rule, rounded)
    for name, value in expected.items():
        assert_close(name, result[name], value, 1e-2)
    # the state is far more exact than bfloat16: g and beta were not rounded
    assert_close("ht", result["ht"], expected["ht"], 5e-6)
    assert all(result["d" + name].dtype == torch.float32 for name in x)
