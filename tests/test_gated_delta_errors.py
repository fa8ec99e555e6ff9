"""Bad input to the gated delta rule, chunked or decode: one clear error before anything runs."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import deltafuse
from deltafuse.gated_delta import chunk_gated_delta_rule, gated_delta_rule_decode, ops
from gated_delta_cases import Case, make, offsets

CASE = Case(B=2, T=5, H=2, HV=4, K=6, V=8)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# what is wrong: (replaced arguments, texts that the message must hold)
BAD = {
    "B": ({"v": zeros(3, 5, 4, 8)}, ["v", "(2, 5, 2, 6)", "(3, 5, 4, 8)"]),
    "T": ({"v": zeros(2, 6, 4, 8)}, ["v", "(2, 5, 2, 6)", "(2, 6, 4, 8)"]),
    "dimensions": ({"q": zeros(5, 2, 6)}, ["q", "[B, T, H, K]", "(5, 2, 6)"]),
    "key_heads": ({"k": zeros(2, 5, 1, 6)}, ["k", "(2, 5, 2, 6)", "(2, 5, 1, 6)"]),
    "key_size": ({"k": zeros(2, 5, 2, 7)}, ["k", "(2, 5, 2, 7)"]),
    "group": ({"v": zeros(2, 5, 3, 8)}, ["multiple", "(2, 5, 2, 6)", "(2, 5, 3, 8)"]),
    "no_heads": ({"v": zeros(2, 5, 0, 8)}, ["(2, 5, 0, 8)"]),
    "g_heads": ({"g": zeros(2, 5, 2)}, ["g", "(2, 5, 4)", "(2, 5, 2)"]),
    "beta_heads": ({"beta": zeros(2, 5, 4, 8)}, ["beta", "(2, 5, 4)", "(2, 5, 4, 8)"]),
    "dtypes": ({"v": zeros(2, 5, 4, 8).half()}, ["v torch.float16", "q torch.float32"]),
    "state_count": ({"initial_state": zeros(1, 4, 6, 8)}, ["initial_state", "(2, 4, 6, 8)"]),
    "state_shape": ({"initial_state": zeros(2, 4, 8, 6)}, ["[N, HV, K, V]", "(2, 4, 8, 6)"]),
    "v_first_shape": (
        {"initial_state": zeros(2, 4, 6, 8), "state_v_first": True},
        ["[N, HV, V, K]", "(2, 4, 8, 6)"],
    ),
    "output_state": ({"output_state": zeros(2, 4, 8, 6)}, ["output_state", "(2, 4, 8, 6)"]),
    "pool_shape": (
        {"initial_state": zeros(9, 4, 8, 6), "state_indices": torch.tensor([0, 1])},
        ["[P, HV, K, V]", "(9, 4, 8, 6)"],
    ),
    "indices_count": (
        {"initial_state": zeros(9, 4, 6, 8), "state_indices": torch.tensor([0])},
        ["state_indices", "(2,)", "(1,)"],
    ),
    "indices_alone": (
        {"initial_state": None, "state_indices": torch.tensor([0, 1])},
        ["state_indices", "output_state"],
    ),
    "packed_batch": ({"cu_seqlens": offsets((2, 3))}, ["cu_seqlens", "B = 1", "(2, 5, 2, 6)"]),
    "offsets_dtype": ({"cu_seqlens": zeros(3)}, ["cu_seqlens", "int32", "torch.float32"]),
    "offsets_shape": ({"cu_seqlens": offsets((2, 3)).view(1, 3)}, ["[N + 1]", "(1, 3)"]),
    "no_offsets": ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, ["cu_seqlens", "(0,)"]),
    "indices_dtype": (
        {"initial_state": zeros(9, 4, 6, 8), "state_indices": zeros(2)},
        ["state_indices", "int32", "torch.float32"],
    ),
    "indices_beyond_the_pool": (
        {"initial_state": zeros(9, 4, 6, 8), "state_indices": torch.tensor([0, 9])},
        ["state_indices", "9", "[0, 9]"],
    ),
    "no_A_log": ({"use_gate_in_kernel": True}, ["A_log"]),
    "A_log_shape": (
        {"use_gate_in_kernel": True, "A_log": zeros(2)},
        ["A_log", "[HV]", "(4,)", "(2,)"],
    ),
    "dt_bias_shape": (
        {"use_gate_in_kernel": True, "A_log": zeros(4), "dt_bias": zeros(3)},
        ["dt_bias", "(4,)", "(3,)"],
    ),
    "unused_A_log": ({"A_log": zeros(4)}, ["A_log", "use_gate_in_kernel"]),
    "neg_eigval": ({"allow_neg_eigval": True}, ["allow_neg_eigval", "use_beta_sigmoid_in_kernel"]),
    "chunk_size": ({"chunk_size": 48}, ["chunk_size", "48"]),
    "precision": ({"precision": "low"}, ["precision", "'low'"]),
    "save_states": ({"save_states": "never"}, ["save_states", "'never'"]),
    "auto_cp": ({"auto_cp": "yes"}, ["auto_cp", "'yes'"]),
}


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*args):
        raise AssertionError("the operator was launched")

    monkeypatch.setattr(ops, "_run", run)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_launch(nothing_runs, name):
    replaced, texts = BAD[name]
    with pytest.raises(ValueError, match="^chunk_gated_delta_rule: ") as error:
        chunk_gated_delta_rule(**{**make(CASE), **replaced})
    for text in texts:
        assert re.search(r"(?<!\w)" + re.escape(text), str(error.value)), error.value


def test_other_devices_are_an_error(nothing_runs):
    x = {**make(CASE), "g": torch.zeros(2, 5, 4, device="meta")}
    with pytest.raises(ValueError, match="g on meta"):
        chunk_gated_delta_rule(**x)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_integers_are_an_error(nothing_runs, name):
    x = make(CASE)
    with pytest.raises(TypeError, match=f"{name} must be floating point, got torch.int64"):
        chunk_gated_delta_rule(**{**x, name: x[name].detach().long()})


def test_keywords_of_other_interfaces():
    x = make(CASE)
    with pytest.raises(TypeError, match="head_first .* transpose"):
        chunk_gated_delta_rule(**x, head_first=False)
    with pytest.raises(TypeError, match="cu_seqlen"):
        chunk_gated_delta_rule(**x, cu_seqlen=None)
    with pytest.raises(TypeError, match="cp_context must be a ContextParallel"):
        chunk_gated_delta_rule(**x, cp_context=object())
    x["initial_state"] = x["initial_state"].mT
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        o, _ = chunk_gated_delta_rule(**x, transpose_state_layout=True)
    assert torch.equal(o, chunk_gated_delta_rule(**x, state_v_first=True)[0])


def test_options_without_effect_on_the_cpu():
    x = make(CASE)
    expected = chunk_gated_delta_rule(**x)[0]
    options = {
        "save_states": True,
        "precision": "high",
        "batch_invariant": True,
        "enable_fwd_cp_cache": True,
        "chunk_indices": torch.zeros(3, 2),
        "auto_cp": False,
    }
    assert torch.equal(chunk_gated_delta_rule(**x, **options)[0], expected)


def test_debug_mode_looks_at_values(monkeypatch):
    monkeypatch.setattr(ops, "_debug", True)
    x = make(Case(T=10, lengths=(4, 6)))
    chunk_gated_delta_rule(**x)
    for bad in ([0, 6, 4], [0, 4, 11], [1, 4, 6]):
        with pytest.raises(ValueError, match=r"cu_seqlens.*" + re.escape(str(bad))):
            chunk_gated_delta_rule(**{**x, "cu_seqlens": torch.tensor(bad)})
    g = x["g"].detach().clone()
    g[0, 3] = -torch.inf  # a reset is legal
    chunk_gated_delta_rule(**{**x, "g": g})
    g[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="g of shape .* NaN"):
        chunk_gated_delta_rule(**{**x, "g": g})


@pytest.mark.parametrize("bounds", [[0, 6, 4], [0, 4, 11], [1, 4, 6], [0, -1, 6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bad_offsets_on_the_cpu_are_named_before_any_launch(nothing_runs, bounds, dtype):
    x = make(Case(T=10, lengths=(4, 6)))
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 .* T = 10, got") as error:
        chunk_gated_delta_rule(**{**x, "cu_seqlens": torch.tensor(bounds, dtype=dtype)})
    assert str(bounds) in str(error.value)


def test_fake_tensors_have_no_values_to_check():
    x = make(Case(T=10, lengths=(4, 6)))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in x.items()}
        o, ht = chunk_gated_delta_rule(**fake, output_final_state=True)
    assert o.shape == (1, 10, 2, 20) and ht.shape == (2, 2, 16, 20)


def test_bad_offsets_do_not_reach_other_memory():
    """The operator checks by itself what the function before it may not look at."""
    x = {name: t.detach() for name, t in make(Case(T=10, lengths=(4, 6))).items()}
    x["cu_seqlens"] = torch.tensor([0, 4, 1000])
    call = ops.Call(
        **x,
        A_log=None,
        dt_bias=None,
        scale=1.0,
        l2norm=False,
        sigmoid_scale=0.0,
        state_v_first=False,
        chunk_size=64,
        high_precision=False,
        split=0,
        batch_invariant=False,
    )
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.ops.deltafuse.gated_delta_fwd(*call, True, ops.NOTHING)


def test_exported_names():
    assert deltafuse.chunk_gated_delta_rule is deltafuse.gated_delta.chunk_gated_delta_rule
    assert deltafuse.gated_delta.chunk_gdn is chunk_gated_delta_rule


@pytest.mark.emulated
@pytest.mark.parametrize("H, HV", [(65536, 65536), (1, 65536)])
def test_decode_of_more_heads_than_a_grid_has(emulated, H, HV):
    q, v, gates = zeros(1, 1, H, 1), zeros(1, 1, HV, 1), zeros(1, 1, HV)
    message = re.escape(f"H and HV / H must be at most 65535 on CUDA, got q (1, 1, {H}, 1)")
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_decode(q, q, v, zeros(1, HV, 1, 1), zeros(HV), gates, zeros(HV), gates)
