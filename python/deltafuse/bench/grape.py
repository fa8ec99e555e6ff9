"""Benchmarks of GRAPE: the rotation of q and k, as in a layer with grouped heads."""

from functools import partial

import torch

from .. import grape
from ..grape import reference_rotary as reference
from .case import Benchmark, Case
from .measure import COMPILED

EAGER = "eager rotate_half"  # as models of transformers compute it, in float32
COPY = "copy_ of q and k"  # what moving the bytes costs


def inputs(shape, device, dtype):
    """q, k and the frequencies."""
    torch.manual_seed(0)
    B, T, Hq, Hk, D = (shape[name] for name in ("B", "T", "Hq", "Hk", "D"))
    q, k = (torch.randn(B, T, H, D, device=device).to(dtype) for H in (Hq, Hk))
    return q, k, grape.rotary_frequencies(D, device=device)[0]


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def eager(q, k, freqs):
    """Tables from float32 products, then two products and a sum a tensor, in float32."""
    positions = torch.arange(q.shape[1], device=q.device).float()
    angle = torch.outer(positions, freqs)
    angle = torch.cat((angle, angle), -1)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return tuple((x * cos + rotate_half(x) * sin).to(x.dtype) for x in (q, k))


def plain(q, k, freqs):
    """The package's reference."""
    return reference.naive_rotary(q, k, freqs[None, :, None], *[None] * 7)


def ours(q, k, freqs):
    return grape.rotary_qk(q, k, freqs=freqs)


def limit_of(dtype):
    return 4e-3 if dtype == torch.bfloat16 else 1e-4


def forward_case(shape, device, dtype=torch.float32, inplace=False):
    q, k, freqs = inputs(shape, device, dtype)
    other = torch.empty_like(q), torch.empty_like(k)

    def check():
        wanted, old = plain(q, k, freqs), eager(q, k, freqs)
        got = ours(q.clone(), k.clone(), freqs) if not inplace else rotated()
        names = ("q", "k", "q of the eager", "k of the eager")
        pairs = [*zip(got, wanted, strict=True), *zip(got, old, strict=True)]
        return [(name, *pair, limit_of(dtype)) for name, pair in zip(names, pairs, strict=True)]

    def rotated():
        return grape.rotary_qk(q.clone(), k.clone(), freqs=freqs, inplace=True)

    def copy():
        return other[0].copy_(q), other[1].copy_(k)

    scratch = q.clone(), k.clone()
    return Case(
        ours=(lambda: grape.rotary_qk(*scratch, freqs=freqs, inplace=True))
        if inplace
        else (lambda: ours(q, k, freqs)),
        reference=lambda: plain(q, k, freqs),
        baselines={EAGER: lambda: eager(q, k, freqs), COPY: copy},
        check=check,
        compiled=lambda wrap: partial(wrap(eager, dynamic=False), q, k, freqs),
    )


def training_case(shape, device, dtype=torch.float32, learned=False):
    q, k, freqs = inputs(shape, device, dtype)
    tensors = [q.requires_grad_(), k.requires_grad_()]
    if learned:
        tensors.append(freqs.requires_grad_())
    incoming = [torch.randn_like(t) for t in (q, k)]

    def step(function):
        return torch.autograd.grad(function(q, k, freqs), tensors, incoming)

    def check():
        names = ("dq", "dk", "dfreqs")[: len(tensors)]
        pairs = zip(names, step(ours), step(plain), strict=True)
        return [(*pair, 2 * limit_of(dtype)) for pair in pairs]

    other = [torch.empty_like(t) for t in incoming]

    def copies():
        with torch.no_grad():
            for _ in range(2):
                other[0].copy_(q), other[1].copy_(k)

    return Case(
        ours=lambda: step(ours),
        reference=lambda: step(plain),
        baselines={EAGER: lambda: step(eager), COPY: copies},
        check=check,
        compiled=lambda wrap: partial(step, wrap(eager, dynamic=False)),
    )


def elements(s):
    return s["B"] * s["T"] * (s["Hq"] + s["Hk"]) * s["D"]


SHAPE = {"B": 1, "T": 2048, "Hq": 32, "Hk": 8, "D": 128}
TINY = {"B": 2, "T": 5, "Hq": 4, "Hk": 2, "D": 16}


def entry(title, make, streams, targets, dtype=torch.float32):
    """streams: how often the elements of q and k are read or written."""
    size = 2 if dtype == torch.bfloat16 else 4
    return Benchmark(
        title=title,
        reference="eager reference (naive_rotary)",
        kernel="grape_rotary_fwd",
        shapes=(SHAPE,),
        tiny=TINY,
        make=partial(make, dtype=dtype),
        flops=lambda s: 3 * elements(s) * (streams // 2),
        bytes=lambda s: streams * size * elements(s),
        targets=targets,
        dtype=str(dtype).removeprefix("torch."),
    )


BF16 = torch.bfloat16
FASTER = ((EAGER, 4.0), (COMPILED, 1.0))
IN_PLACE = ((EAGER, 4.0), (COPY, 1 / 1.3))
ENTRIES = {
    "rotary": entry("rotary_qk, forward", forward_case, 2, FASTER),
    "rotary_inplace": entry("rotary_qk in place", partial(forward_case, inplace=True), 2, IN_PLACE),
    "rotary_train": entry("rotary_qk, forward and backward", training_case, 4, FASTER),
    "rotary_learned": entry(
        "rotary_qk with dfreqs, forward and backward",
        partial(training_case, learned=True),
        5,
        FASTER,
    ),
    "rotary_bf16": entry("rotary_qk, forward", forward_case, 2, FASTER, BF16),
    "rotary_bf16_inplace": entry(
        "rotary_qk in place", partial(forward_case, inplace=True), 2, IN_PLACE, BF16
    ),
    "rotary_bf16_train": entry("rotary_qk, forward and backward", training_case, 4, FASTER, BF16),
}
# the page's shapes for a GPU: two of Liger's, and a batch of sequences
LARGE = {
    "hidden 8192": {"B": 1, "T": 2048, "Hq": 32, "Hk": 8, "D": 256},
    "hidden 4096": {"B": 1, "T": 8192, "Hq": 32, "Hk": 8, "D": 128},
    "batch": {"B": 4, "T": 4096, "Hq": 32, "Hk": 8, "D": 128},
    "decode": {"B": 128, "T": 1, "Hq": 32, "Hk": 8, "D": 128},
}
