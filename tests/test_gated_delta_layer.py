"""The GatedDeltaNet layer: checkpoints, caches, masks, packing, gradients, compilation."""

import copy

import pytest
import torch

from deltafuse import _library
from deltafuse.gated_delta import GatedDeltaNet, GatedDeltaNetCache, GatedRMSNorm, ShortConvolution
from deltafuse.testing import assert_close
from layer_cases import normal

SIZES = {"hidden_size": 40, "head_dim": 12, "num_heads": 2, "num_v_heads": 4, "layer_idx": 0}
# what a checkpoint of the layer in fla-org/flash-linear-attention holds for SIZES
CHECKPOINT = {
    "q_proj.weight": (24, 40),
    "k_proj.weight": (24, 40),
    "v_proj.weight": (96, 40),
    "a_proj.weight": (4, 40),
    "b_proj.weight": (4, 40),
    "g_proj.weight": (96, 40),
    "o_proj.weight": (40, 96),
    "q_conv1d.weight": (24, 1, 4),
    "k_conv1d.weight": (24, 1, 4),
    "v_conv1d.weight": (96, 1, 4),
    "A_log": (4,),
    "dt_bias": (4,),
    "o_norm.weight": (24,),
}
VARIANTS = {
    "default": {},
    "no_gate": {"use_gate": False},
    "no_convolution": {"use_short_conv": False},
    "negative_eigenvalues": {"allow_neg_eigval": True},
    "bias_and_three_taps": {"conv_bias": True, "conv_size": 3},
    "recurrent": {"mode": "fused_recurrent"},
    "sigmoid_gate": {"output_gate_activation": "sigmoid"},
}


def make(device="cpu", **options):
    torch.manual_seed(0)
    return GatedDeltaNet(**{**SIZES, **options}).to(device)


def loss_and_gradients(layer, x):
    x = x.detach().requires_grad_()
    o, weights, cache = layer(x)
    assert weights is None and cache is None
    o.square().sum().backward()
    return [o, x.grad, *(p.grad for p in layer.parameters())]


def test_loads_a_checkpoint_with_its_names():
    layer = make()
    layer.load_state_dict({name: normal(*shape) for name, shape in CHECKPOINT.items()}, strict=True)
    assert torch.equal(layer.q_conv1d.weight, normal(24, 1, 4))


# what changes in CHECKPOINT with an option; None: there is no such parameter
OTHER_CHECKPOINTS = {
    "use_gate": (False, {"g_proj.weight": None}),
    "use_short_conv": (False, {f"{name}_conv1d.weight": None for name in "qkv"}),
    "conv_bias": (
        True,
        {"q_conv1d.bias": (24,), "k_conv1d.bias": (24,), "v_conv1d.bias": (96,)},
    ),
    "conv_size": (
        3,
        {f"{name}_conv1d.weight": (n, 1, 3) for name, n in zip("qkv", (24, 24, 96), strict=True)},
    ),
    "expand_v": (
        1,
        {
            **{f"{name}_proj.weight": (48, 40) for name in "vg"},
            **{"o_proj.weight": (40, 48), "v_conv1d.weight": (48, 1, 4), "o_norm.weight": (12,)},
        },
    ),
    "num_v_heads": (
        None,  # as many as num_heads
        {
            **{f"{name}_proj.weight": (48, 40) for name in "vg"},
            **{f"{name}_proj.weight": (2, 40) for name in "ab"},
            **{"o_proj.weight": (40, 48), "v_conv1d.weight": (48, 1, 4)},
            **{"A_log": (2,), "dt_bias": (2,)},
        },
    ),
    "allow_neg_eigval": (True, {}),
    "output_gate_activation": ("sigmoid", {}),
}


