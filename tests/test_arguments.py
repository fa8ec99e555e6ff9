"""Each tensor of each function: another dtype, device or shape is refused before anything runs."""

import pytest
import torch

from deltafuse import gated_delta
from eager_cases import CASES, normal


def decode(q, k, v, state, A_log, a, dt_bias, b):
    return (gated_delta.gated_delta_rule_decode(q, k, v, state, A_log, a, dt_bias, b),)


def convolve(x, state, weight, bias):
    return (gated_delta.causal_conv1d_update(x, state, weight, bias),)


DECODE = ((2, 3, 2, 8), (2, 3, 2, 8), (2, 3, 2, 4), (2, 2, 4, 8), (2,), (2, 3, 2), (2,), (2, 3, 2))
ALL = {
    **CASES,
    "gated_delta_rule_decode": (decode, DECODE),
    "causal_conv1d_update": (convolve, ((2, 3, 8), (2, 8, 3), (8, 4), (8,))),
}
FREE_DIMENSIONS = {("cumulative_phase", 0), ("l2norm", 0), ("fused_gdn_gate", 0), ("rotary_qk", 2)}
FREE_SIZE = {  # of a batch, or of the pool of states
    ("cumulative_phase", 0),
    ("l2norm", 0),
    ("fused_gdn_gate", 0),
    ("ddl_compress_tc", 0),
    ("ddl_expand", 0),
    ("mixture_rotate", 0),
    ("causal_conv1d", 0),
    ("gated_delta_rule_decode", 3),
}
# whose autocast is asked first, which no meta tensor has
AUTOCAST = {("chunk_gated_delta_rule", 0), ("fused_recurrent_gated_delta_rule", 0)}
EACH = [(name, i) for name, (_, shapes) in ALL.items() for i in range(len(shapes))]


def each(but=()):
    names = [case for case in EACH if case not in but]
    return pytest.mark.parametrize("name, at", names, ids=[f"{name}-{at}" for name, at in names])


def refused(name, at, change):
    """What the function raises for a change of one of its tensors; the others are as before."""
    function, shapes = ALL[name]
    inputs = [normal(*shape) for shape in shapes]
    function(*[t.clone() for t in inputs])  # the call itself is good
    before = [t.clone() for t in inputs]
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*inputs[:at], change(inputs[at]), *inputs[at + 1 :])
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))
    return caught


@each()
def test_integers(name, at):
    caught = refused(name, at, torch.Tensor.int)
    assert caught.type is TypeError and caught.match("must be floating point, got torch.int32")


@each(AUTOCAST | {case for case in EACH if len(ALL[case[0]][1]) == 1})
def test_another_device(name, at):
    refused(name, at, lambda t: t.to("meta")).match("expected one device, got .* on meta")


@each(FREE_DIMENSIONS)
def test_one_dimension_more(name, at):
    assert refused(name, at, lambda t: t[None]).type is ValueError


@each(FREE_SIZE)
def test_one_element_more(name, at):
    assert refused(name, at, lambda t: torch.cat((t, t[-1:]))).type is ValueError


@pytest.mark.parametrize(
    "message, sizes, dtype",
    [
        ("T must be in 1..8", {"T": 9}, torch.float32),
        ("T must be in 1..8", {"T": 0}, torch.float32),
        ("positive multiple", {"K": 0}, torch.float32),
        ("positive multiple", {"V": 0}, torch.float32),
        ("positive multiple", {"HV": 0}, torch.float32),
        ("q must be floating point", {}, torch.int32),
    ],
)
def test_decode_with_arguments_that_fit_together(message, sizes, dtype):
    B, T, H, HV, K, V = ({"B": 2, "T": 1, "H": 2, "HV": 2, "K": 8, "V": 4} | sizes).values()
    shapes = (B, T, H, K), (B, T, H, K), (B, T, HV, V)
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    state, gate, heads = torch.zeros(B, HV, V, K), torch.zeros(B, T, HV), torch.zeros(HV)
    with pytest.raises((TypeError, ValueError), match=message):
        decode(q, k, v, state, heads, gate, heads, gate)
