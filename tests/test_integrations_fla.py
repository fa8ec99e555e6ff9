"""The names of flash-linear-attention: signatures, values of its references, its registry."""

import ast
import inspect

import pytest
import torch

from deltafuse.gated_delta import ContextParallel, naive_recurrent_gated_delta_rule
from deltafuse.integrations import fla
from deltafuse.testing import assert_close
from fla_package import imported, naive, package, version
from gated_delta_cases import FUSED, Case, make, offsets
from layer_cases import normal

# read from flash-linear-attention 0.6.0: file, positional names with their defaults, **kwargs
VERSION = "0.6.0"
OPS = "ops/gated_delta_rule"
SIGNATURES = {
    "chunk_gated_delta_rule": (
        f"{OPS}/chunk.py",
        "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, "
        "cp_context=None, **kwargs",
    ),
    "fused_recurrent_gated_delta_rule": (
        f"{OPS}/fused_recurrent.py",
        "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, **kwargs",
    ),
    "naive_recurrent_gated_delta_rule": (
        f"{OPS}/naive.py",
        "q, k, v, beta, g, scale=None, initial_state=None, output_final_state=False",
    ),
    "naive_chunk_gated_delta_rule": (
        f"{OPS}/naive.py",
        "q, k, v, g, beta, chunk_size=64, scale=None, initial_state=None, output_final_state=False",
    ),
    "fused_gdn_gate": (f"{OPS}/gate.py", "g, A_log, dt_bias=None, output_dtype=torch.float32"),
    "l2norm": ("modules/norm/l2norm.py", "x, eps=1e-06, output_dtype=None"),
    "L2Norm.__init__": ("modules/norm/l2norm.py", "self, eps=1e-06, output_dtype=None"),
    "L2Norm.forward": ("modules/norm/l2norm.py", "self, x"),
    "causal_conv1d": (
        "modules/causal_conv1d/ops.py",
        "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, "
        "activation=None, backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, "
        "chunk_indices=None, cp_context=None, **kwargs",
    ),
    "causal_conv1d_update": (
        "modules/causal_conv1d/ops.py",
        "x, cache, residual=None, weight=None, bias=None, activation=None",
    ),
    "ShortConvolution.__init__": (
        "modules/causal_conv1d/ops.py",
        "self, hidden_size, kernel_size, bias=False, activation='silu', backend='triton', "
        "device=None, dtype=None, **kwargs",
    ),
    "ShortConvolution.forward": (
        "modules/causal_conv1d/ops.py",
        "self, x, residual=None, mask=None, cache=None, output_final_state=False, cu_seqlens=None, "
        "chunk_indices=None, **kwargs",
    ),
    "ShortConvolution.step": (
        "modules/causal_conv1d/ops.py",
        "self, x, residual, cache, output_final_state=False, cu_seqlens=None",
    ),
    "FusedRMSNormGated.__init__": (
        "modules/norm/fused_norm_gate.py",
        "self, hidden_size, elementwise_affine=True, eps=1e-05, activation='swish', device=None, "
        "dtype=None",
    ),
    "FusedRMSNormGated.forward": (
        "modules/norm/fused_norm_gate.py",
        "self, x, g, residual=None, prenorm=False, residual_in_fp32=False",
    ),
    "GatedDeltaNet.__init__": (
        "layers/gated_deltanet.py",
        "self, hidden_size=2048, expand_v=2, head_dim=256, num_heads=6, num_v_heads=None, "
        "mode='chunk', use_gate=True, use_short_conv=True, allow_neg_eigval=False, conv_size=4, "
        "conv_bias=False, layer_idx=None, norm_eps=1e-05, output_gate_activation='swish', **kwargs",
    ),
    "GatedDeltaNet.forward": (
        "layers/gated_deltanet.py",
        "self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, "
        "output_attentions=False, **kwargs",
    ),
}
# what fla takes through **kwargs
KEYWORDS = {
    "chunk_gated_delta_rule": ("use_gate_in_kernel", "A_log", "dt_bias", "chunk_size"),
    "ShortConvolution.forward": ("cp_context",),
    "GatedDeltaNet.forward": ("cu_seqlens",),
}
CASE = Case(B=2, T=90, H=2, HV=2, K=12, V=20)


