"""What the emulator sees of the chunk-parallel kernel of the backward, and its gradients."""

import pytest
import torch

from deltafuse import _library
from deltafuse.gated_delta import chunk_gated_delta_rule
from gated_delta_cases import FUSED, Case, compare, make, outputs_and_gradients

pytestmark = pytest.mark.emulated

MODES = {
    "race": {"race": True},
    "race, shuffled 1": {"race": True, "seed": 1},
    "race, shuffled 2": {"race": True, "seed": 2},
    "race, shuffled 3": {"race": True, "seed": 3},
    "strict": {"strict": True},
    "early": {"async": "early"},
}
# every width of the K template, V tiles that are full, cut and several, groups, rows that are cut,
# slots that stay empty, rows that are no whole vectors
CASES = {
    "K64": Case(T=70, HV=2, K=64, V=64),
    "K128_V_cut": Case(T=64, H=2, HV=2, K=100, V=70),
    "K192_group3": Case(T=30, HV=3, K=160, V=64),
    "K256_two_tiles": Case(T=40, HV=2, K=256, V=128),
    "odd": Case(B=2, T=33, HV=2, K=5, V=3),
    "packed": Case(T=100, HV=2, K=24, V=20, lengths=(0, 1, 63, 0, 30)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _registered(emulated):
    if _library.kernel("gated_delta_bwd", torch.empty(0)) is None:
        pytest.skip("no backward of the chunk form in this build")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, dtype):
    compare(make(CASES[name], dtype), dht=CASES[name].dht)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_through_what_is_fused(dtype):
    compare(make(Case(T=70, HV=2, K=20, V=24), dtype, fused=True), factor=2, **FUSED)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("K128_V_cut", torch.bfloat16),
        ("K256_two_tiles", torch.bfloat16),
        ("K256_two_tiles", torch.float32),
        ("packed", torch.bfloat16),
        ("packed", torch.float32),
    ],
    ids=str,
)
def test_every_mode(emulated_with, name, dtype, mode):
    case = CASES[name]._replace(T=min(CASES[name].T, 40)) if name != "packed" else CASES[name]
    with emulated_with(**mode):
        compare(make(case, dtype), dht=case.dht)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_follows_a_sequence_does_not_reach_it(dtype):
    case = Case(T=100, HV=2, K=16, V=16, lengths=(40, 60))
    x = make(case, dtype)
    clean = outputs_and_gradients(chunk_gated_delta_rule, x)
    with torch.no_grad():
        for name in ("q", "k", "v", "g", "beta"):
            x[name][:, 40:] = float("nan")
    dirty = outputs_and_gradients(chunk_gated_delta_rule, x)
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert torch.equal(clean[name][:, :40], dirty[name][:, :40]), name


def test_the_same_bits_twice():
    x = make(CASES["K64"], torch.bfloat16)
    one, two = (outputs_and_gradients(chunk_gated_delta_rule, x) for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [64, 128, 256])
def test_bytes_and_banks(emulated, dtype, K):
    case = Case(T=128, HV=2, K=K, V=128)
    x = make(case, dtype)
    with emulated.profile() as launches:
        outputs_and_gradients(chunk_gated_delta_rule, x)
    (launch,) = (one for one in launches if "chunk_grads_kernel" in one["kernel"])
    C = 32 if dtype == torch.float32 else 64
    element, tokens = x["q"].element_size(), case.T * case.HV
    states = case.T // C * case.HV * K * case.V * element
    inverses = tokens * C * (4 if dtype == torch.float32 else 2 * element)
    tables = 2 * size(x["g"])
    keys, values = size(x["q"], x["k"]), size(x["v"])
    assert launch["unique_bytes_read"] <= 1.15 * (
        2 * states + inverses + tables + keys + 3 * values  # v, dO, dW
    )
    assert launch["unique_bytes_written"] == tables + keys
    assert launch["local_loads"] == launch["local_stores"] == 0
    for kind in ("load", "store"):
        wavefronts = launch[f"shared_{kind}_wavefronts"]
        assert wavefronts <= 1.1 * launch[f"shared_{kind}_wavefronts_ideal"], kind
