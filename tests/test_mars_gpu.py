"""MARS on a GPU: CUDA graphs, no synchronisation, memory, agreement with the CPU kernels."""

import pytest
import torch

from deltafuse import MARS
from test_mars import LR, assert_close, assert_same, everything, gradients, parameters, train

SHAPES = [(37, 53), (1025,), (), (300, 401), (64, 16)]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
OPTIONS = {
    "defaults": {},
    "global clip": {"clip_scope": "global"},
    "cautious lion": {"mars_type": "mars-lion", "caution": "mean"},
    "8 bits": {"state_bits": 8},
    "matrices": {"mars_type": "mars-m", "ns_dtype": torch.float32},
    "matrices, 16 bits": {"mars_type": "mars-m"},
}


def on_gpu(params):
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def feed(params, step):
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g.cuda()


@pytest.mark.parametrize("name", ["defaults", "global clip", "cautious lion"])
def test_gpu_and_cpu_take_the_same_step(name):
    params = parameters(shapes=SHAPES)
    twins = on_gpu(params)
    train(params, MARS(params, lr=LR, **OPTIONS[name]), 5)
    optimizer = MARS(twins, lr=LR, **OPTIONS[name])
    for step in range(5):
        feed(twins, step)
        optimizer.step()
    assert_close([p.cpu() for p in twins], params, torch.float32)


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_graph_is_the_eager_run_bitwise(name):
    """Twenty steps, lr and gradients changed between replays."""
    results = []
    for graphed in (False, True):
        params = on_gpu(parameters(shapes=SHAPES))
        lr = torch.tensor(LR, device="cuda")
        optimizer = MARS(params, lr=lr, **OPTIONS[name])
        feed(params, 0)
        buffers = [p.grad for p in params]
        optimizer.step()
        step = optimizer.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # captured, not run
                optimizer.step()
            step = graph.replay
        for i in range(1, 20):
            lr.fill_(LR / i)
            for buffer, g in zip(buffers, gradients(params, i), strict=True):
                buffer.copy_(g)
            step()
        results.append(everything(params, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("name", OPTIONS)
def test_step_waits_for_nothing(name):
    params = on_gpu(parameters(shapes=SHAPES))
    optimizer = MARS(params, lr=LR, **OPTIONS[name])
    feed(params, 0)
    optimizer.step()
    optimizer.grad_scale = torch.tensor(2.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_temporary_of_the_size_of_a_tensor():
    params = [torch.nn.Parameter(torch.zeros(2048, 1024, device="cuda")) for _ in range(4)]
    optimizer = MARS(params, lr=LR)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= len(params) * 2048 * 8
