"""Rotations against independent formulas: layouts, signs, positions, exact angles, group laws.

Numbers in names are those of the acceptance checks in the specification.
"""

import math

import pytest
import torch

from deltafuse import _library, grape
from deltafuse.grape import reference_rotary as reference
from grape_rotary_cases import (
    BF16,
    CASES,
    DTYPES,
    F32,
    F64,
    LIMIT,
    error,
    exact,
    heads,
    high_precision,
    made,
    normal,
    tables,
    thetas,
    turned,
    uniform,
)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("clockwise", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D, width", [(16, 16), (24, 20), (7, 6), (128, 128)])
def test_1_equals_complex_multiplication(D, width, interleaved, clockwise, backend):
    q, k = heads(D=D, T=9, dtype=F64)
    options = dict(interleaved=interleaved, clockwise=clockwise)
    freqs = thetas(width)
    angle = torch.arange(9, dtype=F64)[None, :, None, None] * freqs
    with _library.use(backend):
        for x, y in zip((q, k), grape.rotary_qk(q, k, freqs=freqs, **options), strict=True):
            assert error(y, turned(x, angle, **options)) < 1e-12
            assert torch.equal(y[..., width:], x[..., width:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_1_cases_against_the_reference(name, dtype):
    q, k, options = made(name, dtype)
    results = grape.rotary_qk(q, k, **options)
    with _library.use("reference"):
        plain = grape.rotary_qk(q, k, **options)
    wanted = exact(q, k, options)
    for y, base, ref in zip(results, plain, wanted, strict=True):
        assert y.dtype == dtype and y.is_contiguous()
        assert error(y, ref) <= LIMIT[dtype]
        if dtype.itemsize == 2:
            assert error(y, ref) <= 2 * error(base, ref)


def test_1_clockwise_is_the_negative_frequency():
    q, k = heads()
    freqs = uniform(8)
    a = grape.rotary_qk(q, k, freqs=freqs, clockwise=True)
    b = grape.rotary_qk(q, k, freqs=-freqs)
    assert all(map(torch.equal, a, b))


def test_1_orientation_of_the_paper():
    """exp(f L(e_i, e_j)), L(a, b) = a b^T - b a^T, is clockwise in the plane (i, j)."""
    e = torch.eye(4, dtype=F64)
    L = torch.outer(e[1], e[3]) - torch.outer(e[3], e[1])
    x = normal(1, 1, 1, 4, dtype=F64)
    freqs = torch.tensor([0.0, 0.7], dtype=F64)
    y = grape.rotary_qk(x, freqs=freqs, offsets=1, clockwise=True)
    wanted = torch.linalg.matrix_exp(0.7 * L) @ x.flatten()
    assert error(y.flatten(), wanted) < 1e-12


@pytest.mark.parametrize("interleaved", [False, True])
def test_1_fp32_has_the_bits_of_a_table(interleaved):
    """A table of float32 products, as the ecosystem builds it, and its formula in float32."""
    q, k = heads(T=300, D=32)
    freqs, _ = grape.rotary_frequencies(32)
    angle = torch.outer(torch.arange(300).float(), freqs)
    cos, sin = angle.cos(), angle.sin()
    y = grape.rotary_qk(q, k, angle="fp32", interleaved=interleaved)
    z = grape.rotary_qk(q, k, cos=cos, sin=sin, interleaved=interleaved)
    assert all(map(torch.equal, y, z))
    c, s = cos[:, None], sin[:, None]
    x0, x1 = (q[..., ::2], q[..., 1::2]) if interleaved else q.chunk(2, -1)
    parts = (x0 * c - x1 * s, x0 * s + x1 * c)
    formula = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    # fused multiply-adds round once less: one unit of the larger product
    unit = torch.finfo(F32).eps * (q.abs().max())
    assert (y[0] - formula).abs().max() <= unit


def test_1_fp32_positions_and_factor():
    q, k = heads()
    positions = torch.tensor([[5, 900, 70, 1 << 20, 3, 2, 1]]).expand(2, 7)
    freqs = uniform(2, 8)
    y = grape.rotary_qk(q, k, freqs=freqs, position_ids=positions, angle="fp32", attention_factor=2)
    angle = positions.float()[..., None, None] * freqs
    for x, got, group in ((q, y[0], 2), (k, y[1], 1)):
        # float32 cos and sin of angles up to 1e6 are as good as those of float64
        wanted = 2 * turned(x, angle.double().repeat_interleave(group, 2))
        assert error(got, wanted) < 2e-6


def probe(positions, theta, **options):
    """cos and sin of the angles at positions [T], as the rotation of (1, 0)."""
    x = torch.zeros(1, len(positions), 1, 2, dtype=options.pop("dtype", F32))
    x[..., 0] = 1
    y = grape.rotary_qk(x, freqs=torch.tensor([theta]), position_ids=positions[None], **options)
    return y[0, :, 0]


@pytest.mark.parametrize("theta", [1.0, 0.3183, 1e-2, 1e-4, 7.5, 3e-8])
def test_5_exact_angles_of_integers(theta, cpu_isa):
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 2**31 - 1, (400,), generator=random)
    positions[:4] = torch.tensor([0, 1, 2**31 - 1, 2**30])
    theta = torch.tensor(theta).item()  # float32's
    got = probe(positions, theta)
    for t, y in zip(positions.tolist(), got.double(), strict=True):
        cos, sin = high_precision(theta, t)
        assert max(abs(y[0] - cos), abs(y[1] - sin)) <= 1.5e-7


@pytest.mark.parametrize("theta", [1.0, 0.3183, 1e-4])
def test_5_exact_angles_of_real_positions(theta, cpu_isa):
    positions = (2 * uniform(300, dtype=F64) - 1) * 1e9
    theta = torch.tensor(theta).item()
    for dtype in (F32, F64):
        given = positions.to(dtype)
        got = probe(given, theta)
        for t, y in zip(given.tolist(), got.double(), strict=True):
            cos, sin = high_precision(theta, t)
            assert max(abs(y[0] - cos), abs(y[1] - sin)) <= 4e-7


def test_5_turns_of_frequencies():
    from mpmath import mp, mpf

    mp.prec = 400
    values = [1.0, 0.5, 1e-4, 3.7e-9, 123.25, -2.5, 1e-38, 7e30, 0.0, 1e-30, 1e35]
    values += normal(50, dtype=F64).exp().tolist()
    for value, turn in zip(values, reference.turns(torch.tensor(values, dtype=F64)), strict=True):
        wanted = int(mp.floor(abs(mpf(value)) / (2 * mp.pi) * 2**64)) % 2**64
        got = int(turn) % 2**64 if value >= 0 else -int(turn) % 2**64
        assert abs(got - wanted) <= 1


def test_5_float64_follows_the_fixed_point():
    positions = torch.tensor([0, 1, 1000, 2**31 - 1])
    got = probe(positions, 1.0, dtype=F64)
    for t, y in zip(positions.tolist(), got, strict=True):
        cos, sin = high_precision(1.0, t)
        assert max(abs(y[0] - cos), abs(y[1] - sin)) <= 1e-15 + t * 2 * math.pi * 2.0**-64


def test_frequencies_that_are_not_finite_make_nan():
    q = normal(1, 3, 1, 6)
    for positions in (torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 1.0, 2.0]])):
        for bad in (math.nan, math.inf):
            freqs = torch.tensor([1.0, bad, 0.5])
            for backend in ("native", "reference"):
                with _library.use(backend):
                    y = grape.rotary_qk(q, freqs=freqs, position_ids=positions)
                assert y[..., [1, 4]].isnan().all() and y[..., [0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_3_group_laws(interleaved):
    """G(t) G(u) = G(t + u); G(-t) G(t) = I; |G x| = |x|."""
    x = normal(1, 64, 2, 32)
    t, u = (
        torch.randint(0, 10**7, (1, 64), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )

    def rotate(x, positions):
        return grape.rotary_qk(x, position_ids=positions, interleaved=interleaved)

    assert error(rotate(rotate(x, t), u), rotate(x, t + u)) < 2e-6
    assert error(rotate(rotate(x, t), -t), x) < 2e-6
    assert torch.equal(rotate(x, 0 * t), x)
    far = rotate(x.double(), torch.full((1, 64), 10**7)).norm(dim=-1) / x.double().norm(dim=-1)
    assert (far - 1).abs().max() < 1e-12
    near = rotate(x, torch.full((1, 64), 10**7)).double().norm(dim=-1) / x.double().norm(dim=-1)
    assert (near - 1).abs().max() <= 1e-6


def test_3_logits_do_not_change_under_a_shift():
    q, k = heads(B=1, T=32, Hq=2, Hk=2, D=64)

    def logits(shift):
        a, b = grape.rotary_qk(q, k, offsets=shift)
        return torch.einsum("bthd,bshd->bhts", a.double(), b.double()) / 8

    assert (logits(10**6) - logits(0)).abs().max() <= 2e-5


def test_positions_of_tokens():
    cu = torch.tensor([0, 4, 4, 5, 11])
    own = reference.token_positions(11, "cpu", 0, torch.tensor([10, 20, 30, 40]), cu)
    assert own.tolist() == [[10, 11, 12, 13, 30, 40, 41, 42, 43, 44, 45]]
    assert reference.token_positions(3, "cpu", 5).tolist() == [[5, 6, 7]]


def test_multi_axis_angles_add():
    """Block structure in freqs is the multimodal form: each plane follows one axis."""
    q, k = heads(D=12)
    positions = torch.randint(0, 50, (2, 7, 3), generator=torch.Generator().manual_seed(0))
    one = thetas(12).float()
    freqs = torch.zeros(6, 3)
    for p in range(6):
        freqs[p, p // 2] = one[p]
    y, _ = grape.rotary_qk(q, k, freqs=freqs, position_ids=positions)
    angle = torch.stack([positions[..., p // 2] * one[p].double() for p in range(6)], -1)
    assert error(y, turned(q, angle[:, :, None])) < 2e-6


def test_xpos_tables_cancel_in_logits():
    """Magnitudes zeta^t for q and zeta^-t for k: a logit depends on the distance alone."""
    T = 12
    q = normal(1, 1, 1, 8).expand(1, T, 1, 8)
    k = normal(1, 1, 1, 8, seed=5).expand(1, T, 1, 8)
    trig = tables(T, 4)
    scale = 0.9 ** torch.arange(T).float()[:, None]
    cos, sin = ((trig[n] * scale, trig[n] / scale) for n in ("cos", "sin"))
    a, b = grape.rotary_qk(q, k, cos=cos, sin=sin)
    logits = torch.einsum("bthd,bshd->ts", a.double(), b.double())
    for distance in range(T):
        diagonal = logits.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5


def test_12_decode_equals_prefill():
    q, k = heads(B=2, T=9, D=32, dtype=BF16)
    whole = grape.rotary_qk(q, k)
    for t in range(9):
        step = grape.rotary_qk(q[:, t : t + 1], k[:, t : t + 1], offsets=t)
        assert all(torch.equal(a, b[:, t : t + 1]) for a, b in zip(step, whole, strict=True))


def test_output_cache():
    q, k = heads()
    cache = torch.full((2, 20, 2, 16), 7.0)
    y = grape.rotary_qk(q, k)
    got = grape.rotary_qk(q, k, output_cache=cache[:, 3:10])
    assert torch.equal(got[0], y[0]) and torch.equal(cache[:, 3:10], y[1])
    assert got[1].data_ptr() == cache[:, 3:10].data_ptr()
    assert (cache[:, :3] == 7).all() and (cache[:, 10:] == 7).all()
    grape.rotary_qk(q, k, output_cache=cache[:, :7], inplace=True)
    assert torch.equal(q, y[0]) and torch.equal(cache[:, :7], y[1])
