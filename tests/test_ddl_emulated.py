"""What only the emulator sees of the boundary's CUDA kernels: races, launches, bytes moved."""

import pytest
import torch

from conftest import MODES
from ddl_cuda_cases import BF16, F16, F32, FULL, GATES, NAMES, call, check, incoming, make, tracked
from deltafuse import backend_info
from deltafuse.ddl import raw

pytestmark = pytest.mark.emulated

# shapes (N, d, d_v) and types for each way through the kernels; 132 SMs are emulated
CASES = {
    "a warp a token": ((300, 64, 4), BF16, BF16, ()),
    "several warps, several rounds": ((140 * 8, 520, 1), F16, F16, ()),
    "several warps and groups": ((280, 768, 4), BF16, F32, ()),
    "unaligned": ((270, 33, 3), BF16, BF16, ()),
    "two pieces an item": ((140, 70, 8), F32, BF16, ()),
    "16 channels": ((136, 40, 16), F32, F32, ()),
    "whole rows, several warps": ((280, 768, 4), F32, F32, ()),
    "whole rows, two pieces": ((140, 72, 8), F32, F32, ()),
    "whole rows, one channel": ((150, 520, 1), BF16, BF16, ()),
    "no rewrite": ((600, 40, 4), F32, F32, ("k",)),
    "in parts": ((2, 16384, 4), F32, F32, ()),
}
BARE = dict.fromkeys(NAMES[5:])


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_mode(emulated_with, case, mode):
    shape, state, act, without = CASES[case]
    with emulated_with(**mode):
        check("cpu", make(*shape, state, act, without=without))


@pytest.mark.parametrize("size_of_k", [1e20, 1e-20])
def test_the_slow_norm_in_race_mode(emulated_with, size_of_k):
    given = make(150, 70, 4)
    given["k"][::7] *= size_of_k
    with emulated_with(race=True, seed=1):
        call(given, raw.Options(k_eps=0.0, norm=True, **GATES))


def test_the_operators_are_kernels(emulated):
    ops = backend_info()["ops"]
    for name in ("ddl_boundary_fwd", "ddl_boundary_bwd", "ddl_rewrite_out"):
        assert ops[name]["cpu"] == "cpu"


def derivatives(given, options=FULL):
    ours = tracked(given)
    results = raw.boundary(tuple(ours.values()), options)
    grads = incoming(results, ("y", "x_in", "c", "z_v", "z_beta"))
    given_grads = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    outputs, grads = zip(*given_grads, strict=True)
    inputs = [t for t in ours.values() if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


@pytest.mark.parametrize(
    "case", ["several warps and groups", "unaligned", "whole rows, several warps"]
)
def test_equal_bits_in_every_schedule(emulated_with, case):
    shape, state, act, without = CASES[case]
    given, bits = make(*shape, state, act, without=without), []
    for seed in range(4):
        with emulated_with(seed=seed):
            bits.append(derivatives(given))
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


def kernels(launches):
    return [next(n for n in ("fwd", "bwd", "finish") if n in x["kernel"]) for x in launches]


def test_launches(emulated):
    given = make(5, 24, 4, without=("beta_erase",))
    with emulated.profile() as launches:
        derivatives(given)
    assert kernels(launches) == ["fwd", "bwd", "finish"]
    with emulated.profile() as launches:
        derivatives({**given, **BARE}, raw.Options())
    assert kernels(launches) == ["fwd", "bwd"]
    x, k, v, beta, *_ = given.values()
    with emulated.profile() as launches:
        raw.rewrite_out(x, k, v, beta, None, x, raw.Options())
    assert kernels(launches) == ["fwd"]
    ours = tracked(make(0, 24, 4))
    with emulated.profile() as launches:
        y = raw.boundary(tuple(ours.values()), FULL)[0]
        torch.autograd.grad(y.sum(), ours["read"])
    assert kernels(launches) == ["finish"]


@pytest.mark.parametrize("without", [NAMES[5:], NAMES[7:], ("read", "b_v"), ()], ids=str)
@pytest.mark.parametrize("shape", [(9, 768, 4), (9, 48, 8), (9, 80, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_whole_rows_have_a_kernel_with_the_same_bits(emulated, shape, dtype, without):
    """The general one takes the same values from memory that is not aligned."""
    given = make(*shape, dtype, dtype, without=without)
    x = given["x"]
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
    options, results = raw.Options(norm=without != NAMES[5:], **GATES), []
    for values in (x, shifted):
        with emulated.profile() as launches:
            results.append(call({**given, "x": values}, options))
        assert ("whole" in launches[0]["kernel"]) == (values is x)
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other)


# d, d_v, type of the state, of k and c
TRAFFIC = [(384, 4, BF16, BF16), (1024, 1, F16, F16), (192, 4, F32, BF16), (96, 8, F32, F32)]


@pytest.mark.parametrize("d, d_v, state, act", TRAFFIC, ids=str)
def test_bytes_and_sectors(emulated, d, d_v, state, act):
    """The rows once; weights and partial sums, which are constant in N, beside them."""
    given = make(132 * 8, d, d_v, state, act, weights=BF16, without=("beta_erase",))
    with emulated.profile() as launches:
        derivatives(given, raw.Options(norm=True, **GATES))
    assert kernels(launches) == ["fwd", "bwd", "finish"]
    fwd, bwd, finish = launches
    b, a, N = state.itemsize, act.itemsize, 132 * 8
    partials = finish["unique_bytes_read"]
    assert partials == bwd["grid"][0] * 4 * (d * (2 * d_v + 2) + d_v + 1)
    for launch, limit, formula in (
        (fwd, 1.1, 2 * d_v * b + 2 * a),
        (bwd, 1.15, 3 * d_v * b + 3 * a),
    ):
        moved = launch["unique_bytes_read"] + launch["unique_bytes_written"]
        assert moved - (partials if launch is bwd else 0) <= limit * N * d * formula
        assert launch["local_loads"] == launch["local_stores"] == 0
        assert launch["global_store_sectors"] <= 1.05 * launch["global_store_sectors_ideal"]


def test_rows_move_in_whole_sectors_without_bank_conflicts(emulated):
    """What more tokens cost: the weights and their sums, once a CTA, cancel out."""
    launches = []
    for N in (132 * 17, 132 * 26):  # more than a round of all groups
        given = make(N, 128, 4, BF16, BF16, without=("beta_erase",))
        with emulated.profile() as these:
            derivatives(given, raw.Options(norm=True, **GATES))
        launches.append(these)
    for few, many in list(zip(*launches, strict=True))[:2]:
        assert few["grid"] == many["grid"]
        kinds = ("global_load_sectors", "global_store_sectors")
        for what in (*kinds, "shared_load_wavefronts", "shared_store_wavefronts"):
            ideal = many[f"{what}_ideal"] - few[f"{what}_ideal"]
            assert many[what] - few[what] <= 1.05 * ideal, (what, few["kernel"])
