"""DDLBlock and DDLStack: fused boundaries, states recomputed in the backward, caches."""

import copy
import gc
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deltafuse.ddl import DDLBlock, DDLStack, DDLWrapper, ResidualCompressor, RMSNorm, sub_layers
from deltafuse.ddl.invert import Tape
from deltafuse.testing import assert_close
from test_ddl_modules import normal

D = 20
VARIANTS = {
    "default": {},
    "paper": {"ddl_v_source": "context", "ddl_v_sigmoid": False},
    "causal": {"ddl_state_dv_shortconv_causal": True, "ddl_k_eps": 0.1, "ddl_norm_eps": 1e-3},
    "mean": {"ddl_read_out": "mean"},
    "linear": {"ddl_read_out": "linear"},
    "two_layers": {"ddl_beta_single_linear": False, "ddl_beta_hidden_size": 6},
    "constant": {"ddl_v_constant": True, "ddl_v_dim1_constant": True},
    "tc": {"ddl_read_out": "tc", "ddl_state_shortconv_kernel_size": 3},
}


class Attention(nn.Module):
    """Stands for a token mixer: a tuple, options, and a view of all tokens so far."""

    def __init__(self, d=D):
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x, scale=1.0, **options):
        return self.linear(x).cumsum(-2) * scale, options


def mlp_of(d=D):
    return nn.Sequential(nn.Linear(d, 3 * d), nn.SiLU(), nn.Linear(3 * d, d))


def config_of(channels, **more):
    return types.SimpleNamespace(hidden_size=D, ddl_value_channels=channels, **more)


class Model(nn.Module):
    """A stack with the final read-out and norm."""

    def __init__(self, channels, layers=2, variant="default", **options):
        super().__init__()
        torch.manual_seed(0)
        config = config_of(channels, **VARIANTS[variant])
        blocks = [DDLBlock(Attention(), mlp_of(), config) for _ in range(layers)]
        self.stack = DDLStack(blocks, **options)
        mode = getattr(config, "ddl_read_out", "cc")
        self.read_out = ResidualCompressor(D, channels, mode) if channels > 1 else None
        self.norm = RMSNorm(D)

    def forward(self, x, **options):
        return self.stack(x, read_out=self.read_out, norm=self.norm, **options)


def state(channels, *leading, dtype=torch.float32):
    return normal(*leading, D, *(() if channels == 1 else (channels,)), dtype=dtype)


