"""The boundary on a GPU: CUDA graphs, no synchronisation, memory, launches, large tensors."""

import pytest
import torch

from ddl_cases import BF16, boundary_inputs, leaves
from deltafuse import ddl

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def inputs(N, d, d_v, dtype=BF16):
    return leaves(t.cuda() for t in boundary_inputs(N, d, d_v, dtype))


def step(tensors):
    """Results and gradients. Leaves are new: a capture cannot wait for the stream of older ones."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = ddl.ddl_boundary(*tensors)
    d_outputs = [torch.ones_like(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, d_outputs)]


def test_15_replayed_graph_without_synchronisation():
    tensors = inputs(70, 96, 4)
    expected = step(tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(tensors)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, results, expected))


def test_11_ten_runs_have_the_same_bits():
    tensors = inputs(3000, 768, 4)
    first = step(tensors)
    for _ in range(9):
        assert all(map(torch.equal, step(tensors), first))


def test_15_memory_is_given_back():
    tensors = inputs(1000, 768, 4)
    step(tensors)
    idle = torch.cuda.memory_allocated()
    for _ in range(50):
        step(tensors)
    assert torch.cuda.memory_allocated() == idle


def test_17_launches_and_peak_memory():
    N, d, d_v = 4096, 768, 4
    tensors = inputs(N, d, d_v)
    step(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        outputs = ddl.ddl_boundary(*tensors)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "boundary" in e.name]
    assert len(kernels) == 1
    state, c = 2 * N * d * d_v, 2 * N * d
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= state + c + 4 * (2 * d_v + 4) * N + 4096  # the allocator's rounding
    del outputs


@pytest.mark.slow
def test_10_more_than_2_to_the_31_elements():
    N, d, d_v = 2**31 // (768 * 4) + 1000, 768, 4
    if torch.cuda.mem_get_info()[0] < 5 * 2 * N * d * d_v:
        pytest.skip("not enough memory")
    last = slice(N - 5, N)
    with torch.no_grad():
        small = [t.cuda() for t in boundary_inputs(5, d, d_v, BF16)[:4]]
        x = torch.zeros(N, d, d_v, dtype=BF16, device="cuda")
        k = torch.zeros(N, d, dtype=BF16, device="cuda")
        v, beta = torch.zeros(N, d_v, device="cuda"), torch.zeros(N, device="cuda")
        for whole, part in zip((x, k, v, beta), small, strict=True):
            whole[last] = part
        y = ddl.delta_rewrite(x, k, v, beta)
        assert torch.equal(y[last], ddl.delta_rewrite(*small))


def test_gpu_and_cpu_agree():
    tensors = inputs(33, 97, 4, torch.float32)
    actual = step(tensors)
    wanted = step([t.detach().cpu().requires_grad_() for t in tensors])
    for a, e in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-5, atol=1e-4)