@pytest.mark.parametrize("option", OTHER_CHECKPOINTS)
def test_loads_checkpoints_of_other_options(option):
    """The names and shapes of flash-linear-attention 0.6.0's layer, no more and no fewer."""
    value, changed = OTHER_CHECKPOINTS[option]
    shapes = {n: shape for n, shape in {**CHECKPOINT, **changed}.items() if shape is not None}
    layer = make(**{option: value})
    layer.load_state_dict({name: normal(*shape) for name, shape in shapes.items()}, strict=True)
    assert torch.equal(layer.o_norm.weight, normal(*shapes["o_norm.weight"]))
    assert layer(normal(1, 9, 40))[0].isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_against_float64(device, name):
    layer = make(device, **VARIANTS[name])
    exact = copy.deepcopy(layer).double()
    x = normal(2, 70, 40).to(device)
    actual = loss_and_gradients(layer, x)
    with _library.use("reference"):
        expected = loss_and_gradients(exact, x.double())
    names = ["o", "x", *(name for name, _ in layer.named_parameters())]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_close(name, a, e, 1e-4 if name in ("A_log", "dt_bias", "a_proj.weight") else 2e-5)


class ListCache(list):
    """As other libraries' caches: a sequence of dicts with `update`."""

    def update(self, recurrent_state=None, conv_state=None, layer_idx=0, offset=0):
        entry = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        self[layer_idx:] = [entry]
        return entry


