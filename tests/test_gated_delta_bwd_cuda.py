"""The backward of the chunk form on CUDA, on the emulator: every variant, races, bytes moved."""

import pytest
import torch

from deltafuse.gated_delta import chunk_gated_delta_rule
from deltafuse.testing import assert_close
from gated_delta_cases import FUSED, Case, compare, make, outputs_and_gradients
from test_gated_delta_regimes import GATES, replaced

pytestmark = pytest.mark.emulated

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MODES = {
    "race": {"race": True},
    "shuffled 1": {"seed": 1},
    "race, shuffled 2": {"race": True, "seed": 2},
    "shuffled 3": {"seed": 3},
    "strict": {"strict": True},
    "early": {"async": "early", "race": True},
}
# chunks of 64 tokens (float32: 32), tiles of 64 channels; TMA takes rows of whole 16 bytes only
CASES = {
    "K64_V64": Case(T=130, H=1, HV=2, K=64, V=64),
    "odd_K_V_group3": Case(T=70, H=1, HV=3, K=33, V=21, dht=False),
    "K128_V128": Case(B=2, T=65, H=2, HV=2, K=128, V=128, h0=False),
    "K192_V72": Case(T=66, HV=1, K=192, V=72),
    "K256_V192": Case(T=40, HV=1, K=256, V=192, dht=False),
    "packed": Case(T=150, HV=2, K=24, V=40, lengths=(0, 1, 63, 64, 0, 17)),
    "one_token": Case(B=3, T=1, HV=1, K=16, V=8),
}
MANY_CHAINS = Case(B=66, T=3, HV=2, K=16, V=128)  # enough for CTAs of two tiles of V


def gradients(x, dht=True, **options):
    return outputs_and_gradients(chunk_gated_delta_rule, x, dht, **options)


def assert_same_bits(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(emulated, name, dtype):
    compare(make(CASES[name], dtype), dht=CASES[name].dht)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_tiles_of_V_a_block(emulated, dtype):
    compare(make(MANY_CHAINS, dtype))


@pytest.mark.parametrize("chains, ctas", [(66, 132), (67, 67)])
def test_ctas_of_one_tile_of_V_where_all_run_at_once(emulated, chains, ctas):
    x = make(Case(B=chains, T=3, HV=1, K=16, V=128), BF16)
    with emulated.profile() as launches:
        gradients(x)
    assert [at["grid"][0] for at in launches if "bwd_states" in at["kernel"]] == [ctas]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["K128_V128", "packed"])
