"""Packed sequences, splits of a sequence, and pools of states of the chunked gated delta rule."""

import pytest
import torch

from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from deltafuse.testing import assert_close, relative_error
from gated_delta_cases import (
    FUSED,
    Case,
    compare,
    exactly,
    limit_of,
    make,
    offsets,
    outputs_and_gradients,
    require_kernel,
)

LENGTHS = (0, 1, 63, 64, 65, 200, 0)
PACKED = Case(T=sum(LENGTHS) + 7, lengths=LENGTHS, H=1, HV=2, K=20, V=24)
TOKENS = ("q", "k", "v", "g", "beta")


def detached(x):
    return {name: t.detach() for name, t in x.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(dtype):
    compare(make(PACKED, dtype, fused=True), 2, **FUSED)


def test_offsets_of_both_widths_agree():
    x = detached(make(PACKED))
    wide = chunk_gated_delta_rule(**x)[0]
    x["cu_seqlens"] = x["cu_seqlens"].int()
    assert torch.equal(chunk_gated_delta_rule(**x)[0], wide)


def test_packed_equals_separate_calls_bitwise():
    x = detached(make(PACKED))
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    bounds = x["cu_seqlens"].tolist()
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {name: x[name][:, start:end] for name in TOKENS}
        part["initial_state"] = x["initial_state"][n : n + 1]
        o_n, ht_n = chunk_gated_delta_rule(**part, output_final_state=True)
        assert torch.equal(o[:, start:end], o_n)
        assert torch.equal(ht[n : n + 1], ht_n)


@pytest.mark.parametrize("options", [{}, FUSED], ids=["plain", "fused"])
def test_padding_tail_is_zero(nan_filled_memory, options):
    x = make(PACKED, fused=options is FUSED)
    with torch.no_grad():
        for name in TOKENS:
            x[name][:, -7:] = torch.nan  # is not even read
    result = outputs_and_gradients(chunk_gated_delta_rule, x, **options)
    assert all(value.isfinite().all() for value in result.values())
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        assert torch.count_nonzero(result[name][:, -7:]) == 0, name


def test_empty_sequences_keep_their_state():
    x = make(PACKED)
    result = outputs_and_gradients(chunk_gated_delta_rule, x)
    for n in (0, 6):
        assert torch.equal(result["ht"][n], x["initial_state"][n])
    only = make(Case(T=4, lengths=(0, 0, 0)))  # nothing but padding
    o, ht = chunk_gated_delta_rule(**only, output_final_state=True)
    assert torch.count_nonzero(o) == 0
    assert torch.equal(ht, only["initial_state"])
    (dh0,) = torch.autograd.grad(ht.sum(), only["initial_state"])
    assert torch.equal(dh0, torch.ones_like(dh0))


def test_no_sequence_at_all(device, nan_filled_memory):
    require_kernel(device)
    x = make(Case(T=70, K=16, V=24, h0=False), torch.float32, device)
    x["cu_seqlens"] = offsets((), device=device)
    result = outputs_and_gradients(chunk_gated_delta_rule, x)
    assert result["ht"].shape[0] == 0
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        assert torch.count_nonzero(result[name]) == 0, name


def test_many_sequences_of_one_token():
    """One token a sequence is a batch of single tokens."""
    x = detached(make(Case(T=1000, lengths=(1,) * 1000, HV=2, K=8, V=8)))
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    batch = {name: x[name].transpose(0, 1) for name in TOKENS}
    o_b, ht_b = chunk_gated_delta_rule(
        **batch, initial_state=x["initial_state"], output_final_state=True
    )
    assert torch.equal(o, o_b.transpose(0, 1))
    assert torch.equal(ht, ht_b)


def test_permuted_sequences_give_permuted_results():
    x = detached(make(Case(T=150, lengths=(30, 50, 70))))
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    order = [2, 0, 1]

    def shuffle(t):
        parts = t.split([30, 50, 70], 1)
        return torch.cat([parts[n] for n in order], 1)

    y = {name: shuffle(x[name]) for name in TOKENS}
    o_p, ht_p = chunk_gated_delta_rule(
        **y,
        initial_state=x["initial_state"][order],
        output_final_state=True,
        cu_seqlens=offsets((70, 30, 50)),
    )
    assert torch.equal(o_p, shuffle(o))
    assert torch.equal(ht_p, ht[order])


@pytest.mark.parametrize("first", [64, 128, 50])
def test_continuing_from_a_state(first):
    """All tokens at once equal a part and then the rest; bitwise on the grid of 64 tokens."""
    x = detached(make(Case(B=2, T=200)))
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True, batch_invariant=True)
    state, outputs = x["initial_state"], []
    for part in (slice(first), slice(first, None)):
        tokens = {name: x[name][:, part] for name in TOKENS}
        o_part, state = chunk_gated_delta_rule(
            **tokens, initial_state=state, output_final_state=True, batch_invariant=True
        )
        outputs.append(o_part)
    if first % 64 == 0:
        assert torch.equal(torch.cat(outputs, 1), o)
        assert torch.equal(state, ht)
    assert_close("o", torch.cat(outputs, 1), o, 1e-6)
    assert_close("ht", state, ht, 1e-6)


