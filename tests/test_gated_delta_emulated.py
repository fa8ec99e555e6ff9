"""What only the emulator sees of the chunk form's forward: races, late copies, bytes, launches."""

import pytest
import torch

from conftest import MODES
from gated_delta_cases import Case, make
from test_gated_delta_cuda import BF16, CASES, F16, F32, check, forward, leaves

pytestmark = pytest.mark.emulated

# case, dtype, options: TMA, whole vectors and elements; all widths of K; segments
VARIANTS = {
    "TMA": ("K128 V128", BF16, {}),
    "TMA, high": ("K64 V128 group4", F16, {"precision": "high"}),
    "wide": ("K256 V256", BF16, {"precision": "high"}),
    "packed": ("packed", BF16, {}),
    "packed segments": ("packed", BF16, {"auto_cp": True}),
    "elements": ("elements", F16, {}),
    "float": ("K128 V128", F32, {}),
    "float, wide": ("K256 V256", F32, {"auto_cp": True}),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mode(emulated_with, variant, mode):
    name, dtype, options = VARIANTS[variant]
    with emulated_with(**mode):
        check(make(CASES[name], dtype), given=options)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_scan_in_every_mode(emulated_with, mode):
    x = make(Case(T=16 * 32, HV=1, K=16, V=8), F32)
    with emulated_with(**mode):
        check(x, given={"auto_cp": True})


@pytest.mark.parametrize("variant", ["TMA", "packed segments", "float"])
def test_equal_bits_in_every_schedule(emulated_with, variant):
    name, dtype, options = VARIANTS[variant]
    x, bits = make(CASES[name], dtype), []
    for seed in range(3):
        with emulated_with(seed=seed):
            bits.append(forward(x, **options))
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def assert_conflict_free(launch):
    for kind in ("load", "store"):
        waves = launch[f"shared_{kind}_wavefronts"]
        assert waves <= 1.1 * launch[f"shared_{kind}_wavefronts_ideal"], kind
    assert launch["local_loads"] == launch["local_stores"] == 0


@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 128)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_and_bank_conflicts(emulated, K, V, dtype):
    """16 bits: T', two squares a chunk and head, is written by a kernel of its own and read."""
    x = leaves(make(Case(T=192, H=1, HV=2, K=K, V=V), dtype))
    with emulated.profile() as launches:
        o, ht = forward(x)
    *before, chain = launches
    inverses = len(before) * (192 // 64) * 2 * 2 * 64 * 64 * 2
    assert len(before) == (dtype == BF16)
    for launch in before:
        assert launch["unique_bytes_read"] <= 1.15 * size(x["k"], x["g"], x["beta"])
        assert launch["unique_bytes_written"] == inverses
    assert chain["unique_bytes_read"] <= 1.15 * (size(*x.values()) + inverses)
    assert chain["unique_bytes_written"] == size(o, ht)
    for launch in launches:
        assert_conflict_free(launch)


def test_launches(emulated):
    """T' and the chain; one for a tail that may be there; two more for segments, if they pay."""
    for name, options, count in (
        ("K64 V64", {}, 2),
        ("packed", {}, 3),
        ("K64 V64", {"auto_cp": True}, 4),
        ("long", {}, 4),
    ):
        case = CASES.get(name, Case(T=64 * 64, HV=1, K=16, V=8))
        with emulated.profile() as launches:
            forward(make(case, BF16), **options)
        assert len(launches) == count