def results(function, model, x):
    """(state, c) and all gradients by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y, c = function(x)
    (y.square().sum() + (c * normal(*c.shape, dtype=c.dtype)).sum()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "c": c.detach(), "dx": x.grad, **grads}


def assert_same(actual, expected, limit):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, actual[name], value, limit)


# Check 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [1, 4])
def test_check_8_fused_equals_unfused(channels, variant):
    x = state(channels, 2, 5)
    fused = Model(channels, variant=variant)
    unfused = Model(channels, variant=variant, fuse_boundaries=False)
    a, b = (results(m, m, x) for m in (fused, unfused))
    assert torch.equal(a["y"], b["y"])
    assert_same(a, b, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [1, 4])
def test_stack_is_its_blocks_written_out(channels, variant):
    """Read-out, norm, sub-layer, residual: the modules one by one, in float64."""
    model = Model(channels, variant=variant).double()
    x = state(channels, 2, 5, dtype=torch.float64)
    y = x
    for block in model.stack:
        for norm, layer, ddl in (
            (block.ln_1, lambda c, block=block: block.attn(c)[0], block.ddl_attn),
            (block.ln_2, block.mlp, block.ddl_mlp),
        ):
            x_in = y if block.compress is None else block.compress(y)
            c = F.rms_norm(x_in, (D,), norm.weight, norm.eps)
            y = ddl(y, k_in=layer(c), v_in=x_in, context=c)
    last = y if model.read_out is None else model.read_out(y)
    actual, c = model(x)
    assert_close("y", actual, y, 1e-12)
    assert_close("c", c, F.rms_norm(last, (D,), model.norm.weight, 1e-5), 1e-12)
    assert_close("without the norm", model.stack(x), y, 1e-12)
    by_block = x
    for block in model.stack:
        by_block = block(by_block)
    assert_close("block by block", by_block, y, 1e-12)


@pytest.mark.parametrize("variant, calls", [("default", 6), ("two_layers", 6), ("tc", 0)])
def test_one_call_a_boundary(monkeypatch, variant, calls):
    counts = {"ddl_boundary": 0, "ddl_head": 0}
    for name in counts:
        plain = getattr(sub_layers, name)

        def counted(*args, name=name, plain=plain, **options):
            counts[name] += 1
            return plain(*args, **options)

        monkeypatch.setattr(sub_layers, name, counted)
    Model(4, layers=3, variant=variant)(state(4, 2, 5))
    assert counts == {"ddl_boundary": calls, "ddl_head": 1 if calls else 0}


# Check 6


@pytest.mark.parametrize("channels", [1, 4])
def test_check_6_inverted_gradients_of_24_layers(channels):
    x = state(channels, 3, 7)
    plain, invert = Model(channels, layers=24), Model(channels, layers=24, save="invert")
    a, b = results(plain, plain, x), results(invert, invert, x)
    assert torch.equal(a["y"], b["y"]) and torch.equal(a["c"], b["c"])
    assert_same(b, a, 1e-4)  # a gate's bias: one number, a sum that cancels
    weights = [name for name, value in a.items() if value.dim() > 1]
    assert len(weights) >= 3 + 24 * 7
    assert_same({n: b[n] for n in weights}, {n: a[n] for n in weights}, 1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "tc"])
def test_check_6_inverted_gradients_of_every_variant(variant):
    x = state(4, 2, 5, dtype=torch.float64)
    plain, invert = (Model(4, variant=variant, save=s).double() for s in ("output", "invert"))
    a, b = results(plain, plain, x), results(invert, invert, x)
    assert_same(b, a, 1e-11)


def state_sized(function, size):
    """Tensors of `size` elements that autograd saves, and those alive before the backward."""
    saved = []

    def pack(t):
        saved.append((t.data_ptr(), t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    gc.collect()
    alive = {
        t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == size
    }
    del kept
    return len({pointer for pointer, numel in saved if numel == size}), len(alive)


def test_check_6_invert_keeps_the_last_state_alone():
    x = state(4, 3, 7).requires_grad_()
    model = Model(4, layers=6, save="invert")
    assert state_sized(lambda: model(x), x.numel()) == (1, 2)  # the last one; x and the last one
    model.stack.save = "output"
    saved, _ = state_sized(lambda: model(x), x.numel())
    assert saved >= 12


def test_check_6_invert_with_frozen_layers_and_a_second_backward():
    x = state(4, 2, 5)
    plain, invert = Model(4, layers=3), Model(4, layers=3, save="invert")
    for model in (plain, invert):
        model.stack[0].requires_grad_(False)
        model.stack[1].mlp.requires_grad_(False)
    assert_same(results(invert, invert, x), results(plain, plain, x), 1e-5)
    for model in (plain, invert):
        model.zero_grad()
        y, c = model(x)  # x needs no gradient: the frozen block has no backward
        (c * normal(*c.shape, dtype=c.dtype)).sum().backward(retain_graph=True)
        y.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), invert.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None
        else:
            assert_close(name, q.grad, p.grad, 1e-5)


def test_check_6_invert_without_gradients_and_its_errors():
    x, model = state(4, 2, 5), Model(4, save="invert")
    with torch.no_grad():
        y, _ = model(x)
    assert torch.equal(y, model(x)[0].detach())
    with pytest.raises(ValueError, match="float32 or float64 state, got torch.bfloat16"):
        model.bfloat16()(x.bfloat16())
    with pytest.raises(ValueError, match='not mode "tc"'):
        Model(4, variant="tc", save="invert")(x)
    with pytest.raises(ValueError, match="save must be 'output' or 'invert'"):
        DDLStack([], save="all")
    tape = Tape(3)
    tape.put(2, x)
    with pytest.raises(RuntimeError, match="backward of the whole stack"):
        tape.take(1)


# Check 15


@pytest.mark.parametrize("variant", ["default", "two_layers", "tc"])
@pytest.mark.parametrize("save", ["output", "invert"])
def test_check_15_compile_checkpoint_and_copies_keep_results(variant, save):
    if variant == "tc" and save == "invert":
        pytest.skip("not supported together")
    torch._dynamo.reset()
    model, x = Model(4, layers=1, variant=variant, save=save), state(4, 2, 5)
    expected = results(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, model, x), expected, 1e-5)
    again = results(lambda x: checkpoint(model, x, use_reentrant=False), model, x)
    assert_same(again, expected, 1e-6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.stack.save == save and str(other) == str(model)
        assert_same(results(other, other, x), expected, 1e-6)


def test_check_15_autocast_keeps_the_state_and_narrow_weights_get_narrow_inputs():
    x, model = state(4, 2, 5), Model(4)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, c = model(x)
    assert y.dtype == torch.float32 and c.dtype == torch.bfloat16
    assert 0 < (y - expected[0]).norm() < 2e-2 * expected[0].norm()
    for dtype in (torch.float32, torch.bfloat16):  # of the state, the weights are bfloat16
        y, c = copy.deepcopy(model).bfloat16()(x.to(dtype))
        assert y.dtype == dtype and c.dtype == torch.bfloat16
        assert_close("y", y.float(), expected[0], 3e-2)


def test_check_15_autocast_does_not_blur_the_inversion():
    """The layers round to bfloat16 either way, the states that come back do not."""
    x, grads = state(4, 2, 5), []
    for save in ("output", "invert"):
        model = Model(4, layers=4, variant="two_layers", save=save)

        def run(x, model=model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, c = model(x)
            return y, c.float()

        grads.append(results(run, model, x))
    assert_same(grads[1], grads[0], 2e-3)
    assert_close("dx", grads[1]["dx"], grads[0]["dx"], 1e-4)


def test_check_15_no_tensor_stays_on_a_module():
    model = Model(4, save="invert")
    before = [dict(vars(m)) for m in model.modules()]
    results(model, model, state(4, 2, 5))
    assert [dict(vars(m)) for m in model.modules()] == before


# Layers, options, caches


def test_options_reach_the_attention_alone():
    x, model = state(4, 2, 5), Model(4)
    mask = torch.ones(2, 5)
    seen = []
    hooks = [
        b.attn.register_forward_hook(lambda m, a, out: seen.append(out[1])) for b in model.stack
    ]
    scaled, _ = model(x, scale=2.0, attention_mask=mask, other=3)
    assert [sorted(options) for options in seen] == [["attention_mask", "other"]] * 2
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for block in model.stack:
            block.attn.linear.weight.mul_(2)
            block.attn.linear.bias.mul_(2)
    assert_close("y", scaled, model(x)[0], 1e-5)


@pytest.mark.parametrize("cuts", [[1] * 6, [2, 4]])
def test_check_13_stack_with_tc_decodes_with_its_states(cuts):
    torch.manual_seed(0)
    config = config_of(4, **VARIANTS["tc"])
    stack = DDLStack([DDLBlock(mlp_of(), mlp_of(), config) for _ in range(2)]).double()
    tail = {"read_out": ResidualCompressor(D, 4, "tc").double(), "norm": RMSNorm(D).double()}
    x, states, parts = state(4, 2, 6, dtype=torch.float64), {}, []
    for part in x.split(cuts, 1):
        parts.append(stack(part, states=states, **tail))
    full = stack(x, **tail)
    for name, pieces, whole in zip("yc", zip(*parts, strict=True), full, strict=True):
        assert_close(name, torch.cat(pieces, 1), whole, 1e-12)
    assert len(states) == 5


def test_check_13_packed_sequences_do_not_mix():
    torch.manual_seed(0)
    config = config_of(4, **VARIANTS["tc"])

    class Layer(nn.Linear):
        def forward(self, x, cu_seqlens=None):
            return super().forward(x)

    stack = DDLStack([DDLBlock(Layer(D, D), mlp_of(), config)]).double()
    x = state(4, 1, 7, dtype=torch.float64)
    packed = stack(x, cu_seqlens=torch.tensor([0, 3, 7]))
    alone = torch.cat([stack(x[:, :3]), stack(x[:, 3:])], 1)
    assert_close("y", packed, alone, 1e-12)


def test_stack_takes_wrappers_too():
    torch.manual_seed(0)
    wrappers = [DDLWrapper(mlp_of(), D, 4, init="repo") for _ in range(3)]
    x = state(4, 2, 5)
    y = x
    for w in wrappers:
        y = w(y)
    assert_close("y", DDLStack(wrappers)(x), y, 1e-6)
    mixed = DDLStack([wrappers[0], *Model(4).stack])
    assert_close("mixed", mixed(x), Model(4).stack(wrappers[0](x)), 1e-6)


@pytest.mark.parametrize("shape", [(D,), (0,), (D, D)])
def test_leading_dimensions_and_states_that_look_like_others(shape):
    model = Model(1)
    x = state(1, *shape)
    y, c = model(x)
    assert y.shape == x.shape and c.shape == x.shape
    with_channel, _ = model(x[..., None])
    assert torch.equal(with_channel[..., 0], y)


def test_a_slice_keeps_the_options():
    stack = Model(4, layers=3, fuse_boundaries=False, save="invert").stack
    part = stack[1:]
    assert isinstance(part, DDLStack) and len(part) == 2 and part[0] is stack[1]
    assert (part.fuse_boundaries, part.save) == (False, "invert")


def test_parameters_have_plain_names():
    names = {name for name, _ in DDLStack(Model(4).stack).named_parameters()}
    assert {"0.ln_1.weight", "1.compress.read", "1.ddl_mlp.beta.bias"} < names
    assert sum(name.endswith("compress.weight") for name in names) == 2  # one a block


def test_wrong_arguments_are_named():
    x = state(4, 2, 5)
    with pytest.raises(ValueError, match="must be a DDLBlock or DDLWrapper"):
        DDLStack([nn.Linear(D, D)])(x)
    with pytest.raises(ValueError, match="read_out is given without norm"):
        Model(4).stack(x, read_out=ResidualCompressor(D, 4))
    with pytest.raises(ValueError, match="several"):
        DDLStack([*Model(4).stack, *Model(2).stack])(x)
    for options in ({"norm": False}, {"disable": True}):
        with pytest.raises(ValueError, match="a wrapper in it needs"):
            DDLStack([DDLWrapper(mlp_of(), D, 4, **options)])(x)
    assert DDLStack()(x) is x
