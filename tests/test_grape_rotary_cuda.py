"""The CUDA kernels of the rotation, on the emulator: results, races, bounds, bytes moved."""

import pytest
import torch

from conftest import MODES
from deltafuse import _library, backend_info, grape
from grape_rotary_cases import (
    BF16,
    CASES,
    F16,
    F32,
    LIMIT,
    PARAMETER,
    error,
    exact,
    grid,
    heads,
    high_precision,
    made,
    normal,
    tables,
    uniform,
    widened,
)
from test_grape_rotary_grads import flat, gradients

pytestmark = pytest.mark.emulated

in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
EVERY = ("default", "both", "partial interleaved", "axes of heads", "phase of heads", "varlen")


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def check(q, k, options):
    """Forward and backward against the float64 reference."""
    dtype = q.dtype
    with _library.use("reference"):
        wanted = gradients(q.double(), k.double(), widened(options))
    ours, got = grape.rotary_qk(q, k, **options), gradients(q, k, options)
    for y, ref in zip(ours, exact(q, k, options), strict=True):
        assert error(y, ref) <= LIMIT[dtype]
    given = {"q": q, "k": k, **flat(options)}
    for key in wanted:
        rounded = 8e-3 if given[key].dtype == BF16 else 1e-6
        limit = max(LIMIT[dtype] if key in "qk" else PARAMETER[dtype], rounded)
        assert error(got[key], wanted[key]) <= limit, key


def test_kernels_are_registered(emulated):
    ops = backend_info()["ops"]
    assert backend_info()["build"].startswith("cuda emulated")
    for name in ("grape_rotary_fwd", "grape_rotary_bwd", "grape_rotary_out"):
        assert ops[name]["cpu"] == "cpu"


@pytest.mark.parametrize("name", CASES)
def test_cases(emulated, name):
    check(*made(name, F32))
    check(*made(name, BF16))


@pytest.mark.parametrize("name", EVERY)
def test_float16(emulated, name):
    check(*made(name, F16))


