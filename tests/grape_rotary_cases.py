"""What the tests of rotations share: inputs, an independent formula, named calls, limits."""

import torch

from deltafuse import _library, grape

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
# max|x - ref| / max|ref| of outputs; of gradients of parameters
LIMIT = {F64: 1e-12, F32: 2e-6, BF16: 8e-3, F16: 1e-3}
PARAMETER = {F64: 1e-12, F32: 1e-4, BF16: 1e-2, F16: 1e-2}


def normal(*shape, seed=0, dtype=F32):
    random = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, generator=random, dtype=F64).to(dtype)


def uniform(*shape, seed=0, dtype=F32):
    random = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.rand(*shape, generator=random, dtype=F64).to(dtype)


def heads(B=2, T=7, Hq=4, Hk=2, D=16, dtype=F32, seed=0):
    """q and k."""
    return normal(B, T, Hq, D, seed=seed, dtype=dtype), normal(B, T, Hk, D, seed=1, dtype=dtype)


def turned(x, angle, interleaved=False, clockwise=False):
    """x [B, T, H, D] rotated as complex numbers, angle [B, T, H or 1, P]; float64."""
    P = angle.shape[-1]
    x, rest = x[..., : 2 * P].double(), x[..., 2 * P :].double()
    x0, x1 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turn = torch.polar(torch.ones_like(angle), -angle if clockwise else angle)
    y = torch.complex(x0, x1) * turn
    parts = (y.real, y.imag)
    y = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((y, rest), -1)


def thetas(width, base=1e4):
    return base ** (-torch.arange(0, width, 2, dtype=F64) / width)


def error(actual, expected):
    """max|x - ref| / max|ref|; 0 for empty tensors."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().item()
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / scale if scale else difference


# name: (shape of `heads`, arguments of rotary_qk as a function of q)
CASES = {
    "default": ({}, lambda q: {}),
    "interleaved": ({}, lambda q: {"interleaved": True}),
    "clockwise": ({}, lambda q: {"clockwise": True}),
    "both": ({}, lambda q: {"clockwise": True, "interleaved": True}),
    "partial": ({"D": 24}, lambda q: {"rotary_dim": 10}),
    "partial interleaved": ({"D": 24}, lambda q: {"rotary_dim": 10, "interleaved": True}),
    "odd D": ({"D": 13}, lambda q: {"rotary_dim": 12}),
    "wide": ({"D": 128, "Hq": 8}, lambda q: {}),
    "wide interleaved": ({"D": 128, "Hq": 8}, lambda q: {"interleaved": True}),
    "one plane": ({"D": 2}, lambda q: {}),
    "no plane": ({"D": 5}, lambda q: {"rotary_dim": 0}),
    "one token": ({"B": 1, "T": 1, "Hq": 1, "Hk": 1}, lambda q: {"offsets": 100000}),
    "offset": ({}, lambda q: {"offsets": 123456789}),
    "offsets": ({}, lambda q: {"offsets": torch.tensor([3, 1000000])}),
    "offsets int32": ({}, lambda q: {"offsets": torch.tensor([3, 7], dtype=torch.int32)}),
    "positions": ({}, lambda q: {"position_ids": torch.arange(14).view(2, 7) * 12345}),
    "shared positions": ({}, lambda q: {"position_ids": torch.arange(7).int() * 3}),
    "negative positions": ({}, lambda q: {"position_ids": -torch.arange(7) * 1000}),
    "real positions": ({}, lambda q: {"position_ids": 50 * normal(2, 7)}),
    "factor": ({}, lambda q: {"attention_factor": 1.25}),
    "freqs": ({}, lambda q: {"freqs": uniform(8)}),
    "freqs of heads": ({}, lambda q: {"freqs": uniform(2, 8)}),
    "freqs of heads interleaved": (
        {"D": 40, "T": 3},
        lambda q: {"freqs": uniform(2, 20), "interleaved": True, "attention_factor": 0.5},
    ),
    "axes": ({}, lambda q: {"freqs": uniform(8, 3), "position_ids": grid(2, 7, 3)}),
    "axes of heads": (
        {},
        lambda q: {"freqs": uniform(2, 8, 2), "position_ids": grid(2, 7, 2), "clockwise": True},
    ),
    "real axes": ({}, lambda q: {"freqs": uniform(8, 2), "position_ids": 9 * normal(2, 7, 2)}),
    "phase": ({}, lambda q: {"phase": uniform(2, 7, dtype=F64).cumsum(1)}),
    "phase of heads": ({}, lambda q: {"phase": 9 * uniform(2, 7, 2), "freqs": uniform(8)}),
    "phase and freqs": ({}, lambda q: {"phase": 9 * uniform(2, 7), "freqs": uniform(2, 8)}),
    "varlen": ({"B": 1, "T": 11}, lambda q: {"cu_seqlens": torch.tensor([0, 4, 4, 5, 11])}),
    "varlen offsets": (
        {"B": 1, "T": 9},
        lambda q: {
            "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32),
            "offsets": torch.tensor([100, 2000]),
        },
    ),
    "tables": ({}, lambda q: tables(9, 8)),
    "tables at positions": (
        {},
        lambda q: {**tables(40, 8), "position_ids": torch.arange(14).view(2, 7).flip(1) * 2},
    ),
    "tables of tokens": ({}, lambda q: {"cos": normal(2, 7, 8), "sin": normal(2, 7, 8, seed=1)}),
    "tables of two": (
        {},
        lambda q: {
            "cos": (normal(1, 7, 6), normal(1, 7, 6, seed=2)),
            "sin": (normal(1, 7, 6, seed=3), normal(1, 7, 6, seed=4)),
            "interleaved": True,
            "clockwise": True,
        },
    ),
    "16-bit tables": ({}, lambda q: {name: t.bfloat16() for name, t in tables(9, 8).items()}),
    "packed tables": (
        {"B": 1, "T": 9},
        lambda q: {**tables(6, 8), "cu_seqlens": torch.tensor([0, 6, 9])},
    ),
}


def grid(B, T, A):
    return torch.arange(B * T * A).view(B, T, A) % 5


def tables(rows, P):
    angle = torch.arange(rows, dtype=F64)[:, None] * thetas(2 * P)
    return {"cos": angle.cos().float(), "sin": angle.sin().float()}


def made(name, dtype=F32):
    """q, k and the other arguments of a case."""
    shape, options = CASES[name]
    q, k = heads(**shape, dtype=dtype)
    return q, k, options(q)


def widened(options):
    """The same arguments in float64, where they are real."""

    def wide(t):
        if isinstance(t, tuple):
            return tuple(map(wide, t))
        real = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.double() if real else t

    return {name: wide(t) for name, t in options.items()}


def exact(q, k, options):
    """The float64 reference on the same, already rounded inputs. Frequencies stay as they are."""
    with _library.use("reference"):
        wide = widened({n: t for n, t in options.items() if n != "freqs"})
        if "freqs" in options:
            wide["freqs"] = options["freqs"]
        return grape.rotary_qk(q.double(), None if k is None else k.double(), **wide)


def high_precision(theta, position):
    """cos and sin of theta * position from 200 bits."""
    from mpmath import mp, mpf

    mp.prec = 200
    angle = mpf(theta) * mpf(position)
    return float(mp.cos(angle)), float(mp.sin(angle))
