"""What only the emulator sees of the CUDA kernels: races, bounds, late copies, bytes moved."""

import pytest
import torch

from conftest import MODES
from deltafuse import backend_info
from deltafuse.gated_delta import gated_delta_rule_decode
from test_gated_delta_decode import check, make

pytestmark = pytest.mark.emulated

# one call for each variant of the decode kernel: layout, element of the state, K tile, vectors
DECODE = {
    "float v_first": {"shape": (1, 2, 1, 2, 128, 20)},
    "float k_first": {"shape": (1, 2, 1, 2, 128, 20), "v_first": False},
    "float v_first 256": {"shape": (1, 1, 1, 1, 256, 9)},
    "float k_first 256": {"shape": (1, 1, 1, 1, 256, 12), "v_first": False},
    "bfloat16 v_first 64": {"shape": (1, 8, 1, 1, 64, 9), "state_dtype": torch.bfloat16},
    "bfloat16 k_first 128": {
        "shape": (1, 2, 1, 1, 128, 24),
        "state_dtype": torch.bfloat16,
        "v_first": False,
    },
    "float16 k_first 256": {
        "shape": (1, 1, 1, 1, 256, 24),
        "state_dtype": torch.float16,
        "v_first": False,
    },
    "scalar v_first": {"shape": (2, 2, 1, 1, 33, 17)},
    "scalar k_first": {"shape": (2, 2, 1, 1, 33, 17), "v_first": False},
    "four warps": {"shape": (66, 1, 1, 4, 32, 32)},  # 264 CTAs: enough for the largest
}
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def decode_inputs(case):
    options = dict(DECODE[case])
    return make(*options.pop("shape"), **options)


def profiled(emulated, call, **more):
    with emulated.profile() as launches:
        output = gated_delta_rule_decode(**call, **more)
    (launch,) = launches
    return launch, output


def test_decode_is_registered_as_a_kernel(emulated):
    assert backend_info()["build"].startswith("cuda emulated")
    assert backend_info()["ops"]["gated_delta_decode"]["cpu"] == "cpu"


@in_every_mode
@pytest.mark.parametrize("case", DECODE)
def test_decode_in_every_mode(emulated_with, case, mode):
    call = decode_inputs(case)
    limit = 5e-6 if call["state"].dtype == torch.float32 else 6e-3
    with emulated_with(**mode):
        check(call, 5e-6, limit)


def test_strict_sees_the_slots_and_padding_of_decode(emulated_with):
    call = make(3, 2, 1, 2, 16, 8, P=6)
    buffer = torch.zeros(6, 300)
    call["state"] = buffer[:, 4:260].unflatten(1, (2, 8, 16))
    call["state_indices"] = torch.tensor([5, -1, 2])
    call["snapshots"] = torch.zeros(3, 2, 2, 8, 16)
    fused = torch.randn(3, 2, 1, 32)
    call["q"], call["k"] = fused.chunk(2, -1)
    with emulated_with(strict=True):
        gated_delta_rule_decode(**call)


@pytest.mark.parametrize("case", DECODE)
def test_decode_moves_the_fewest_bytes(emulated, case):
    call = decode_inputs(case)
    before = [call[name] for name in ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")]
    launch, output = profiled(emulated, call)
    assert launch["unique_bytes_read"] == size(*before)
    assert launch["unique_bytes_written"] == size(output, call["state"])
    assert launch["local_loads"] == launch["local_stores"] == 0
    assert launch["block"][0] == (128 if case == "four warps" else 32)
    # reads of the staged operands: at most a second wavefront for a warp's v
    assert launch["shared_load_wavefronts"] <= 1.25 * launch["shared_load_wavefronts_ideal"]
    assert launch["shared_store_wavefronts"] <= 4 * launch["shared_store_wavefronts_ideal"]


@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_accesses_whole_sectors(emulated, state_dtype, v_first):
    call = make(1, 1, 1, 1, 128, 64, state_dtype=state_dtype, v_first=v_first)
    launch, _ = profiled(emulated, call)
    for kind in ("load", "store"):
        sectors = launch[f"global_{kind}_sectors"]
        assert sectors <= 1.15 * launch[f"global_{kind}_sectors_ideal"], kind
    # of the state no sector twice: the rest of the traffic is q, k and gates once a CTA
    once = size(call["state"]) // 32
    per_cta = size(call["q"], call["k"]) // 32 + 16
    assert launch["global_load_sectors"] <= once + launch["grid"][0] * per_cta
    assert launch["global_store_sectors"] <= once + 64


def test_padding_rows_of_decode_read_no_state(emulated):
    call = make(2, 1, 1, 1, 16, 8)
    indices = torch.tensor([-1, -1])
    launch, output = profiled(emulated, call, state_indices=indices)
    assert launch["unique_bytes_read"] == size(indices)
    assert launch["unique_bytes_written"] == size(output)


def test_decode_refuses_what_it_has_no_kernel_for(emulated):
    call = make(1, 1, 1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        gated_delta_rule_decode(**call)
    with pytest.raises(RuntimeError, match="K must be at most 256"):
        gated_delta_rule_decode(**make(1, 1, 1, 1, 260, 8))


def test_an_index_beyond_the_pool_stops_the_launch(emulated):
    call = make(1, 1, 1, 1, 8, 8)
    with pytest.raises(RuntimeError, match="CUDA error"):
        gated_delta_rule_decode(**call, state_indices=torch.tensor([1]))
    emulated.reset()
