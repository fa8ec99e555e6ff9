"""The adapters with the arguments of flashinfer: prefill with a linear decay, decode, verify."""

import ast
import inspect

import pytest
import torch

from deltafuse.gated_delta import (
    gated_delta_rule_decode,
    naive_recurrent_gated_delta_rule,
    segments,
)
from deltafuse.integrations import flashinfer
from deltafuse.integrations.flashinfer import chunk_gated_delta_rule
from deltafuse.testing import assert_close
from flashinfer_package import package
from gated_delta_cases import Case, make
from layer_cases import normal

CASE = Case(T=40, H=2, HV=4, K=8, V=12, lengths=(10, 0, 30))


def packed(x):
    """make()'s tensors without the batch dimension, and the log-decay as a linear one."""
    x = {
        name: t.detach()[0] if name in ("q", "k", "v", "g", "beta") else t.detach()
        for name, t in x.items()
    }
    x["g"] = x["g"].exp()
    x["initial_state"] = x["initial_state"].mT.contiguous()
    return x


@pytest.mark.parametrize("l2norm", [False, True])
def test_equals_the_recurrence(l2norm):
    x = make(CASE, torch.float64)
    expected, state = naive_recurrent_gated_delta_rule(
        **x, output_final_state=True, use_qk_l2norm_in_kernel=l2norm
    )
    y = packed(x)
    o, ht = chunk_gated_delta_rule(**y, output_final_state=True, use_qk_l2norm_in_kernel=l2norm)
    assert_close("o", o, expected[0], 1e-12)
    assert_close("ht", ht, state.mT, 1e-12)


def test_l2norm_really_normalises():
    y = packed(make(CASE, torch.float64))
    plain = chunk_gated_delta_rule(**y)
    y["q"], y["k"] = 5 * y["q"], 3 * y["k"]
    assert_close("o", chunk_gated_delta_rule(**y, use_qk_l2norm_in_kernel=True), plain, 1e-5)