# shapes beyond one piece of everything: tokens of a CTA, rows in flight, threads a row, heads of a
# pass, tiles of heads, CTAs of a backward pass
LARGE = {
    "tokens": lambda: (heads(B=2, T=301, Hq=1, Hk=1, D=8), {"freqs": uniform(4)}),
    "rows": lambda: (heads(B=1, T=2, Hq=80, Hk=20, D=16), {"freqs": uniform(8)}),
    "planes": lambda: (heads(B=1, T=2, Hq=2, Hk=1, D=1024), {"freqs": uniform(512)}),
    "odd planes": lambda: (heads(B=1, T=2, Hq=2, Hk=1, D=600), {"freqs": uniform(299)}),
    "passes": lambda: (
        heads(B=1, T=2, Hq=48, Hk=48, D=256),
        {"freqs": uniform(48, 128), "phase": uniform(1, 2)},
    ),
    "passes of phase": lambda: (
        heads(B=1, T=3, Hq=48, Hk=48, D=256),
        {"freqs": uniform(128), "phase": uniform(1, 3, 48)},
    ),
    "axes": lambda: (
        heads(B=1, T=3, Hq=6, Hk=2, D=64),
        {"freqs": uniform(2, 32, 4), "position_ids": 5 * normal(1, 3, 4)},
    ),
    "tables of two": lambda: (
        heads(B=2, T=20, Hq=8, Hk=4, D=64),
        {
            "cos": (normal(1, 20, 32), normal(1, 20, 32, seed=1)),
            "sin": (normal(1, 20, 32, seed=2), normal(1, 20, 32, seed=3)),
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large(emulated, name):
    (q, k), options = LARGE[name]()
    check(q, k, options)


@in_every_mode
@pytest.mark.parametrize("name", EVERY)
def test_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        for dtype in (F32, BF16):
            check(*made(name, dtype))


@in_every_mode
def test_tables_in_every_mode(emulated_with, mode):
    q, k = heads(B=2, T=9, D=24)
    cos, sin = (normal(2, 9, 8, seed=s) for s in (0, 1))
    with emulated_with(**mode):
        check(q, k, {"cos": (cos, sin), "sin": (sin, cos)})
        check(q, k, {**tables(20, 8), "offsets": torch.tensor([3, 11])})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_in_place_alone_and_again(emulated, dtype, interleaved):
    q, k = heads(D=48, T=5, dtype=dtype)
    options = dict(rotary_dim=32, interleaved=interleaved)
    y = grape.rotary_qk(q, k, **options)
    assert torch.equal(grape.rotary_qk(q, **options), y[0])
    assert all(map(torch.equal, grape.rotary_qk(q, k, **options), y))
    wide = torch.nn.functional.pad(q, (3, 2))[..., 3:-2]  # not aligned: an element at a time
    assert torch.equal(grape.rotary_qk(wide, k, **options)[0], y[0])
    first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(grape.rotary_qk(first, k, **options)[0], y[0])
    grape.rotary_qk(q, k, **options, inplace=True)
    assert torch.equal(q, y[0]) and torch.equal(k, y[1])


def test_same_gradients_again_and_from_views(emulated):
    q, k = heads(B=2, T=60, D=32)
    options = {"freqs": uniform(2, 16), "phase": 9 * uniform(2, 60)}
    first, second = gradients(q, k, options), gradients(q, k, options)
    assert all(torch.equal(first[key], second[key]) for key in first)
    inplace = gradients(q, k, options, inplace=True)
    assert all(torch.equal(first[key], inplace[key]) for key in first)


def test_canaries(emulated):
    """Nothing is written beside a view, nor behind the rotary width."""
    x = normal(2, 3, 2, 21)
    buffer = torch.full((2, 5, 4, 30), 7.0)
    view = buffer[:, 1:-1, 1:-1, 4:-5]
    view.copy_(x)
    grape.rotary_qk(view, rotary_dim=14, inplace=True)
    assert torch.equal(view, grape.rotary_qk(x, rotary_dim=14))
    view.fill_(7)
    assert (buffer == 7).all()


def test_exact_angles(emulated):
    """cos and sin of any position below 2^31, and of real ones up to 1e9."""
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 2**31 - 1, (1, 200), generator=random)
    x = torch.zeros(1, 200, 1, 8)
    x[..., :4] = 1
    freqs = torch.tensor([1.0, 0.3183, 1e-4, 3e-8])
    for where, limit in ((positions, 1.5e-7), (positions.double() / 2.2, 4e-7)):
        y = grape.rotary_qk(x, freqs=freqs, position_ids=where)[0, :, 0].double()
        for i, t in enumerate(where[0].tolist()):
            for p, theta in enumerate(freqs.tolist()):
                cos, sin = high_precision(theta, t)
                assert max(abs(y[i, p] - cos), abs(y[i, p + 4] - sin)) <= limit


def profiled(emulated, call):
    with emulated.profile() as launches:
        result = call()
    return launches, result


@pytest.mark.parametrize("style", [{}, {"interleaved": True}], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_of_a_forward_pass(emulated, dtype, style):
    q, k = heads(B=1, T=24, Hq=8, Hk=2, D=128, dtype=dtype)
    freqs = uniform(64)
    (launch,), y = profiled(emulated, lambda: grape.rotary_qk(q, k, freqs=freqs, **style))
    assert launch["unique_bytes_read"] == size(q, k, freqs)
    assert launch["unique_bytes_written"] == size(*y)
    least = 2 * size(q, k)
    moved = 32 * (launch["global_load_sectors"] + launch["global_store_sectors"])
    per_cta = launch["grid"][0] * size(freqs)
    assert moved - per_cta <= 1.05 * least
    assert launch["local_loads"] == launch["local_stores"] == 0
    for kind in ("load", "store"):
        sectors = launch[f"global_{kind}_sectors"]
        assert sectors <= 1.01 * launch[f"global_{kind}_sectors_ideal"]
    ideal = launch["shared_load_wavefronts_ideal"]
    assert launch["shared_load_wavefronts"] <= 1.1 * ideal


def test_in_place_and_partial_move_fewer_bytes(emulated):
    q, k = heads(B=1, T=4, Hq=4, Hk=2, D=64, dtype=BF16)
    freqs = uniform(8)
    call = lambda: grape.rotary_qk(q, k, freqs=freqs, inplace=True)  # noqa: E731
    (launch,), _ = profiled(emulated, call)
    assert launch["unique_bytes_read"] == size(q, k) // 4 + size(freqs)
    assert launch["unique_bytes_written"] == size(q, k) // 4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_of_a_backward_pass(emulated, dtype):
    q, k = heads(B=1, T=24, Hq=8, Hk=2, D=128, dtype=dtype)
    leaves = [t.requires_grad_() for t in (q, k)]
    freqs = uniform(64).requires_grad_()
    y = grape.rotary_qk(*leaves, freqs=freqs)
    weights = [torch.randn_like(t) for t in y]
    (launch, last), _ = profiled(
        emulated, lambda: torch.autograd.grad(y, (*leaves, freqs), weights)
    )
    assert launch["unique_bytes_read"] == size(*weights, *y, freqs)
    assert launch["unique_bytes_written"] == size(q, k) + 24 * 64 * 8
    assert last["unique_bytes_written"] == size(freqs)
    assert launch["local_loads"] == launch["local_stores"] == 0
    for kind in ("load", "store"):
        sectors = launch[f"global_{kind}_sectors"]
        assert sectors <= 1.05 * launch[f"global_{kind}_sectors_ideal"]
    # without a gradient of frequencies it is the forward kernel
    y = grape.rotary_qk(*leaves, freqs=freqs.detach())
    (launch,), _ = profiled(emulated, lambda: torch.autograd.grad(y, leaves, weights))
    assert launch["unique_bytes_read"] == size(*weights, freqs)


def test_one_launch_for_q_and_k(emulated):
    q, k = heads()
    for options in ({}, tables(9, 8), {"freqs": uniform(8, 2), "position_ids": grid(2, 7, 2)}):
        launches, _ = profiled(emulated, lambda o=options: grape.rotary_qk(q, k, **o))
        assert len(launches) == 1
    nothing = [t[:, :0] for t in (q, k)]
    assert not profiled(emulated, lambda: grape.rotary_qk(*nothing))[0]


def test_many_tokens_share_a_cta_and_few_do_not(emulated):
    q = normal(1, 2200, 1, 2)
    (launch,), _ = profiled(emulated, lambda: grape.rotary_qk(q))
    assert launch["grid"][0] == 275
    (launch,), _ = profiled(emulated, lambda: grape.rotary_qk(q[:, :7]))
    assert launch["grid"][0] == 7


def test_float64_and_rows_beyond_the_table(emulated):
    x = normal(1, 2, 1, 4, dtype=torch.float64)
    y = grape.rotary_qk(x)
    with _library.use("reference"):
        assert torch.equal(y, grape.rotary_qk(x))
    table = [t[None, :, None] for t in tables(3, 2).values()]
    op = _library.kernel("grape_rotary_fwd", table[0])
    with pytest.raises(RuntimeError, match="CUDA error"):
        op(normal(1, 4, 1, 4), None, None, None, None, None, *table, None, None, 0, 1.0, 4)
    emulated.reset()
