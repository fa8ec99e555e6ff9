"""Learned rotations on a GPU: larger shapes than the emulator's, CUDA graphs, synchronisation."""

import pytest
import torch

from deltafuse import grape
from grape_frame_cases import BF16, F16, F32, check, mixture_inputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("D, r", [(64, 1), (128, 2), (128, 4), (128, 8), (64, 32), (256, 3)])
def test_large_shapes(D, r, dtype):
    inputs = mixture_inputs(2, 1025, 4, D, r, dtype=dtype, scale=1000.0)
    check(grape.mixture_rotate, [v.cuda() for v in inputs], dtype)


@pytest.mark.parametrize("r", [2, 8])
def test_a_prepared_frame_needs_no_synchronisation_and_is_captured(r):
    x, a, b, omega, t = (v.cuda() for v in mixture_inputs(1, 65, 2, 64, r, dtype=BF16))
    frame, dy = grape.prepare_frame(a, b, omega), torch.ones_like(x)

    def step():
        # new ones: a capture cannot wait for the stream of older ones
        leaves = [v.detach().requires_grad_() for v in (x, a, b, omega)]
        y = grape.mixture_rotate(*leaves, t, frame=frame)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [v.clone() for v in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