def test_preactivations(emulated, name, dtype):
    compare(make(CASES[name], dtype, fused=True), 2, dht=CASES[name].dht, **FUSED)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_in_every_mode(emulated_with, dtype, mode):
    case = Case(T=200, HV=2, K=64, V=64, lengths=(0, 130, 1, 64))
    x = make(case, dtype, fused=True)
    with emulated_with(**mode):
        compare(x, 2, **FUSED)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_gate_regimes(emulated, name, dtype):
    x = make(Case(T=100, HV=2, K=32, V=24), dtype)
    g = GATES[name](x["g"].shape)
    actual, expected = compare(replaced(x, g=g))
    if g.isfinite().all():
        sums = [(g.double() * r["dg"].double()).sum() for r in (actual, expected)]
        torch.testing.assert_close(*sums, rtol=2e-2 if dtype == BF16 else 1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("A", [0.03, 16.0])
def test_gradients_of_the_gate_parameters(emulated, A, dtype):
    x = make(Case(T=100, HV=2, K=32, V=24), dtype, fused=True)
    _, expected = compare(replaced(x, A_log=torch.full((2,), A).log()), 2, **FUSED)
    assert (expected["dA_log"].abs() > 1e-6).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_no_decay_and_strong_writes(emulated, dtype):
    x = make(Case(T=100, HV=2, K=32, V=24), dtype)
    compare(replaced(x, beta=2 * x["beta"].detach(), g=torch.zeros_like(x["g"])), 2)


def test_gradients_satisfy_euler(emulated):
    x = make(Case(T=100, HV=2, K=32, V=24))
    result = gradients(x)
    first = (result["dinitial_state"] * x["initial_state"]).double().sum((0, 2, 3))
    assert_close("dg of the first token", result["dg"][0, 0], first, 1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_recomputed_states_and_a_second_run_give_the_same_bits(emulated, dtype):
    x = make(CASES["packed"], dtype, fused=True)
    saved = gradients(x, save_states=True, **FUSED)
    assert_same_bits(saved, gradients(x, save_states=True, **FUSED))
    assert_same_bits(saved, gradients(x, save_states=False, **FUSED))
    cut = gradients(x, save_states=True, auto_cp=True, **FUSED)
    assert_same_bits(cut, gradients(x, save_states=False, auto_cp=True, **FUSED))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_v_first_states_give_the_same_bits(emulated, dtype):
    x = make(Case(T=70, HV=2, K=40, V=72), dtype)
    result = gradients(x)
    o, ht = chunk_gated_delta_rule(
        **{**x, "initial_state": x["initial_state"].transpose(2, 3)},
        output_final_state=True,
        state_v_first=True,
    )
    random = torch.Generator().manual_seed(7)  # as in outputs_and_gradients
    d_o, d_ht = (torch.randn(t.shape, generator=random).bfloat16() for t in (o, result["ht"]))
    leaves = {name: t for name, t in x.items() if t.is_floating_point()}
    ds = d_o.to(o), d_ht.to(ht).transpose(2, 3)
    grads = torch.autograd.grad((o, ht), tuple(leaves.values()), ds)
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, result["d" + name]), name


def test_strided_inputs_give_the_same_bits(emulated):
    case = Case(T=70, H=2, HV=2, K=64, V=64, h0=False)
    x = make(case, BF16)
    qkv = torch.cat([x[n].detach() for n in "qkv"], 2).requires_grad_()
    views = dict(zip("qkv", qkv.split(2, 2), strict=True))
    o = chunk_gated_delta_rule(**{**x, **views})[0]
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    spread = d_o.transpose(1, 2).contiguous().transpose(1, 2)
    (whole,) = torch.autograd.grad(o, qkv, spread)
    parts = torch.autograd.grad(
        chunk_gated_delta_rule(**x)[0], [x[n] for n in "qkv"], d_o.contiguous()
    )
    assert torch.equal(whole, torch.cat(parts, 2))


def test_only_what_is_asked_for(emulated):
    x = {name: t.detach() for name, t in make(CASES["packed"], BF16).items()}
    all_of_them = gradients(make(CASES["packed"], BF16))
    for wanted in ("k", "beta", "initial_state"):
        x[wanted].requires_grad_()
        o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
        random = torch.Generator().manual_seed(7)
        ds = [torch.randn(t.shape, generator=random).bfloat16().to(t) for t in (o, ht)]
        (grad,) = torch.autograd.grad((o, ht), x[wanted], ds)
        assert torch.equal(grad, all_of_them["d" + wanted]), wanted
        x[wanted].requires_grad_(False)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tail_is_zero_and_everything_is_written(emulated, nan_filled_memory, dtype):
    x = make(CASES["packed"], dtype)
    with torch.no_grad():
        for name in ("q", "k", "v", "g", "beta"):
            x[name][:, -5:] = torch.nan
    result = gradients(x)
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert torch.count_nonzero(result[name][:, -5:]) == 0, name
    for name, value in result.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nan_stays_in_its_sequence_and_group(emulated, dtype):
    case = Case(T=150, H=2, HV=4, K=64, V=64, lengths=(40, 70, 40))
    x = make(case, dtype)
    clean = gradients(x)
    with torch.no_grad():
        x["k"][0, 60, 1] = torch.nan  # of the sequence in the middle, group 1
        x["v"][0, 45, 3] = torch.inf
    result = gradients(x)
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert torch.equal(result[name][:, :40], clean[name][:, :40]), name
        assert torch.equal(result[name][:, 110:], clean[name][:, 110:]), name
        heads = result[name].shape[2] // 2
        assert torch.equal(result[name][:, :, :heads], clean[name][:, :, :heads]), name
    assert torch.equal(result["dinitial_state"][1, :2], clean["dinitial_state"][1, :2])


SEGMENTS = {  # of three segments and more: M of those in the middle matters
    "even": Case(T=1024, HV=1, K=64, V=64),
    "packed": Case(T=400, HV=1, K=33, V=72, lengths=(200, 0, 1, 130, 64), dht=False),
    "K256": Case(T=245, HV=1, K=256, V=32, lengths=(200, 0, 0, 1, 40)),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_side_by_side_change_rounding_only(emulated, name, dtype):
    """Without decay, which would hide errors, and with keys longer than one."""
    case = SEGMENTS[name]
    x = make(case, dtype)
    x = replaced(
        x,
        g=torch.zeros_like(x["g"]),
        k=3 * x["k"].detach(),
        beta=0.2 * x["beta"].detach(),
    )
    cut, _ = compare(x, 2, dht=case.dht, auto_cp=True)
    whole = gradients(x, case.dht, auto_cp=False)
    assert any(not torch.equal(whole[key], cut[key]) for key in ("dv", "dk"))
    if dtype == F32:
        for key, value in whole.items():
            assert_close(key, cut[key], value, 1e-5)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_segments_in_every_mode(emulated_with, mode):
    x = make(Case(T=200, HV=1, K=64, V=64, lengths=(200, 0, 0, 0)), BF16, fused=True)
    with emulated_with(**mode):
        compare(x, 2, auto_cp=True, **FUSED)


def test_states_without_tokens(emulated):
    for case in (Case(T=0, HV=2, K=16, V=16), Case(T=4, HV=2, K=16, V=16, lengths=(0, 0))):
        x = make(case, BF16, fused=True)
        result = gradients(x, **FUSED)
        random = torch.Generator().manual_seed(7)
        torch.randn(result["o"].shape, generator=random)
        dht = torch.randn(result["ht"].shape, generator=random).bfloat16().float()
        assert torch.equal(result["dinitial_state"], dht)
        for name in ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias"):
            assert torch.count_nonzero(result[name]) == 0, name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_chain_moves_the_fewest_bytes(emulated, dtype):
    case = Case(T=256, H=1, HV=1, K=64, V=64)
    x = make(case, dtype)
    with emulated.profile() as launches:
        gradients(x, save_states=True)
    (chain,) = (launch for launch in launches if "bwd_states" in launch["kernel"])
    size, C = x["q"].element_size(), 32 if dtype == F32 else 64
    chunks = case.T // C
    inverse = C * C * size * (1 if dtype == F32 else 2)
    state, tokens = case.K * case.V, case.T
    read = tokens * (size * (2 * case.K + case.V) + 8) + chunks * inverse + 4 * state
    written = tokens * size * case.V + chunks * size * state + 4 * state
    assert read <= chain["unique_bytes_read"] <= 1.15 * read
    assert written <= chain["unique_bytes_written"] <= 1.15 * written
    assert chain["global_store_sectors"] <= 1.1 * written / 32
    assert chain["local_loads"] == chain["local_stores"] == 0
    for kind in ("load", "store"):
        ideal = chain[f"shared_{kind}_wavefronts_ideal"]
        assert chain[f"shared_{kind}_wavefronts"] <= 1.1 * ideal
