"""Benchmarks of Deep Delta Learning: what lies between two sub-layers, and its parts."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import ddl
from ..ddl import reference
from .case import Benchmark, Case
from .measure import COMPILED

EAGER = "eager modules"
YARDSTICK = "add + F.rms_norm"  # what a residual stream of one channel costs without DDL
GRADIENTS = ("dx", "dk", "dv", "dbeta", "dread", "dnorm")


def inputs(shape, device, dtype):
    """x, k, v_logits, beta_logits, read, norm of a boundary; weights and logits in float32."""
    torch.manual_seed(0)
    N, d, d_v = (shape[name] for name in ("N", "d", "d_v"))
    x, k = (torch.randn(*size, device=device).to(dtype) for size in ((N, d, d_v), (N, d)))
    v, beta = torch.randn(N, d_v, device=device), torch.randn(N, device=device)
    read, norm = torch.rand(d, d_v, device=device), torch.rand(d, device=device)
    return [x, k, v, beta, read, norm]


def eager(x, k, v_logits, beta_logits, read, norm):
    """Rewrite, read-out and norm as modules of PyTorch compute them: float32 inside."""
    direction = F.normalize(k.float(), dim=-1)
    p = (direction.unsqueeze(-1) * x).sum(-2)
    e = 4 * torch.sigmoid(v_logits) - p
    step = 2 * torch.sigmoid(beta_logits)[:, None, None] * direction.unsqueeze(-1)
    y = (x + step * e.unsqueeze(-2)).to(x.dtype)
    x_in = (y * read).sum(-1)
    return y, F.rms_norm(x_in, norm.shape, norm, 1e-5).to(k.dtype)


def plain(x, k, v_logits, beta_logits, read, norm):
    """The package's reference."""
    gates = (v_logits, beta_logits, None)
    options = dict(v_logits=True, beta_logits=True)
    results = reference.naive_boundary(x, k, *gates, read, norm, *[None] * 4, **options)
    return results[0], results[2]


def added(x, k, v_logits, beta_logits, read, norm):
    """A plain residual of one channel: y = x + k and its norm."""
    y = x[..., 0] + k
    return y, F.rms_norm(y, norm.shape, norm.to(y.dtype), 1e-5)


def limit_of(dtype):
    return 4e-3 if dtype == torch.bfloat16 else 1e-5


def forward_case(shape, device, dtype=torch.float32):
    tensors = inputs(shape, device, dtype)

    def check():
        ours, limit = ddl.ddl_tail(*tensors), limit_of(dtype)
        pairs = [*zip(ours, plain(*tensors), strict=True), *zip(ours, eager(*tensors), strict=True)]
        names = ("y", "c", "y of the eager", "c of the eager")
        return [(name, *pair, limit) for name, pair in zip(names, pairs, strict=True)]

    return Case(
        ours=lambda: ddl.ddl_tail(*tensors),
        reference=lambda: plain(*tensors),
        baselines={EAGER: lambda: eager(*tensors), YARDSTICK: lambda: added(*tensors)},
        check=check,
        compiled=lambda wrap: partial(wrap(eager, dynamic=False), *tensors),
    )


def training_case(shape, device, dtype=torch.float32):
    tensors = [t.requires_grad_() for t in inputs(shape, device, dtype)]
    incoming = [torch.randn_like(t) for t in ddl.ddl_tail(*tensors)]

    def step(function):
        return torch.autograd.grad(function(*tensors), tensors, incoming)

    def yardstick():
        used, (d_y, d_c) = (tensors[0], tensors[1], tensors[5]), incoming
        return torch.autograd.grad(added(*tensors), used, (d_y[..., 0], d_c))

    def check():
        pairs = zip(GRADIENTS, step(ddl.ddl_tail), step(plain), strict=True)
        return [(*pair, 2 * limit_of(dtype)) for pair in pairs]

    return Case(
        ours=lambda: step(ddl.ddl_tail),
        reference=lambda: step(plain),
        baselines={EAGER: lambda: step(eager), YARDSTICK: yardstick},
        check=check,
        compiled=lambda wrap: partial(step, wrap(eager, dynamic=False)),
    )


def flops(per_channel, rest):
    return lambda s: s["N"] * s["d"] * (per_channel * s["d_v"] + rest)


def forward_bytes(size):
    """X and k read, Y and c written."""
    return lambda s: s["N"] * s["d"] * (2 * s["d_v"] + 2) * size


def training_bytes(size):
    """Forward, then Y, its gradient, k and c's gradient read, gradients of X and k written."""
    return lambda s: s["N"] * s["d"] * (5 * s["d_v"] + 5) * size


def entries(name, title, shape, targets, dtype=torch.float32):
    """Forward, and forward with backward, at one shape."""
    size = 2 if dtype == torch.bfloat16 else 4
    shared = dict(
        reference="eager reference (naive_boundary)",
        kernel="ddl_boundary_fwd",
        shapes=(shape,),
        tiny={"N": 5, "d": 24, "d_v": shape["d_v"]},
        targets=targets,
        dtype=str(dtype).removeprefix("torch."),
    )
    return {
        name: Benchmark(
            title=f"{title}, forward",
            make=partial(forward_case, dtype=dtype),
            flops=flops(8, 10),
            bytes=forward_bytes(size),
            **shared,
        ),
        f"{name}_train": Benchmark(
            title=f"{title}, forward and backward",
            make=partial(training_case, dtype=dtype),
            flops=flops(26, 30),
            bytes=training_bytes(size),
            **shared,
        ),
    }


FOUR = {"N": 2048, "d": 768, "d_v": 4}
ONE = {"N": 2048, "d": 768, "d_v": 1}
BOTH = ((EAGER, 8.0), (COMPILED, 4.0))
ENTRIES = {
    **entries("ddl", "DDL boundary, 4 channels", FOUR, BOTH),
    **entries("ddl_bf16", "DDL boundary, 4 channels", FOUR, BOTH, torch.bfloat16),
    **entries("ddl_one", "DDL boundary, 1 channel", ONE, ((EAGER, 2.0),)),
}
# the page's shapes for a GPU: small and medium models of the paper, one channel, hyper-connections
LARGE = {
    "S1": {"N": 32768, "d": 768, "d_v": 4},
    "S2": {"N": 16384, "d": 2048, "d_v": 4},
    "S3": {"N": 8192, "d": 4096, "d_v": 1},
    "S4": {"N": 32768, "d": 4096, "d_v": 4},
}
