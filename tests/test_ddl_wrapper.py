"""DDLWrapper around any layer, and the calling style of hyper-connections."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltafuse
from deltafuse.ddl import DDLWrapper, get_init_and_expand_reduce_stream_functions
from deltafuse.testing import assert_close, relative_error
from test_ddl_modules import expected_residual, normal

D = 24


def layer_of(d=D, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))


def state(channels, *leading, d=D, dtype=torch.float32):
    tail = () if channels == 1 else (channels,)
    return normal(*leading, d, *tail, dtype=dtype)


OPTIONS = {
    "cc": {},
    "causal": {"causal": True},
    "linear": {"read_out": "linear"},
    "mean": {"read_out": "mean"},
    "tc": {"read_out": "tc"},
    "paper": {"v_source": "context", "v_activation": None},
    "constant": {"v_constant": 2.0},
    "two_layers": {"beta_hidden_size": 5},
    "no_norm": {"norm": False},
    "repo": {"init": "repo"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("channels", [1, 4])
def test_wrapper_is_the_composition_of_its_parts(name, channels):
    torch.manual_seed(0)
    w = DDLWrapper(layer_of(), D, channels, **OPTIONS[name]).double()
    x = state(channels, 2, 5, dtype=torch.float64)
    x_in = x if w.compress is None else w.compress(x)
    c = x_in if w.norm is None else nn.functional.rms_norm(x_in, (D,), w.norm.weight, 1e-5)
    wide = x[..., None] if channels == 1 else x
    expected = expected_residual(w.ddl, wide, w.layer(c), x_in, c).reshape(x.shape)
    assert_close("y", w(x), expected, 1e-12)


def test_wrapper_is_at_top_level():
    assert deltafuse.DDLWrapper is DDLWrapper


def test_further_outputs_and_arguments_pass_through():
    class Layer(nn.Module):
        def forward(self, x, scale, *, shift=0.0):
            return scale * x + shift, "weights", 3

    x = state(4, 2, 5)
    w = DDLWrapper(Layer(), D, 4)
    y, *more = w(x, 2.0, shift=0.5)
    assert more == ["weights", 3]
    c, add = w.open(x)
    assert torch.equal(y, add(2.0 * c + 0.5))


@pytest.mark.parametrize("channels", [1, 4])
def test_decomposed_form_equals_the_forward(channels):
    x = state(channels, 2, 5)
    w = DDLWrapper(layer_of(), D, channels)
    c, add = w.open(x)
    assert c.shape == (2, 5, D)
    assert torch.equal(add(w.layer(c)), w(x))
    # without a layer of its own
    bare = DDLWrapper(None, D, channels)
    bare.load_state_dict({k: v for k, v in w.state_dict().items() if not k.startswith("layer")})
    c, add = bare(x)
    assert torch.equal(add(w.layer(c)), w(x))


def test_decomposed_form_decodes_over_time():
    torch.manual_seed(0)
    w = DDLWrapper(layer_of(), D, 4, read_out="tc", init="repo").double()
    x, states = state(4, 2, 6, dtype=torch.float64), {}
    parts = []
    for part in x.split([1, 3, 2], 1):
        c, add = w.open(part, states=states)
        parts.append(add(w.layer(c)))
    assert_close("decoded", torch.cat(parts, 1), w(x), 1e-12)


def test_packed_sequences_do_not_mix_over_time():
    class Layer(nn.Linear):
        def forward(self, x, cu_seqlens=None):
            return super().forward(x)

    torch.manual_seed(0)
    w = DDLWrapper(Layer(D, D), D, 4, read_out="tc", init="repo").double()
    x = state(4, 1, 7, dtype=torch.float64)
    packed = w(x, cu_seqlens=torch.tensor([0, 3, 7]))
    assert_close("y", packed, torch.cat([w(x[:, :3]), w(x[:, 3:])], 1), 1e-12)


def test_disabled_is_the_plain_residual():
    x = state(1, 2, 5)
    w = DDLWrapper(layer_of(), D, 4, disable=True)
    assert torch.equal(w(x), x + w.layer(w.norm(x)))
    assert {name.split(".")[0] for name in w.state_dict()} == {"layer", "norm"}


@pytest.mark.parametrize("channels", [1, 4])
def test_hyper_connection_style(channels):
    init, expand, reduce = get_init_and_expand_reduce_stream_functions(channels, dim=D)
    x = state(1, 2, 5)
    assert torch.equal(reduce(expand(x)), x)
    w = init(branch=layer_of())
    y = reduce(w(expand(x)))
    assert y.shape == x.shape and not torch.equal(y, x)
    hyper = init(dim=D)
    hyper.load_state_dict({k: v for k, v in w.state_dict().items() if not k.startswith("layer")})
    branch_input, add_residual = hyper(expand(x))
    assert torch.equal(reduce(add_residual(w.layer(branch_input))), y)


def test_hyper_connection_style_disabled_and_without_dim():
    init, expand, reduce = get_init_and_expand_reduce_stream_functions(4, disable=True)
    x = state(1, 2, 5)
    assert expand(x) is x and reduce(x) is x
    w = init(dim=D, branch=layer_of(), norm=False)
    assert torch.equal(w(x), x + w.layer(x))
    with pytest.raises(ValueError, match="dim is not known"):
        init(branch=layer_of())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="init must be 'identity' or 'repo'"):
        DDLWrapper(layer_of(), D, init="zero")
    with pytest.raises(TypeError, match="colour"):
        DDLWrapper(layer_of(), D, colour=1)
    with pytest.raises(ValueError, match="expected|must be"):
        DDLWrapper(layer_of(), D, 4)(state(1, 2, 5))


# Check 16, training smoke


def test_check_16_identity_start_is_near_the_identity_and_the_gate_learns():
    d = 512
    torch.manual_seed(0)
    wrappers = [DDLWrapper(layer_of(d, seed), d, 4) for seed in (1, 2)]
    x = torch.randn(8, d)[..., None].expand(8, d, 4).contiguous()
    y = wrappers[1](wrappers[0](x))
    assert 0 < relative_error(y, x) < 1e-2
    y.square().sum().backward()
    for w in wrappers:
        assert w.ddl.beta.weight.grad.abs().sum() > 0 and w.ddl.beta.bias.grad.abs() > 0
        assert not w.ddl.beta.weight.any()


def test_check_16_beta_init_of_zero_warns():
    with pytest.warns(UserWarning, match="the gate hardly learns"):
        DDLWrapper(layer_of(), D, beta_init=0.0)


@pytest.mark.parametrize("channels", [1, 4])
def test_check_16_loss_falls_on_a_copy_task(channels):
    """Two wrapped layers, a causal one among them, learn to repeat the token before."""

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * 32, 32)

        def forward(self, x):
            return self.linear(torch.cat([x, nn.functional.pad(x, (0, 0, 1, -1))], -1))

    torch.manual_seed(0)
    init, expand, reduce = get_init_and_expand_reduce_stream_functions(channels, dim=32)
    body = nn.Sequential(init(branch=Before()), init(branch=layer_of(32)))
    embed, head = nn.Embedding(8, 32), nn.Linear(32, 8)
    model = nn.ModuleList([embed, body, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        tokens = torch.randint(8, (16, 12))
        logits = head(reduce(body(expand(embed(tokens)))))[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 1.8 < losses[0]


# Check 15


def results(function, w, x):
    w.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in w.parameters())]


@pytest.mark.parametrize("name", ["cc", "tc", "two_layers", "constant"])
def test_check_15_compile_checkpoint_and_copies_keep_results(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    w, x = DDLWrapper(layer_of(), D, 4, init="repo", **OPTIONS[name]), state(4, 2, 5)
    w.ddl.v_proj.requires_grad_()  # of a constant, too: all parameters have a gradient or None
    plain = results(w, w, x)
    compiled = torch.compile(w, fullgraph=True, backend="aot_eager")
    runs = {
        "compiled": results(compiled, w, x),
        "checkpoint": results(lambda x: checkpoint(w, x, use_reentrant=False), w, x),
    }
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        runs["copy"] = results(other, other, x)
    for run, values in runs.items():
        for a, b in zip(values, plain, strict=True):
            if b is None:
                assert a is None
            else:
                assert_close(run, a, b, 1e-6)


def test_check_15_no_tensor_stays_on_a_module():
    w = DDLWrapper(layer_of(), D, 4, read_out="tc")
    before = [dict(vars(m)) for m in w.modules()]
    w(state(4, 2, 5))
    w.open(state(4, 2, 5), states={})
    assert [dict(vars(m)) for m in w.modules()] == before
