"""The recurrent gated delta rule as an operator: opcheck, torch.compile, autocast, bad input."""

import pytest
import torch

from deltafuse import _library
from deltafuse.gated_delta import (
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
    naive_recurrent_gated_delta_rule,
)
from deltafuse.testing import assert_close
from gated_delta_cases import FUSED, Case, exactly, make, outputs_and_gradients

CASE = Case(B=2, T=5, H=1, HV=2, K=8, V=12)
PACKED = Case(T=12, HV=2, K=8, V=12, lengths=(0, 4, 7))


def raw_arguments(name, grad, device):
    """Of gated_delta_recurrent_fwd, without output_final_state."""
    fused = name in ("fused", "packed")
    x = make(PACKED if name == "packed" else CASE, device=device, fused=fused)
    if name == "channels":
        x["gk"], x["gv"], x["beta"] = (torch.rand(2, 5, 2, n).to(device) for n in (8, 12, 12))
    if name == "v_first":
        x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    if name == "absent":
        del x["g"], x["beta"], x["initial_state"]
    names = ("q", "k", "v", "g", "gk", "gv", "beta", "initial_state", "cu_seqlens")
    tensors = [x.get(key) for key in (*names, "A_log", "dt_bias")]
    if not grad:
        tensors = [t if t is None else t.detach() for t in tensors]
    return *tensors, 0.3, fused, 2.0 if fused else 0.0, name == "v_first"


DIFFERENTIABLE = ["plain", "absent", "fused", "v_first", "packed"]


@pytest.mark.parametrize(
    "name, grad",
    [(name, grad) for name in DIFFERENTIABLE for grad in (False, True)] + [("channels", False)],
)
def test_opcheck_forward(device, name, grad):
    args = raw_arguments(name, grad, device)
    op = _library.kernel("gated_delta_recurrent_fwd", args[0]).default
    for output_final_state in (False, True):
        torch.library.opcheck(op, (*args, output_final_state))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_backward(device, name):
    args = raw_arguments(name, False, device)
    o, ht = _library.kernel("gated_delta_recurrent_fwd", args[0])(*args, True)
    bwd = _library.kernel("gated_delta_recurrent_bwd", args[0]).default
    for d_state in (None, torch.randn_like(ht)):
        torch.library.opcheck(bwd, (torch.randn_like(o), d_state, *args[:4], *args[6:]))


def loss_of(x, **options):
    o, ht = fused_recurrent_gated_delta_rule(**x, output_final_state=True, **options)
    return (o * 2).tanh().sum() + ht.square().sum()


def gradients(function, x, **options):
    leaves = [t for t in x.values() if t.is_floating_point()]
    return torch.autograd.grad(function(x, **options), leaves)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_whole_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (5, 9):
        x = make(CASE._replace(T=T), fused=True)
        expected = gradients(loss_of, x, **FUSED)
        torch.testing.assert_close(gradients(compiled, x, **FUSED), expected)


def test_compile_one_step():
    torch._dynamo.reset()
    x = make(CASE._replace(T=1))
    token = [x[name].detach()[:, 0] for name in ("q", "k", "v", "g", "beta")]
    token.append(x["initial_state"].detach())
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*token), gated_delta_rule_step(*token))


def test_autocast_casts_q_k_v_only():
    x = make(CASE)
    with torch.autocast("cpu", torch.bfloat16):
        result = outputs_and_gradients(fused_recurrent_gated_delta_rule, x)
    assert result["o"].dtype == torch.bfloat16
    rounded = exactly(x)
    for name in ("q", "k", "v"):
        rounded[name] = x[name].detach().bfloat16().double().requires_grad_()
    expected = outputs_and_gradients(naive_recurrent_gated_delta_rule, rounded)
    # far more exact than bfloat16: g and beta were not rounded
    assert_close("ht", result["ht"], expected["ht"], 5e-6)
    assert all(result["d" + name].dtype == torch.float32 for name in x)


BAD = {
    "q must be [B, T, H, K]": lambda x: {"q": x["q"][0]},
    "k must be the shape of q": lambda x: {"k": x["k"][..., :4]},
    "v must have the B and T": lambda x: {"v": x["v"][:, :3]},
    "multiple of q's": lambda x: {"v": torch.zeros(2, 5, 3, 12), "q": x["q"].repeat(1, 1, 2, 1)},
    "expected one dtype": lambda x: {"k": x["k"].double()},
    "g must be [B, T, HV]": lambda x: {"g": x["g"][..., :1]},
    "gk must be [B, T, HV, K]": lambda x: {"gk": torch.zeros(2, 5, 2, 12)},
    "gv must be [B, T, HV, V]": lambda x: {"gv": torch.zeros(2, 5, 2, 8)},
    "beta must be [B, T, HV]": lambda x: {"beta": x["beta"][..., :1]},
    "beta must be [B, T, HV, V]": lambda x: {"beta": torch.zeros(2, 5, 2, 8)},
    "initial_state must be [N, HV, K, V]": lambda x: {"initial_state": torch.zeros(3, 2, 8, 12)},
    "initial_state must be [N, HV, V, K]": lambda x: {"state_v_first": True},
    "packed inputs with B = 1": lambda x: {"cu_seqlens": torch.tensor([0, 5])},
    "needs A_log": lambda x: {"use_gate_in_kernel": True},
    "needs g": lambda x: {"use_gate_in_kernel": True, "g": None, "A_log": torch.zeros(2)},
    "A_log is only read with": lambda x: {"A_log": torch.zeros(2)},
    "needs beta": lambda x: {"use_beta_sigmoid_in_kernel": True, "beta": None},
    "needs use_beta_sigmoid_in_kernel": lambda x: {"allow_neg_eigval": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    x = {name: t.detach() for name, t in make(CASE).items()}
    changed = BAD[message](x)
    if message == "multiple of q's":
        changed["k"] = changed["q"]
    with pytest.raises(ValueError) as error:
        fused_recurrent_gated_delta_rule(**{**x, **changed})
    assert message in str(error.value)
    assert str(error.value).startswith("fused_recurrent_gated_delta_rule: ")


@pytest.mark.parametrize("name", ["q", "g", "gk", "gv", "beta", "initial_state"])
def test_integers_are_a_type_error(name):
    x = {key: t.detach() for key, t in make(CASE).items()}
    x |= {"gk": torch.zeros(2, 5, 2, 8), "gv": torch.zeros(2, 5, 2, 12)}
    x[name] = x[name].int()
    with pytest.raises(TypeError, match=f"{name} must be floating point"):
        fused_recurrent_gated_delta_rule(**x)


def test_keywords_of_other_interfaces():
    x = {name: t.detach() for name, t in make(Case(B=2, T=7, K=8, V=12)).items()}
    expected, state = fused_recurrent_gated_delta_rule(**x, output_final_state=True)
    with pytest.raises(
        TypeError, match="fused_recurrent_gated_delta_rule: head_first .* transpose"
    ):
        fused_recurrent_gated_delta_rule(**x, head_first=True)
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['chunk_size'\]"):
        fused_recurrent_gated_delta_rule(**x, chunk_size=64)
    x["initial_state"] = x["initial_state"].mT
    with pytest.warns(DeprecationWarning, match="fused_recurrent.* state_v_first"):
        o, v_first = fused_recurrent_gated_delta_rule(
            **x, output_final_state=True, transpose_state_layout=True
        )
    assert torch.equal(o, expected) and torch.equal(v_first.mT, state)
