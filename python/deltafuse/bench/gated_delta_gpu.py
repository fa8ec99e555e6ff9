"""Benchmarks of the gated delta rule on a GPU: the shapes that its rivals publish, bfloat16.

K = V = 128, sequences packed by cu_seqlens, gate and l2norm computed beforehand as in the
published measurements (QwenLM/FlashQLA, benchmark_results_H200.txt), calls replayed from a CUDA
graph where an implementation can be captured. The goals are those for an H200, 0.8 times the best
published time.
"""

import importlib
import sys
from functools import partial

import torch
import torch.nn.functional as F

from .. import gated_delta
from .case import Benchmark, Case

D = 128
# q/k heads, value heads, sequences, tokens in all, tokens of the first (0: all alike), goal in ms
FORWARD = [
    (16, 64, 1, 32768, 0, 1.00), (16, 64, 8, 32768, 0, 0.67), (16, 64, 1, 8192, 0, 0.30),
    (16, 64, 8, 8192, 0, 0.19), (16, 64, 2, 16384, 12288, 0.47), (16, 64, 1, 2048, 0, 0.085),
    (16, 48, 1, 32768, 0, 0.95), (16, 48, 8, 32768, 0, 0.51), (8, 24, 1, 8192, 0, 0.20),
    (16, 32, 1, 32768, 0, 0.70), (16, 32, 8, 32768, 0, 0.35), (16, 32, 1, 8192, 0, 0.22),
    (16, 16, 1, 32768, 0, 0.40), (16, 16, 8, 32768, 0, 0.18), (32, 32, 8, 32768, 0, 0.36),
    (2, 8, 1, 32768, 0, 0.26), (2, 8, 1, 8192, 0, 0.095), (2, 8, 8, 8192, 0, 0.046),
]  # fmt: skip
BACKWARD = [
    (16, 32, 1, 32768, 0, 2.0), (16, 32, 8, 32768, 0, 1.9), (16, 32, 1, 8192, 0, 0.63),
    (16, 32, 4, 8192, 0, 0.63), (8, 16, 1, 32768, 0, 1.1), (8, 16, 8, 8192, 0, 0.4),
    (4, 8, 1, 32768, 0, 0.7), (4, 8, 1, 8192, 0, 0.26), (2, 4, 1, 32768, 0, 0.44),
]  # fmt: skip
RIVALS = {  # name: module with chunk_gated_delta_rule, and whether it trains
    "fla": ("fla.ops.gated_delta_rule", True),
    "FlashQLA": ("flash_qla", True),
    "flashinfer": ("flashinfer.gdn_prefill", False),
}
LIMITS = {"o": 6e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dg": 1e-2, "dbeta": 1e-2}


def shapes(rows):
    """A dict of integers for each row."""
    for *sizes, _ in rows:
        yield dict(zip(("H", "HV", "N", "T", "first"), sizes, strict=True))


def goal(rows, shape):
    """Seconds, or None for another shape than the published ones."""
    for *sizes, milliseconds in rows:
        if list(shape.values()) == sizes:
            return milliseconds * 1e-3
    return None


def lengths(shape):
    """Tokens of each sequence; they add up to T."""
    N, T, first = shape["N"], shape["T"], shape["first"]
    return [first, T - first] if first else [T // N] * N


def packed_inputs(shape, device):
    """(q, k, v, g, beta) with B = 1, and cu_seqlens."""
    H, HV, T = (shape[name] for name in ("H", "HV", "T"))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(1, T, *size, generator=generator, device=device)

    q, k = (F.normalize(normal(H, D), dim=-1).bfloat16() for _ in range(2))
    g, beta = F.logsigmoid(normal(HV)) / 16, normal(HV).sigmoid()
    cu = torch.tensor([0, *lengths(shape)], device=device).cumsum(0).to(torch.int32)
    return (q, k, normal(HV, D).bfloat16(), g, beta), cu


def rivals(train):
    """{name and version: bind} of installed packages; bind(inputs, cu_seqlens) -> () -> o."""
    found = {}
    for name, (module, trains) in RIVALS.items():
        if train and not trains:
            continue
        try:
            function = importlib.import_module(module).chunk_gated_delta_rule
        except ImportError:
            continue
        version = importlib.import_module(module.split(".")[0]).__version__
        bind = linear_decay if name == "flashinfer" else logarithmic
        found[f"{name} {version}"] = bind(function)
    return found


def logarithmic(function):
    """q, k, v, g, beta and cu_seqlens as we take them."""
    return lambda inputs, cu: lambda: function(*inputs, cu_seqlens=cu)[0]


def linear_decay(function):
    """flashinfer takes alpha = e^g, which is not timed, and tokens without a batch."""

    def bind(inputs, cu):
        q, k, v, g, beta = (x[0] for x in inputs)
        alpha, offsets = g.exp(), cu.long()
        return lambda: function(q, k, v, alpha, beta, cu_seqlens=offsets).unsqueeze(0)

    return bind


ours = logarithmic(gated_delta.chunk_gated_delta_rule)
reference = logarithmic(gated_delta.naive_chunk_gated_delta_rule)


def outer_heads(x, H):
    """Of [1, T, heads, ...] the heads that belong to the first and to the last of H q/k heads.

    Heads know nothing of each other, and the float64 reference takes seconds for one.
    """
    size = x.shape[2] // H
    return x if H <= 2 else torch.cat((x[:, :, :size], x[:, :, -size:]), 2)


def compared(run, tensors, H):
    """(ours, in float64) pairs of what run(bind, *tensors) returns, for `outer_heads`."""
    actual = [outer_heads(x, H) for x in run(ours, *tensors)]
    exact = run(reference, *(outer_heads(x, H).double() for x in tensors))
    return zip(actual, exact, strict=True)


def captured(prepare):
    """prepare() -> function; the function as replays of a CUDA graph.

    Both run on the graph's stream: a backward does on that of its forward. The function itself
    where it cannot be captured, or without a GPU.
    """
    if not torch.cuda.is_available():
        return prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        for _ in range(5):  # lazy set-up and tuning
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            function()
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return function
    return graph.replay


def case_of(prepare, check):
    """The timed functions: the reference only checks, a call of it takes a hundred of ours.

    A rival that cannot run a case is left out of it, and named.
    """
    timed = {"ours": captured(prepare.pop("ours"))}
    for name, function in prepare.items():
        try:
            timed[name] = captured(function)
        except Exception as error:  # whatever another package raises
            print(f"{name} does not run here: {error!r:.200}", file=sys.stderr)
    return Case(ours=timed.pop("ours"), reference=None, baselines=timed, check=check)


def forward_case(shape, device):
    inputs, cu = packed_inputs(shape, device)

    def run(bind, *tensors):
        return [bind(tensors, cu)()]

    def check():
        return [("o", *pair, LIMITS["o"]) for pair in compared(run, inputs, shape["H"])]

    binds = {"ours": ours, **rivals(train=False)}
    return case_of({name: partial(bind, inputs, cu) for name, bind in binds.items()}, check)


def backward_case(shape, device):
    """The backward alone: of a forward that has been run once."""
    inputs, cu = packed_inputs(shape, device)
    d_o = torch.randn_like(inputs[2])

    def run(bind, *tensors):
        *inputs, d_o = tensors
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(bind(leaves, cu)(), leaves, d_o)

    def alone(bind):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = bind(leaves, cu)()
        return lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)

    def check():
        names = ("dq", "dk", "dv", "dg", "dbeta")
        pairs = compared(run, (*inputs, d_o), shape["H"])
        return [(name, *pair, LIMITS[name]) for name, pair in zip(names, pairs, strict=True)]

    binds = {"ours": ours, **rivals(train=True)}
    return case_of({name: partial(alone, bind) for name, bind in binds.items()}, check)


def forward_flops(shape):
    """gated_delta.md 4.1: 3KV + 2CV + C^2/3 a token and value head, 2CK a token and q/k head."""
    C = 64
    per_value_head = 3 * D * D + 2 * C * D + C * C / 3
    return 2 * shape["T"] * (shape["HV"] * per_value_head + shape["H"] * 2 * C * D)


def forward_bytes(shape):
    """q, k, v read and o written in bfloat16, g and beta read in float32."""
    return shape["T"] * (shape["H"] * 4 * D + shape["HV"] * (4 * D + 8))


def backward_flops(shape):
    """7KV + 5CV + 5CK multiply-adds, and the states once more: 2KV + CV."""
    C = 64
    return 2 * shape["T"] * shape["HV"] * (9 * D * D + 6 * C * D + 5 * C * D)


def backward_bytes(shape):
    """v, do read, dv written; q, k read, dq, dk written; T' as a pair; S_0 written and read."""
    C = 64
    per_value_head = 6 * D + 4 * C + 4 * D * D / C + 16
    return shape["T"] * (shape["HV"] * per_value_head + shape["H"] * 8 * D)


REFERENCE = "chunk form in PyTorch, packed sequences (naive_chunk_gated_delta_rule)"
ENTRIES = {
    "gated_delta_prefill": Benchmark(
        title="chunk_gated_delta_rule, forward, packed sequences, bfloat16",
        reference=REFERENCE,
        kernel="gated_delta_fwd",
        shapes=tuple(shapes(FORWARD)),
        tiny={"H": 1, "HV": 2, "N": 2, "T": 130, "first": 100},
        make=forward_case,
        flops=forward_flops,
        bytes=forward_bytes,
        dtype="bfloat16",
        devices=("cuda",),
        goal=partial(goal, FORWARD),
    ),
    "gated_delta_backward": Benchmark(
        title="chunk_gated_delta_rule, backward alone, packed sequences, bfloat16",
        reference=REFERENCE + " with autograd",
        kernel="gated_delta_bwd",
        shapes=tuple(shapes(BACKWARD)),
        tiny={"H": 1, "HV": 2, "N": 2, "T": 130, "first": 100},
        make=backward_case,
        flops=backward_flops,
        bytes=backward_bytes,
        dtype="bfloat16",
        devices=("cuda",),
        goal=partial(goal, BACKWARD),
    ),
}
