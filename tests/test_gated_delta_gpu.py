"""The gated delta rule on a GPU, where the emulator does not reach: long calls, graphs, streams."""

import pytest
import torch
import torch.nn.functional as F

from deltafuse.gated_delta import chunk_gated_delta_rule, naive_chunk_gated_delta_rule
from deltafuse.testing import assert_close, relative_error
from gated_delta_cases import Case, compare, make, offsets

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SHAPES = {
    "model": Case(T=1024, H=4, HV=8, K=128, V=128),
    "many chunks": Case(B=2, T=3000, H=2, HV=2, K=128, V=128),
    "two groups of rows": Case(B=4, T=200, H=8, HV=64, K=128, V=128),
    "K = 64": Case(B=8, T=300, H=16, HV=32, K=64, V=128),
    "K = 256": Case(T=500, H=2, HV=4, K=256, V=256),
    "packed": Case(T=2500, H=4, HV=8, K=128, V=128, lengths=(1000, 0, 1, 63, 1300, 65)),
}


def check(case, dtype):
    """Against the chunk form in float64, which is quicker than the recurrence."""
    compare(make(case, dtype, "cuda"), reference=naive_chunk_gated_delta_rule)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_large_shapes(name, dtype):
    check(SHAPES[name], dtype)


def tokens(lengths, H, HV, dtype=BF16, D=128):
    """q, k of norm 1, v, g, beta and their cu_seqlens, made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    T = sum(lengths)

    def normal(*size, dtype=dtype):
        return torch.randn(1, T, *size, generator=generator, device="cuda", dtype=dtype)

    q, k = (F.normalize(normal(H, D), dim=-1) for _ in range(2))
    g = -0.1 * normal(HV, dtype=F32).sigmoid()
    return [q, k, normal(HV, D), g, normal(HV, dtype=F32).sigmoid()], offsets(
        lengths, device="cuda"
    )


def step(inputs, cu, **options):
    """o and the gradients of a sum of o times fixed numbers; leaves are new: a capture can wait."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, _ = chunk_gated_delta_rule(*leaves, cu_seqlens=cu, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    d_o = torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype)
    return o.detach(), *torch.autograd.grad(o, leaves, d_o)


@pytest.mark.parametrize("lengths", [(2048,), (500, 100, 800)], ids=str)
def test_replayed_graph_without_synchronisation(lengths):
    """The graph is replayed with other tokens and other offsets; equal bits."""
    inputs, cu = tokens(lengths, 2, 4)
    d_o = torch.randn_like(inputs[2])

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        o, _ = chunk_gated_delta_rule(*leaves, cu_seqlens=cu)
        return o.detach(), *torch.autograd.grad(o, leaves, d_o)

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    inputs[2].normal_()
    cu[1:-1] -= 37
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


def test_offsets_beyond_two_to_the_31():
    """The last sequence's elements lie behind the 2^31st of v, o, dv; alone it has equal bits."""
    last, HV = 200, 64
    lengths = (2**31 // (HV * 128) + 100, last)
    inputs, cu = tokens(lengths, 1, HV)
    options = {"batch_invariant": True}
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, _ = chunk_gated_delta_rule(*leaves, cu_seqlens=cu, **options)
    assert o.numel() > 2**31
    d_o = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, d_o)
    alone = [x[:, -last:].clone().requires_grad_() for x in inputs]
    expected, _ = chunk_gated_delta_rule(*alone, **options)
    assert torch.equal(o[:, -last:], expected)
    for actual, one in zip(
        grads, torch.autograd.grad(expected, alone, d_o[:, -last:].contiguous()), strict=True
    ):
        assert torch.equal(actual[:, -last:], one)


def test_more_heads_than_a_grid_dimension_has_blocks():
    """HV N > 2^16, with sequences of 0 to 3 tokens; against single calls of a few of them."""
    HV, N = 64, 2048
    lengths = [n % 4 for n in range(N)]
    inputs, cu = tokens(lengths, 16, HV)
    results = step(inputs, cu, batch_invariant=True)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for n in (1, 1026, 2047):
        span = slice(ends[n] - lengths[n], ends[n])
        one = chunk_gated_delta_rule(*[x[:, span] for x in inputs], batch_invariant=True)[0]
        assert torch.equal(results[0][:, span], one)
    assert all(x.isfinite().all() for x in results)


def test_runs_on_the_current_stream():
    """On a side stream, behind a long kernel, inputs are written that the operator waits for."""
    inputs, cu = tokens((300,), 2, 4)
    expected = step(inputs, cu)
    late = [torch.empty_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        results = step(late, cu)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("lengths", [(8192,), (4096, 4000)], ids=str)
def test_split_and_whole_agree(lengths):
    """auto_cp splits few long sequences; the split is no farther from float64 than 1.1 times."""
    inputs, cu = tokens(lengths, 2, 2)
    inputs[3] *= 0.01  # or nothing of a state is left where the next segment ends
    exact = chunk_gated_delta_rule(*[x.double() for x in inputs], cu_seqlens=cu)[0]
    split, _ = chunk_gated_delta_rule(*inputs, cu_seqlens=cu)
    whole, _ = chunk_gated_delta_rule(*inputs, cu_seqlens=cu, auto_cp=False)
    assert not torch.equal(split, whole)  # or nothing was split
    assert relative_error(split, exact) <= 1.1 * relative_error(whole, exact)
    assert_close("o", split, exact, 6e-3)


def test_equal_inputs_give_equal_bits():
    lengths = (3000, 77)
    inputs, cu = tokens(lengths, 4, 8)
    first = step(inputs, cu)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs, cu), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    for _ in range(8):
        H = one_of(1, 2, 3)
        case = Case(
            T=one_of(1, 64, 65, 200, 333),
            B=one_of(1, 2, 5),
            H=H,
            HV=H * one_of(1, 2, 4),
            K=one_of(8, 40, 64, 96, 128, 200, 256),
            V=one_of(8, 33, 64, 128, 192, 256),
        )
        check(case, one_of(BF16, F16, F32))
