"""Benchmarks of learned rotations: a mixture of planes, forward and with its gradients.

The frame of the planes is made beforehand for all rows: a layer makes it once for q and k.
"""

from functools import partial

import torch

from .. import _library, grape
from .case import Benchmark, Case

FRAME, DENSE, COPY = "eager frame form", "eager D x D product", "x.clone()"
GRADIENTS = ("dx", "da", "db", "domega")
CHUNK = 64  # tokens whose D x D matrices the dense form holds at once


def inputs(shape, device, dtype):
    """x, a, b, omega and integer positions; parameters in float32."""
    torch.manual_seed(0)
    B, T, H, D, r = (shape[name] for name in ("B", "T", "H", "D", "r"))
    x = torch.randn(B, T, H, D, device=device).to(dtype)
    a, b = torch.randn(2, H, r, D, device=device) / D**0.5
    t = torch.arange(T, device=device).expand(B, T)
    return x, a, b, torch.randn(H, r, device=device), t


def turns(theta, t):
    f = t.double()[..., None, None] * theta.double()
    return f.cos().float(), f.sin().float()


def eager_frame(x, W, theta, t):
    """W^T x, a rotation of its planes, and back, as PyTorch users write it; float32 inside."""
    wide, (cos, sin) = x.float(), turns(theta, t)
    c0, c1 = torch.einsum("bthd,hdk->bthk", wide, W).unflatten(-1, (-1, 2)).unbind(-1)
    delta = torch.stack((c0 * cos + c1 * sin - c0, c1 * cos - c0 * sin - c1), -1).flatten(-2)
    return (wide + torch.einsum("bthk,hdk->bthd", delta, W)).to(x.dtype)


def eager_dense(x, W, theta, t):
    """A matrix G [D, D] for each token and head, and its product with x, in chunks of tokens."""
    outputs = []
    for part, at in zip(x.split(CHUNK, 1), t.split(CHUNK, 1), strict=True):
        cos, sin = turns(theta, at)
        rows = torch.stack((cos - 1, sin), -1), torch.stack((-sin, cos - 1), -1)
        planes = torch.stack(rows, -2)
        frame = W.unflatten(-1, (-1, 2))
        G = torch.einsum("hdki,bthkij,hekj->bthde", frame, planes, frame)
        outputs.append(part + torch.einsum("bthde,bthe->bthd", G, part.float()).to(x.dtype))
    return torch.cat(outputs, 1)


def in_reference(x, a, b, omega, t, frame=None):
    with _library.use("reference"):
        return grape.mixture_rotate(x, a, b, omega, t, frame=frame)


def limits(dtype):
    """Of outputs, of gradients of parameters."""
    return (4e-3, 1e-3) if dtype == torch.bfloat16 else (2e-6, 1e-4)


def forward_case(shape, device, dtype=torch.float32, dense=False):
    tensors = x, a, b, omega, t = inputs(shape, device, dtype)
    prepared = W, theta = grape.prepare_frame(a, b, omega)
    frame = (W.float(), theta)
    rotate = partial(grape.mixture_rotate, *tensors, frame=prepared)

    def check():
        ours, limit = rotate(), limits(dtype)[0]
        few = x[:, :CHUNK], t[:, :CHUNK]  # of the dense form
        return [
            ("y", ours, in_reference(*tensors), limit),
            ("y of the frame form", ours, eager_frame(x, *frame, t), 2 * limit),
            ("y of D x D", ours[:, :CHUNK], eager_dense(few[0], *frame, few[1]), 2 * limit),
        ]

    return Case(
        ours=rotate,
        reference=lambda: in_reference(*tensors, frame=prepared),
        baselines={
            FRAME: lambda: eager_frame(x, *frame, t),
            COPY: x.clone,
            **({DENSE: lambda: eager_dense(x, *frame, t)} if dense else {}),
        },
        check=check,
        compiled=lambda wrap: partial(wrap(eager_frame, dynamic=False), x, *frame, t),
    )


def training_case(shape, device, dtype=torch.float32, dense=False):
    x, a, b, omega, t = inputs(shape, device, dtype)
    prepared = W, theta = grape.prepare_frame(a, b, omega)
    ours = partial(grape.mixture_rotate, frame=prepared)
    planes = [v.requires_grad_() for v in (x, a, b, omega)]
    frame = [x, *(v.float().requires_grad_() for v in (W, theta))]
    incoming = torch.randn_like(x)

    def step(function, leaves):
        return torch.autograd.grad(function(*leaves, t), leaves, incoming)

    def check():
        limit, other = limits(dtype)
        pairs = zip(
            GRADIENTS,
            step(ours, planes),
            step(in_reference, planes),
            (limit, *[other] * 3),
            strict=True,
        )
        return list(pairs)

    return Case(
        ours=lambda: step(ours, planes),
        reference=lambda: step(partial(in_reference, frame=prepared), planes),
        baselines={
            FRAME: lambda: step(eager_frame, frame),
            **({DENSE: lambda: step(eager_dense, frame)} if dense else {}),
        },
        check=check,
        compiled=lambda wrap: partial(step, wrap(eager_frame, dynamic=False), frame),
    )


def rows(shape):
    return shape["B"] * shape["T"] * shape["H"]


def entries(name, title, shape, dtype=torch.float32, dense=False):
    """Forward, and forward with backward, at one shape.

    No factor is asked of the eager frame form: its backward stops at W and theta, ours goes on to
    the planes. Dense matrices are what O(r D) a token is an answer to.
    """
    rival = DENSE if dense else FRAME
    size = 2 if dtype == torch.bfloat16 else 4
    shared = dict(
        kernel="grape_mixture_fwd",
        shapes=(shape,),
        tiny={"B": 1, "T": 70, "H": 2, "D": 24, "r": shape["r"]},
        dtype=str(dtype).removeprefix("torch."),
    )
    return {
        name: Benchmark(
            title=f"{title}, forward",
            reference="eager reference (naive_mixture_rotate)",
            make=partial(forward_case, dtype=dtype, dense=dense),
            flops=lambda s: 8 * s["r"] * s["D"] * rows(s),
            bytes=lambda s: 2 * s["D"] * rows(s) * size,
            targets=((rival, 3.0),) if dense else (),
            **shared,
        ),
        f"{name}_train": Benchmark(
            title=f"{title}, forward and backward to planes",
            reference="eager reference (its backward in closed form)",
            make=partial(training_case, dtype=dtype, dense=dense),
            flops=lambda s: 36 * s["r"] * s["D"] * rows(s),
            bytes=lambda s: 5 * s["D"] * rows(s) * size,
            targets=((rival, 2.0),) if dense else (),
            **shared,
        ),
    }


SHAPE = {"B": 1, "T": 2048, "H": 32, "D": 128}
SMALL = {"B": 1, "T": 512, "H": 8, "D": 128, "r": 8}  # of which D x D matrices still fit
MIXTURE = "GRAPE, mixture of 8 planes"
ENTRIES = {
    **entries("grape_rank2", "GRAPE, 1 plane", {**SHAPE, "r": 1}),
    **entries("grape_mix", MIXTURE, {**SHAPE, "r": 8}),
    **entries("grape_mix_bf16", MIXTURE, {**SHAPE, "r": 8}, torch.bfloat16),
    **entries("grape_mix_small", f"{MIXTURE}, small", SMALL, dense=True),
}