def test_more_query_heads_than_key_heads():
    y = packed(make(CASE._replace(H=4), torch.float64))
    y["k"], y["v"] = y["k"][:, :2], y["v"][:, :2]
    o = chunk_gated_delta_rule(**y)
    for h in range(4):
        one = {n: y[n][:, h : h + 1] for n in ("q", "g", "beta", "initial_state")}
        one |= {n: y[n][:, h // 2 : h // 2 + 1] for n in ("k", "v")}
        expected = chunk_gated_delta_rule(**one, cu_seqlens=y["cu_seqlens"])
        assert_close("o", o[:, h : h + 1], expected, 1e-14)


def test_defaults_are_no_decay_and_full_strength():
    y = packed(make(CASE, torch.float64))
    ones = {"g": torch.ones_like(y["g"]), "beta": torch.ones_like(y["beta"])}
    expected = chunk_gated_delta_rule(**{**y, **ones})
    assert torch.equal(chunk_gated_delta_rule(**{**y, "g": None, "beta": None}), expected)


def test_decay_of_zero_is_finite():
    y = packed(make(CASE))
    y["g"][5] = 0
    assert chunk_gated_delta_rule(**y).isfinite().all()


def test_given_outputs_are_filled():
    y = packed(make(CASE))
    o, ht = chunk_gated_delta_rule(**y, output_final_state=True)
    out, state = torch.full_like(o, torch.nan), torch.full_like(ht, torch.nan)
    given = chunk_gated_delta_rule(**y, output_final_state=True, output=out, output_state=state)
    assert given[0] is out and given[1] is state
    assert torch.equal(out, o) and torch.equal(state, ht)


def test_bad_input():
    y = packed(make(CASE))
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunk_gated_delta_rule(**{**y, "cu_seqlens": None})
    with pytest.raises(ValueError, match=r"q \(40, 2, 8\), k \(40, 1, 8\), v \(40, 4, 12\)"):
        chunk_gated_delta_rule(**{**y, "k": y["k"][:, :1]})
    with pytest.raises(ValueError, match=r"output must be .*\(40, 4, 12\), got \(3,\)"):
        chunk_gated_delta_rule(**y, output=torch.zeros(3))


def test_pool_of_states():
    y = packed(make(CASE))
    o, ht = chunk_gated_delta_rule(**y, output_final_state=True)
    pool = torch.full((6, *ht.shape[1:]), torch.nan)
    slots = torch.tensor([4, 0, 2])
    pool[slots] = y.pop("initial_state")
    pooled = chunk_gated_delta_rule(
        **y, initial_state=pool, output_state=pool, state_indices=slots, max_seqlen=30
    )
    assert torch.equal(pooled, o)
    assert torch.equal(pool[slots], ht) and pool[[1, 3, 5]].isnan().all()


@pytest.mark.parametrize("use_cp, runs", [("auto", 0), (False, 0), (True, 1)])
def test_segments_when_asked_for(monkeypatch, use_cp, runs):
    y, calls = packed(make(CASE._replace(T=240, lengths=(200, 0, 40)))), []
    whole = chunk_gated_delta_rule(**y)
    split = segments.run_split

    def counted(*args, **options):
        calls.append(1)
        return split(*args, **options)

    monkeypatch.setattr(segments, "run_split", counted)
    assert_close("o", chunk_gated_delta_rule(**y, use_cp=use_cp), whole, 1e-5)
    assert len(calls) == runs


# read from flashinfer 0.7.2.post1
SIGNATURES = {
    "chunk_gated_delta_rule": (
        "gdn_prefill.py",
        "q k v g=None beta=None scale=None initial_state=None output_final_state=False "
        "cu_seqlens=None use_qk_l2norm_in_kernel=False output=None output_state=None",
        {"use_cp": "auto", "state_indices": None, "max_seqlen": None},
    ),
    "gated_delta_rule_decode_pretranspose": (
        "gdn_decode.py",
        "q k v state A_log a dt_bias b scale=None output=None use_qk_l2norm=True "
        "initial_state=None initial_state_indices=None output_state_indices=None "
        "intermediate_states_buffer=None disable_state_update=False",
        {},
    ),
    "gated_delta_rule_decode": (
        "gdn_decode.py",
        "q k v state A_log a dt_bias b scale=None output=None use_qk_l2norm=True",
        {},
    ),
    "gated_delta_rule_mtp": (
        "gdn_decode.py",
        "q k v initial_state initial_state_indices A_log a dt_bias b scale=None output=None "
        "intermediate_states_buffer=None ssm_state_indices=None disable_state_update=None "
        "use_qk_l2norm=True output_state_indices=None",
        {},
    ),
}


def text(name, default, empty):
    return name if default is empty else f"{name}={default}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults(name):
    _, expected, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(flashinfer, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [text(p.name, p.default, p.empty) for p in positional] == expected.split()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_table_is_what_the_package_has(name):
    """flashinfer's own source begins with the same arguments; read, not imported."""
    root = package()
    file, expected, keywords = SIGNATURES[name]
    body = ast.parse((root / file).read_text()).body
    arguments = next(node for node in body if getattr(node, "name", None) == name).args
    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    theirs = {
        a.arg: a.arg if value is None else f"{a.arg}={ast.unparse(value)}"
        for a, value in zip(arguments.args, missing + arguments.defaults, strict=True)
    }
    assert [*theirs.values()][: len(expected.split())] == expected.split()
    for keyword, default in keywords.items():
        assert theirs[keyword] == f"{keyword}={default!r}"


def decode_inputs(T, P=None, dtype=torch.float32):
    """q, k, v, states, A_log, a, dt_bias, b of three rows."""
    B, H, HV, K, V = 3, 2, 4, 8, 12
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, HV, V), (P or B, HV, V, K))
    q, k, v, states = (normal(*shape, seed=n) for n, shape in enumerate(shapes))
    a, b = normal(B, T, HV, seed=4), normal(B, T, HV, seed=5)
    return q, k, v, states.to(dtype), normal(HV, seed=6), a, normal(HV, seed=7), b


def test_decode_updates_the_state_in_place():
    q, k, v, state, *gates = decode_inputs(1)
    ours = state.clone()
    expected = gated_delta_rule_decode(q, k, v, ours, *gates)
    o, returned = flashinfer.gated_delta_rule_decode_pretranspose(q, k, v, state, *gates)
    assert returned is state and torch.equal(o, expected) and torch.equal(state, ours)
    k_first = decode_inputs(1)[3].mT.contiguous()
    o, returned = flashinfer.gated_delta_rule_decode(q, k, v, k_first, *gates)
    assert returned is k_first
    assert_close("o", o, expected, 1e-6)
    assert_close("state", k_first.mT, ours, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_from_a_pool(dtype):
    q, k, v, pool, *gates = decode_inputs(1, P=7, dtype=dtype)
    before, read, write = pool.clone(), torch.tensor([5, -1, 2]), torch.tensor([0, -1, 2])
    states = before[[5, 0, 2]]
    expected = gated_delta_rule_decode(q, k, v, states, *gates)
    o, returned = flashinfer.gated_delta_rule_decode_pretranspose(
        q, k, v, None, *gates, None, None, True, pool, read, write
    )
    assert returned is pool and torch.equal(o[[0, 2]], expected[[0, 2]]) and not o[1].any()
    assert torch.equal(pool[[0, 2]], states[[0, 2]])
    assert torch.equal(pool[[1, 3, 4, 5, 6]], before[[1, 3, 4, 5, 6]])


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("function", ["pretranspose", "mtp"])
def test_verify_keeps_the_pool_and_stores_each_state(function, larger):
    q, k, v, pool, *gates = decode_inputs(3, P=7)
    before, slots = pool.clone(), torch.tensor([5, -1, 2], dtype=torch.int32)
    states, snapshots = before[[5, 0, 2]], torch.empty(3, 3, 4, 12, 8)
    expected = gated_delta_rule_decode(q, k, v, states, *gates, snapshots=snapshots)
    buffer = torch.full((4, 5, 4, 12, 8) if larger else (3, 3, 4, 12, 8), torch.nan)
    options = {"intermediate_states_buffer": buffer, "disable_state_update": True}
    if function == "mtp":
        o, returned = flashinfer.gated_delta_rule_mtp(q, k, v, pool, slots, *gates, **options)
    else:
        options |= {"initial_state": pool, "initial_state_indices": slots}
        o, returned = flashinfer.gated_delta_rule_decode_pretranspose(
            q, k, v, None, *gates, **options
        )
    assert returned is pool and torch.equal(pool, before)
    assert torch.equal(o[[0, 2]], expected[[0, 2]]) and not o[1].any()
    assert torch.equal(buffer[[0, 2], :3], snapshots[[0, 2]])
    assert buffer[1].isnan().all() and buffer[3:].isnan().all() and buffer[:, 3:].isnan().all()


def test_each_draft_token_to_a_slot_of_its_own():
    q, k, v, pool, *gates = decode_inputs(2, P=9)
    before, slots = pool.clone(), torch.tensor([5, -1, 2])
    states, snapshots = before[[5, 0, 2]], torch.empty(3, 2, 4, 12, 8)
    gated_delta_rule_decode(q, k, v, states, *gates, snapshots=snapshots)
    flashinfer.gated_delta_rule_mtp(
        *(q, k, v, pool, slots, *gates),
        ssm_state_indices=torch.tensor([[7, 5], [8, 8], [-1, 2]]),
        disable_state_update=False,
    )
    assert torch.equal(pool[7], snapshots[0, 0])
    assert torch.equal(pool[[5, 2]], states[[0, 2]])
    assert torch.equal(pool[[0, 1, 3, 4, 6, 8]], before[[0, 1, 3, 4, 6, 8]])


def test_mtp_warns_of_its_default():
    q, k, v, pool, *gates = decode_inputs(2)
    before = pool.clone()
    with pytest.warns(FutureWarning, match="disable_state_update"):
        flashinfer.gated_delta_rule_mtp(q, k, v, pool, torch.arange(3), *gates)
    assert torch.equal(pool, before)


BAD_DECODES = {
    "pool without indices": (1, {"state": None, "initial_state": 0}, "go together"),
    "no state": (1, {"state": None}, "one of state and initial_state"),
    "both": (1, {"initial_state": 0, "initial_state_indices": 1}, "one of state"),
    "where to without a pool": (1, {"output_state_indices": 1}, "needs the pool"),
    "buffer for one token": (
        1,
        {"intermediate_states_buffer": 0},
        r"T > 1, got q .*\(3, 1, 2, 8\)",
    ),
    "no update for one token": (1, {"disable_state_update": True}, "T > 1"),
    "short buffer": (
        2,
        {"intermediate_states_buffer": torch.zeros(3, 1, 4, 12, 8)},
        r"\(3, 2\), got \(3, 1, 4, 12, 8\)",
    ),
}


@pytest.mark.parametrize("name", BAD_DECODES)
def test_bad_decodes(name):
    T, replaced, message = BAD_DECODES[name]
    names = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
    inputs = dict(zip(names, decode_inputs(T), strict=True))
    with pytest.raises(ValueError, match=message):
        flashinfer.gated_delta_rule_decode_pretranspose(**{**inputs, **replaced})


def test_bad_calls():
    q, k, v, pool, *gates = decode_inputs(2)
    with pytest.raises(ValueError, match="ssm_state_indices excludes"):
        flashinfer.gated_delta_rule_mtp(
            *(q, k, v, pool, torch.arange(3), *gates),
            ssm_state_indices=torch.zeros(3, 2, dtype=torch.int32),
            disable_state_update=True,
        )
    with pytest.raises(TypeError, match="backend"):
        flashinfer.gated_delta_rule_decode(q, k, v, pool, *gates, backend="cake_gdn")
    y = packed(make(CASE))
    with pytest.raises(ValueError, match="needs the pool output_state"):
        chunk_gated_delta_rule(**y, state_indices=torch.arange(3), output_final_state=True)