def without_annotations(function):
    """A signature as text: names and defaults."""
    arguments = function.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return ast.unparse(arguments)


def parse(text):
    """{name: default as text} in order; None if there is none."""
    arguments = ast.parse(f"def f({text}): pass").body[0].args
    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    defaults = missing + [ast.unparse(value) for value in arguments.defaults]
    return {a.arg: value for a, value in zip(arguments.args, defaults, strict=True)}


def ours(name):
    function = fla
    for part in name.split("."):
        function = getattr(function, part)
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults(name):
    theirs, parameters = parse(SIGNATURES[name][1]), ours(name)
    positional = [
        p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    for (their_name, default), p in zip(theirs.items(), positional, strict=False):
        assert p.name == their_name
        assert default == (None if p.default is p.empty else repr(p.default)), p
    assert len(positional) >= len(theirs)
    assert all(p.default is not p.empty for p in positional[len(theirs) :])
    assert set(KEYWORDS.get(name, ())) <= set(parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_table_is_what_the_package_has(name):
    root = package()
    if version(root) != VERSION:
        pytest.skip(f"the table is of {VERSION}, this is {version(root)}")
    file, text = SIGNATURES[name]
    body, node = ast.parse((root / file).read_text()).body, None
    for part in name.split("."):
        node = next(n for n in body if getattr(n, "name", None) == part)
        body = node.body
    assert without_annotations(node) == text


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fla.chunk_gated_delta_rule(**x, cu_seqlen=None),
        lambda x: fla.fused_recurrent_gated_delta_rule(**x, chunk_size=64),
        lambda x: fla.naive_recurrent_gated_delta_rule(**x, chunk_size=64),
        lambda x: fla.causal_conv1d(x["q"][0], seq_idx=None),
        lambda x: fla.GatedDeltaNet(num_head=2),
        lambda x: fla.ShortConvolution(8, 4, use_fast_conv1d=True),
    ],
)
def test_unknown_keywords_are_rejected(call):
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(make(CASE))


def gradients(function, x, *order, **options):
    """o, S_T and the gradients of a fixed sum of them, by name."""
    o, ht = function(*(x[name] for name in order), output_final_state=True, **options)
    random = torch.Generator().manual_seed(0)
    d_o, d_ht = (torch.randn(t.shape, generator=random) for t in (o, ht))
    grads = torch.autograd.grad((o, ht), tuple(x.values()), (d_o, d_ht))
    return {"o": o, "ht": ht, **{f"d{name}": g for name, g in zip(x, grads, strict=True)}}


FORMS = {
    "chunk_gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "naive_recurrent_gated_delta_rule": ("q", "k", "v", "beta", "g"),
    "naive_chunk_gated_delta_rule": ("q", "k", "v", "g", "beta"),
}


@pytest.mark.parametrize("reference", ["naive_recurrent", "naive_chunk"])
@pytest.mark.parametrize("name", FORMS)
def test_values_of_the_packages_references(name, reference):
    """The same call to both, in float32, the only precision of theirs."""
    reference += "_gated_delta_rule"
    x = make(CASE)
    options = {"initial_state": x["initial_state"], "scale": 0.3}
    expected = gradients(getattr(naive(), reference), x, *FORMS[reference], **options)
    found = gradients(getattr(fla, name), x, *FORMS[name], **options)
    for key, value in expected.items():
        assert_close(key, found[key], value, 5e-6 if key in ("o", "ht") else 2e-5)


def test_recurrent_form_by_position():
    x = {name: t.detach() for name, t in make(CASE).items()}
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    o, _ = fla.fused_recurrent_gated_delta_rule(q, k, v, g, None, None, beta)
    assert_close("o", o, naive_recurrent_gated_delta_rule(q, k, v, g, beta)[0], 5e-6)


def test_beta_stands_before_g_in_the_naive_recurrence():
    x = {name: t.detach() for name, t in make(CASE).items()}
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    expected = naive_recurrent_gated_delta_rule(q, k, v, g, beta)[0]
    assert torch.equal(fla.naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0], expected)
    chunked = fla.naive_chunk_gated_delta_rule(q, k, v, g, beta, 16, None, None, False)[0]
    assert_close("o", chunked, expected, 5e-6)