@pytest.mark.parametrize("cache", [GatedDeltaNetCache, ListCache])
@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_are_the_full_forward(device, name, cache):
    layer = make(device, **VARIANTS[name]).eval()
    x, cache = normal(2, 90, 40).to(device), cache()
    with torch.no_grad():
        full = layer(x)[0]
        # longer and shorter than what the recurrent form takes; then token by token
        bounds = [0, 70, 80, *range(81, 91)]
        outputs = [
            layer(x[:, a:b], past_key_values=cache, use_cache=True)[0]
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
    assert_close("output", torch.cat(outputs, 1), full, 1e-5)
    if isinstance(cache, GatedDeltaNetCache):
        assert cache.get_seq_length(0) == 90 and len(cache) == 1 and 0 in cache


def test_gradients_flow_through_the_cache(device):
    layer, x = make(device), normal(1, 80, 40).to(device).requires_grad_()
    _, _, cache = layer(x[:, :70], use_cache=True)
    o, _, _ = layer(x[:, 70:], past_key_values=cache, use_cache=True)
    full = layer(x)[0][:, 70:]
    a, b = (torch.autograd.grad(t.square().sum(), x)[0] for t in (o, full))
    assert a[:, :70].abs().sum() > 0
    assert_close("gradient", a, b, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_ones(device, side):
    layer, x, lengths = make(device).eval(), normal(3, 70, 40).to(device), (70, 1, 33)
    mask = torch.zeros(3, 70, dtype=torch.int64, device=device)
    rows = []
    for b, n in enumerate(lengths):
        span = slice(70 - n, 70) if side == "left" else slice(0, n)
        mask[b, span] = 1
        rows.append(x[b : b + 1, span])
    with torch.no_grad():
        o, _, cache = layer(x.masked_fill(mask[..., None] == 0, torch.nan), mask, use_cache=True)
        follow = normal(3, 1, 40).to(device)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        next_o = layer(follow, mask, past_key_values=cache, use_cache=True)[0]
        for b, row in enumerate(rows):
            alone, _, cache = layer(row, use_cache=True)
            assert_close("output", o[b][mask[b, :70] == 1], alone[0], 1e-5)
            alone = layer(follow[b : b + 1], past_key_values=cache, use_cache=True)[0]
            assert_close("next token", next_o[b], alone[0], 1e-5)
    assert o[mask[:, :70] == 0].eq(0).all()


def test_padding_has_no_gradient(device):
    layer, x = make(device), normal(2, 70, 40).to(device).requires_grad_()
    mask = torch.ones(2, 70, device=device)
    mask[0, :50] = 0
    layer(x, mask)[0].sum().backward()
    assert x.grad[0, :50].eq(0).all() and x.grad[0, 50:].ne(0).any()


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
def test_nothing_leaks_between_packed_sequences(device, mode):
    layer, x = make(device, mode=mode), normal(1, 150, 40).to(device)
    offsets = torch.tensor(
        [0, 3, 3, 80, 140], device=device
    )  # an empty one, and 10 tokens of padding
    packed = layer(x, cu_seqlens=offsets)[0]
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        if a < b:
            assert_close("output", packed[:, a:b], layer(x[:, a:b])[0], 1e-5)
    assert packed[:, 140:].eq(0).all()


def test_bfloat16_autocast_and_module(device):
    layer, x = make(device), normal(2, 70, 40).to(device)
    expected = layer(x)[0]
    with torch.autocast(device, torch.bfloat16):
        o = layer(x)[0]
    o.float().square().sum().backward()
    assert o.dtype == torch.bfloat16
    assert_close("autocast", o, expected, 3e-2)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )
    half = copy.deepcopy(layer).bfloat16()
    assert_close("bfloat16", half(x.bfloat16())[0], expected, 3e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_whole_graph(backend):
    torch._dynamo.reset()
    layer, x = make(), normal(2, 70, 40)
    expected = loss_and_gradients(copy.deepcopy(layer), x)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for a, e in zip(loss_and_gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_compile_packed_without_recompiling_for_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in (70, 90, 131):
        x, offsets = normal(1, T, 40), torch.tensor([0, T // 2, T])
        torch.testing.assert_close(
            compiled(x, cu_seqlens=offsets)[0], layer(x, cu_seqlens=offsets)[0]
        )
    assert counter.frame_count <= 2


def test_copies_and_state_dict():
    layer, x = make(), normal(1, 70, 40)
    other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin(x)[0], layer(x)[0])


def test_initial_values():
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, head_dim=2, num_heads=512)
    A, dt = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert layer.A_log.isfinite().all() and A.max() < 16 and abs(A.mean() - 8) < 1
    assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.2  # log-uniform
    assert layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay
    bound = layer.q_conv1d.weight.abs().max()
    assert 0.45 < bound <= 0.5  # nn.Conv1d's with 4 taps


def test_small_modules(device):
    norm, x = GatedRMSNorm(12).to(device), normal(2, 5, 12).to(device)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (12,), eps=1e-5))
    convolution = ShortConvolution(12, 3, bias=True).to(device)
    y, state = convolution(x, output_final_state=True)
    with torch.no_grad():
        part, state_in_place = convolution(x[:, :3], output_final_state=True)
        rest = convolution.step(x[:, 3:], state_in_place)
    torch.testing.assert_close(torch.cat([part, rest], 1), y)
    assert torch.equal(state, state_in_place)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_v_heads": 3}, "num_v_heads 3 must be a multiple of num_heads 2"),
        ({"num_v_heads": 1}, "multiple"),
        ({"expand_v": 0.3}, "expand_v"),
        ({"mode": "parallel"}, "mode must be 'chunk' or 'fused_recurrent', got 'parallel'"),
        ({"conv_size": 9}, "conv_size"),
        ({"head_dim": 0}, "positive"),
        ({"output_gate_activation": "relu"}, "activation must be 'silu', 'swish' or 'sigmoid'"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_states": normal(2, 70, 39)}, r"\[B, T, 40\].*\(2, 70, 39\)"),
        ({"hidden_states": normal(70, 40)}, "hidden_states must be"),
        ({"attention_mask": torch.ones(2, 69)}, r"attention_mask.*\(2, 69\)"),
        ({"attention_mask": torch.ones(2, 70), "cu_seqlens": torch.tensor([0, 70])}, "exclude"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**{"hidden_states": normal(2, 70, 40), **arguments})


def test_a_cache_needs_a_layer_index():
    with pytest.raises(ValueError, match="layer_idx"):
        make(layer_idx=None)(normal(2, 70, 40), use_cache=True)