SPLITS = {
    "plain": (Case(B=2, T=300, H=1, HV=2), {}),
    "shorter_than_a_segment": (Case(T=40), {}),
    "without_state": (Case(T=200, h0=False, dht=False), {}),
    "state_v_first": (Case(T=200), {"state_v_first": True}),
    "packed": (Case(T=420, lengths=(0, 130, 64, 200, 10)), {}),
    "fused": (Case(T=200, HV=3), FUSED),
}


@pytest.mark.parametrize("name", SPLITS)
def test_segments_are_exact(name):
    case, options = SPLITS[name]
    x = make(case, fused=options is FUSED)
    if name == "state_v_first":
        x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    compare(x, 2, dht=case.dht, auto_cp=True, **options)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_segments_with_long_keys_and_no_decay(dtype, limit, packed):
    """|k| = 3, beta = 0.2, g = 0: nothing fades away, so an approximate split would show."""
    x = make(Case(T=400, lengths=(150, 250) if packed else ()), dtype)
    values = {"k": 3 * x["k"], "beta": 0.2 * torch.ones_like(x["beta"]), "g": 0 * x["g"]}
    x.update({name: t.detach().requires_grad_() for name, t in values.items()})
    if packed:
        x["cu_seqlens_cpu"] = x["cu_seqlens"].clone()
    whole = outputs_and_gradients(chunk_gated_delta_rule, x, auto_cp=False)
    split = outputs_and_gradients(chunk_gated_delta_rule, x, auto_cp=True)
    assert not torch.equal(whole["ht"], split["ht"])  # it did run in segments
    for key, value in whole.items():
        assert_close(key, split[key], value, limit if key in ("o", "ht") else 2 * limit)


def test_segments_do_not_depend_on_the_batch():
    x = detached(make(Case(B=3, T=300)))
    one = {name: t[1:2] for name, t in x.items()}
    whole = chunk_gated_delta_rule(**x, auto_cp=True, batch_invariant=True)[0]
    assert torch.equal(chunk_gated_delta_rule(**one, auto_cp=True)[0], whole[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indices", [[4, 1, -1], [-1, 4, 1], [-1, -1, -1], [5, 2, 0]], ids=str)
def test_pool_of_states(indices, dtype):
    """Rows are read and written in place, -1 reads zero and writes nothing, others stay."""
    x = detached(make(Case(B=3, T=70)))
    pool = torch.randn(6, 2, 16, 20).to(dtype)
    unused = [n for n in range(6) if n not in indices]
    pool[unused] = torch.nan
    before = pool.clone()
    states = [before[n] if n >= 0 else torch.zeros_like(before[0]) for n in indices]
    x["initial_state"] = torch.stack(states)
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    x["initial_state"] = pool
    pooled, returned = chunk_gated_delta_rule(
        **x, output_state=pool, state_indices=torch.tensor(indices)
    )
    assert torch.equal(pooled, o)
    assert returned is pool
    for row, n in enumerate(indices):
        if n >= 0:
            assert torch.equal(pool[n], ht[row].to(dtype))
    assert torch.equal(pool[unused].nan_to_num(3.0), before[unused].nan_to_num(3.0))


def test_output_state_without_indices():
    x = detached(make(Case(B=2, T=20)))
    expected = chunk_gated_delta_rule(**x, output_final_state=True)[1]
    out = torch.full_like(expected, torch.nan)
    assert chunk_gated_delta_rule(**x, output_state=out)[1] is out
    assert torch.equal(out, expected)


def test_gradient_through_a_pool():
    x = make(Case(B=2, T=20), torch.float64)
    pool = torch.randn(4, 2, 16, 20, dtype=torch.float64, requires_grad=True)
    x["initial_state"] = pool
    (dpool,) = torch.autograd.grad(
        chunk_gated_delta_rule(**x, state_indices=torch.tensor([2, -1]))[0].sum(), pool
    )
    y = exactly({**x, "initial_state": torch.stack([pool[2], torch.zeros_like(pool[2])])})
    (expected,) = torch.autograd.grad(
        naive_recurrent_gated_delta_rule(**y)[0].sum(), y["initial_state"]
    )
    assert relative_error(dpool[2], expected[0]) < limit_of("dinitial_state", torch.float64)
    assert torch.count_nonzero(dpool[[0, 1, 3]]) == 0