def test_gate_and_norm():
    a, A_log, dt_bias = normal(2, 5, 4).bfloat16(), normal(4), normal(4)
    g = fla.fused_gdn_gate(a, A_log, dt_bias)
    assert g.dtype == torch.float32
    softplus = torch.nn.functional.softplus(a.float() + dt_bias)
    assert_close("g", g, -A_log.exp() * softplus, 1e-6)
    assert fla.fused_gdn_gate(a, A_log, None, torch.bfloat16).dtype == torch.bfloat16
    x = normal(3, 8).bfloat16()
    expected = x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close("l2norm", fla.l2norm(x), expected, 3e-3)
    assert fla.l2norm(x).dtype == torch.bfloat16
    assert_close("l2norm", fla.L2Norm(output_dtype=torch.float32)(x), expected, 1e-6)
    assert fla.l2_norm is fla.l2norm


def test_gate_of_the_package():
    theirs = imported("fla.ops.gated_delta_rule.gate").naive_gdn_gate
    a, A_log, dt_bias = normal(2, 5, 4), normal(4), normal(4)
    assert_close("g", fla.fused_gdn_gate(a, A_log, dt_bias), theirs(a, A_log, dt_bias), 1e-6)


@pytest.fixture
def registered():
    """deltafuse in the package's registry, for the length of a test."""
    backends = imported("fla.backends")
    operators = imported("fla.ops.gated_delta_rule")
    fla.register()
    registry = backends._operation_registries["gated_delta_rule"]
    yield operators, registry
    del registry._backends["deltafuse"]


@pytest.mark.parametrize("options", [{}, FUSED], ids=["plain", "fused"])
def test_registered_in_the_package(registered, options):
    """Their function runs our kernel: on the CPU, where they have none, with gradients."""
    operators, registry = registered
    assert registry.get_active().backend_type == "deltafuse"
    x = make(CASE, fused=options is FUSED)
    found = gradients(operators.chunk_gated_delta_rule, x, **x, **options)
    expected = gradients(fla.chunk_gated_delta_rule, x, **x, **options)
    for key, value in expected.items():
        assert torch.equal(found[key], value)


def test_what_is_left_to_the_package(registered, monkeypatch):
    _, registry = registered
    backend = registry.get_active()
    x = {name: t.detach() for name, t in make(CASE).items() if name != "initial_state"}
    for refused, reason in [
        ({"q": torch.empty(1, 5, 1, 300)}, "above 256"),
        ({"q": x["q"].to("meta").to(torch.float16)}, "no kernel for torch.float16 on meta"),
        ({"A_log": normal(2)}, "A_log without"),
        ({"cp_context": type("Zigzag", (), {"layout": "zigzag"})}, "layout"),
        ({"q": None}, "NoneType"),
    ]:
        taken, why = backend.verify("chunk_gated_delta_rule", **{**x, **refused})
        assert not taken and reason in why, why
    assert backend.verify("chunk_gated_delta_rule", *x.values()) == (True, None)
    assert backend.verify("gdn_gate_fwd", x["g"]) == (True, None)  # not offered, so not run
    assert backend.get_implementation("gdn_gate_fwd") is None
    monkeypatch.setenv("FLA_DELTAFUSE", "0")
    assert not backend.is_enabled()


def test_context_of_the_package(monkeypatch):
    """Equal spans: the same local sequences, and the same ranks before and after."""
    build = imported("fla.ops.cp.context").get_cp_cu_seqlens
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    for lengths in ((64,), (10, 54), (16, 16, 32), (3, 2, 1, 40, 18), (32, 32), (1,) * 64):
        for rank in range(4):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
            theirs = build(offsets(lengths), world_size=4, rank=rank)
            context = ContextParallel(offsets(lengths))
            assert context.cu_seqlens.tolist() == theirs.cu_seqlens.tolist()
            assert context.pre_num_ranks == theirs.pre_num_ranks
            assert context.post_num_ranks == theirs.post_num_ranks
