"""What only the emulator sees of the CUDA kernels of TC, EC and the token shift."""

import pytest
import torch

from ddl_time_cases import OPS, PACKED, ec, make_ec, make_shift, make_tc, packed, shift, tc
from deltafuse import backend_info
from layer_cases import compare, normal, run

pytestmark = pytest.mark.emulated

MODES = {
    "race": {"race": True},
    "race, shuffled 1": {"race": True, "seed": 1},
    "race, shuffled 2": {"race": True, "seed": 2},
    "strict": {"strict": True},
}
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_op = pytest.mark.parametrize("name", OPS)
# one shape for each variant: B, T, d, d_v, K
VARIANTS = {
    "1 channel": (1, 6, 24, 1, 4),
    "2 channels": (1, 6, 24, 2, 3),
    "4 channels": (1, 6, 24, 4, 4),
    "8 channels": (1, 6, 10, 8, 4),
    "any": (1, 6, 7, 3, 5),
    "two chunks": (2, 19, 8, 4, 4),
    "two CTAs": (1, 3, 1100, 1, 4),
}
HEADS = {"walk": (2, 19, 3, 24), "idle lanes": (1, 5, 2, 96), "wide": (1, 5, 2, 520)}


def test_registered_as_kernels(emulated):
    for name in ("ddl_tc_fwd", "ddl_tc_bwd", "ddl_ec_fwd", "ddl_ec_bwd", "token_shift_bwd"):
        assert backend_info()["ops"][name]["cpu"] == "cpu"


@in_every_mode
@pytest.mark.parametrize("name", VARIANTS)
def test_convolutions_in_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        for dtype in (torch.float32, torch.bfloat16):
            compare(tc, make_tc(VARIANTS[name], dtype))
            compare(ec, make_ec(VARIANTS[name], dtype))


@in_every_mode
@pytest.mark.parametrize("name", HEADS)
def test_shift_in_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        for dtype in (torch.float32, torch.bfloat16):
            compare(shift, make_shift(HEADS[name], dtype))


@in_every_mode
@each_op
def test_packed_sequences_in_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        compare(OPS[name][0], (*packed(name), PACKED))


@each_op
def test_equal_bits_in_every_schedule(emulated_with, name):
    function, make, shape, _ = OPS[name]
    x, results = make((2, 40, *shape[2:])), []
    for seed in range(3):
        with emulated_with(seed=seed):
            outputs, grads = run(function, x)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@each_op
@pytest.mark.parametrize("offsets", [[0, 9, 4], [3, 5], [0, 40], [-7, 2]], ids=str)
def test_wrong_offsets_leave_no_row(emulated_with, name, offsets):
    """Nobody checks offsets on a GPU; whatever they say, accesses stay within the tensors."""
    function, make, shape, _ = OPS[name]
    x = make((1, 9, *shape[2:]), states=len(offsets) - 1)
    with emulated_with(strict=True):
        run(function, (*x, torch.tensor(offsets)))


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def profiles(emulated, function, tensors):
    """Of a call without states: the launches of the forward and of the backward, y, dy and x."""
    x = [t.clone().requires_grad_() for t in tensors]
    with emulated.profile() as forward:
        y = function(*x)
    dy = normal(*y.shape).to(y.dtype)
    with emulated.profile() as backward:
        torch.autograd.grad(y, x, dy)
    return forward, backward, y, dy


def check_traffic(launch, read, written, more=0):
    """Unique bytes at the minimum, and no access beyond them but `more`."""
    assert launch["unique_bytes_read"] <= read
    assert launch["unique_bytes_written"] <= written
    moved = launch["global_load_bytes"] + launch["global_store_bytes"]
    assert moved <= read + written + more
    assert launch["local_loads"] == launch["local_stores"] == 0


def check_sectors(launch, spare=0):
    for kind in ("load", "store"):
        ideal = launch[f"global_{kind}_sectors_ideal"]
        assert launch[f"global_{kind}_sectors"] <= 1.02 * ideal + spare + 8, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tc", "ec"])
def test_bytes_of_convolutions(emulated, name, dtype):
    d, dv, K, T = 64, 4, 4, 512
    make, function = (make_tc, tc) if name == "tc" else (make_ec, ec)
    tensors = make((1, T, d, dv, K), dtype)[:-1]
    forward, backward, y, dy = profiles(
        emulated, lambda *t: function(*t, output_final_state=False), tensors
    )
    (fwd,), (bwd, sums) = forward, backward
    x, taps, chunks = tensors[0], 4 * K * d * dv, T // 16
    # A chunk has its taps and K - 1 rows besides. A small problem has chunks of 16 tokens; with
    # the 128 of a large one that is at most a tenth of the rest.
    again = taps + (K - 1) * size(x) // T
    assert 16 / 128 * chunks * again <= 0.1 * size(x, y)
    check_traffic(fwd, size(x) + taps, size(y), chunks * again)
    again = taps + (K - 1) * size(dy) // T
    check_traffic(bwd, size(x, dy) + taps, size(x) + chunks * taps, chunks * again)
    check_traffic(sums, chunks * taps, taps)
    # two words of float taps, and of partial sums, to one of bfloat16 channels: halves of sectors
    halves = chunks * taps // 32 if dtype == torch.bfloat16 else 0
    for launch in (fwd, bwd, sums):
        check_sectors(launch, halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_shift(emulated, dtype):
    x, previous, current, _ = make_shift((1, 64, 8, 64), dtype)
    tensors = (x, previous, current)
    forward, backward, y, dy = profiles(emulated, lambda *t: shift(*t, output_cache=False), tensors)
    (fwd,), (bwd,) = forward, backward
    weights = 4 * 2 * previous.numel()
    token, chunks = size(x) // 64, 64 // 8  # of a small problem
    asked = 2 * weights * 64 * x.element_size() // 16  # by every lane of a head
    check_traffic(fwd, size(x) + weights, size(y), chunks * token + asked)
    check_traffic(bwd, size(x, dy) + weights, size(x) + weights, 2 * chunks * token + asked)
    for launch in (fwd, bwd):
        check_sectors(launch)
