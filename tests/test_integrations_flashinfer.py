"""The adapter with the arguments of flashinfer: linear decay, grouped queries, packed."""

import pytest
import torch

from deltafuse.gated_delta import naive_recurrent_gated_delta_rule
from deltafuse.integrations.flashinfer import chunk_gated_delta_rule
from deltafuse.testing import assert_close
from gated_delta_cases import Case, make

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
