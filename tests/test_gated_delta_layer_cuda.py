"""What only the emulator sees of the CUDA kernels of the layer: races, bounds, bytes moved."""

import pytest
import torch

from conftest import MODES
from deltafuse import _library, backend_info
from deltafuse.gated_delta import (
    GatedDeltaNet,
    causal_conv1d,
    causal_conv1d_update,
    fused_gdn_gate,
    fused_recurrent_gated_delta_rule,
    gated_rms_norm,
    l2norm,
    ops_layer,
    ops_recurrent,
)
from gated_delta_cases import FUSED, Case, make, outputs_and_gradients
from gated_delta_cases import compare as compare_rule
from layer_cases import compare, normal, run
from test_gated_norm import gate_inputs, norm_inputs
from test_short_conv import conv
from test_short_conv import make as conv_inputs

pytestmark = pytest.mark.emulated
F32, BF16 = torch.float32, torch.bfloat16
in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
# each tile of K; segments and blocks cut; several warps (in the second with V beyond a tile)
RULES = {
    "K 64, packed": Case(T=85, HV=2, K=12, V=20, lengths=(0, 1, 66, 0, 13)),
    "K 128, group": Case(T=11, HV=3, K=100, V=36),
    "K 256": Case(B=2, T=6, HV=1, K=200, V=20),
    "several warps": Case(B=67, T=2, HV=2, K=8, V=40),
}
CONVOLUTIONS = {
    "vectors": (1, 37, 40, 4),
    "vectors, many taps": (1, 19, 24, 7),
    "elements": (2, 19, 37, 3),
    "elements, many taps": (1, 9, 5, 6),
    "two CTAs": (1, 3, 1032, 4),
}
ROWS = [(70, 24), (9, 256), (5, 37), (3, 1060), (3, 1031)]
NAMES = (
    "gated_delta_recurrent_fwd", "gated_delta_recurrent_bwd", "causal_conv1d_fwd",
    "causal_conv1d_bwd", "causal_conv1d_update", "gated_rms_norm_fwd", "gated_rms_norm_bwd",
    "l2norm_fwd", "l2norm_bwd", "gdn_gate_fwd", "gdn_gate_bwd",
)  # fmt: skip


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_registered_as_kernels(emulated):
    ops = backend_info()["ops"]
    assert all(ops[name]["cpu"] == "cpu" for name in NAMES)
    for name in NAMES:
        if name.endswith("_fwd") or name.endswith("_update"):
            assert ops[name]["cuda float64"] == "reference"


def test_the_layer_needs_no_reference(emulated, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the reference ran")

    for name in ("naive_causal_conv1d", "naive_gated_rms_norm", "naive_l2norm", "naive_gdn_gate"):
        monkeypatch.setattr(ops_layer.reference, name, refuse)
    monkeypatch.setattr(ops_recurrent.reference, "naive_recurrent_gated_delta_rule", refuse)
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "num_heads": 1, "num_v_heads": 2, "mode": "fused_recurrent"}
    layer, x = GatedDeltaNet(16, **sizes, layer_idx=0), normal(2, 5, 16)
    layer(x)[0].sum().backward()
    with torch.no_grad():
        _, _, cache = layer(x, use_cache=True)
        layer(x[:, :1], past_key_values=cache, use_cache=True)


@in_every_mode
@pytest.mark.parametrize("name", RULES)
def test_rule_in_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        compare_rule(
            make(RULES[name], BF16 if name == "K 256" else F32, fused=True),
            2,
            fused_recurrent_gated_delta_rule,
            **FUSED,
        )


@in_every_mode
def test_decay_channels_in_every_mode(emulated_with, mode):
    x = {name: t.detach() for name, t in make(Case(T=9, HV=2, K=140, V=12)).items()}
    x |= {"gk": -torch.rand(1, 9, 2, 140), "gv": -torch.rand(1, 9, 2, 12)}
    x["beta"] = torch.rand(1, 9, 2, 12)
    expected = fused_recurrent_gated_delta_rule(**x)[0]
    with emulated_with(**mode):
        assert torch.equal(fused_recurrent_gated_delta_rule(**x)[0], expected)


@in_every_mode
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_every_mode(emulated_with, name, mode):
    with emulated_with(**mode):
        for dtype in (F32, BF16):
            x, weight, bias, state = conv_inputs(CONVOLUTIONS[name], dtype)
            compare(conv, (x, weight, bias, state))
            causal_conv1d_update(x[:, :2], state, weight, bias)


@in_every_mode
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_norms_in_every_mode(emulated_with, shape, mode):
    with emulated_with(**mode):
        for dtype in (F32, BF16):
            inputs = norm_inputs(*shape, dtype)
            compare(gated_rms_norm, inputs)
            compare(l2norm, inputs[:1])


@in_every_mode
@pytest.mark.parametrize("shape", [(70, 8), (37, 5)], ids=str)
def test_gate_in_every_mode(emulated_with, shape, mode):
    with emulated_with(**mode):
        for dtype in (F32, BF16):
            compare(fused_gdn_gate, gate_inputs(*shape, dtype))


def equal_bits(results):
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_equal_bits_in_every_schedule(emulated_with):
    rule, bits = make(RULES["K 128, group"], fused=True), []
    for seed in range(3):
        with emulated_with(seed=seed):
            grads = outputs_and_gradients(fused_recurrent_gated_delta_rule, rule, **FUSED)
            around = [
                run(conv, conv_inputs((2, 40, 24, 4))),
                run(gated_rms_norm, norm_inputs(300, 40)),
                run(fused_gdn_gate, gate_inputs(100, 4)),
            ]
        bits.append([*grads.values(), *(t for pair in around for part in pair for t in part)])
    equal_bits(bits)


@pytest.mark.parametrize("K", [8, 132])
def test_a_sequence_does_not_depend_on_the_batch(emulated, K):
    """Larger batches have CTAs of more warps: other tiles, the same bits."""
    x = make(Case(B=67, T=2, HV=4, K=K, V=20), fused=True)
    alone = {
        name: t.detach()[:1].requires_grad_() if t.shape[:1] == (67,) else t
        for name, t in x.items()
    }
    # the same gradients of o and of S_T for the first row
    d_o, d_state = normal(*x["v"].shape), normal(*x["initial_state"].shape)
    names = ("q", "k", "v", "g", "beta", "initial_state")

    def gradients(inputs, count):
        o, ht = fused_recurrent_gated_delta_rule(**inputs, **FUSED, output_final_state=True)
        return (
            o,
            ht,
            *torch.autograd.grad(
                (o, ht), [inputs[name] for name in names], (d_o[:count], d_state[:count])
            ),
        )

    for whole, row in zip(gradients(x, 67), gradients(alone, 1), strict=True):
        assert torch.equal(whole[:1], row)


@pytest.mark.parametrize("offsets", [[0, 9, 4], [3, 5], [0, 40], [-7, 2]], ids=str)
def test_wrong_offsets_leave_no_row(emulated_with, offsets):
    """Nobody checks offsets on a GPU; whatever they say, accesses stay within the tensors."""
    cu_seqlens, states = torch.tensor(offsets), len(offsets) - 1
    x = [t.detach() for t in make(Case(T=9, HV=2, K=8, V=12, lengths=offsets[1:])).values()][:6]
    q, k, v, g, beta, state = x
    rest = (cu_seqlens, None, None, 0.3, False, 0.0, False)
    conv_x, *parameters = conv_inputs((1, 9, 24, 4), states=states)
    fwd, bwd, conv_fwd, conv_bwd = (
        getattr(getattr(torch.ops, _library._current), name) for name in (*NAMES[:2], *NAMES[2:4])
    )
    with emulated_with(strict=True):
        o, final = fwd(q, k, v, g, None, None, beta, state, *rest, True)
        bwd(o, final, q, k, v, g, beta, state, *rest)
        y, last = conv_fwd(conv_x, *parameters, cu_seqlens, True, True)
        conv_bwd(y, last, conv_x, *parameters, cu_seqlens, True)


def profiles(emulated, function, tensors):
    """The launches of a forward and of its backward."""
    x = [t.detach().clone().requires_grad_() for t in tensors]
    with emulated.profile() as forward:
        y = function(*x)
    y = y[0] if isinstance(y, tuple) else y
    dy = normal(*y.shape).to(y.dtype)
    with emulated.profile() as backward:
        torch.autograd.grad(y, x, dy)
    return forward, backward


def check_launch(launch, read, written, spare=0, banks=1.1):
    """Unique bytes as the tensors say; sectors and wavefronts within a tenth of the fewest."""
    assert launch["unique_bytes_read"] == read
    assert launch["unique_bytes_written"] == written
    assert launch["local_loads"] == launch["local_stores"] == 0
    for kind in ("load", "store"):
        sectors, ideal = (launch[f"global_{kind}_sectors{end}"] for end in ("", "_ideal"))
        assert sectors <= 1.1 * ideal + spare, kind
        waves, ideal = (launch[f"shared_{kind}_wavefronts{end}"] for end in ("", "_ideal"))
        assert waves <= (banks if kind == "store" else 1.1) * ideal, kind


def test_short_sequences_leave_no_states(emulated):
    """Of many sequences of a few tokens the backward writes results alone."""
    x = make(Case(T=60, HV=1, K=8, V=16, lengths=(2,) * 30, h0=False))
    offsets, names = x.pop("cu_seqlens"), list(x)
    _, (bwd, *_) = profiles(
        emulated,
        lambda *t: fused_recurrent_gated_delta_rule(
            **dict(zip(names, t, strict=True)), cu_seqlens=offsets
        ),
        list(x.values()),
    )
    assert bwd["unique_bytes_written"] == size(x["v"]) + 60 * (2 * 8 + 2) * 4


@each_dtype
def test_bytes_of_the_convolution(emulated, dtype):
    x, weight, bias, _ = conv_inputs((1, 256, 1024, 4), dtype)
    (fwd,), (bwd, sums) = profiles(emulated, lambda *t: causal_conv1d(*t)[0], (x, weight, bias))
    chunks, parameters = 256 // 16, size(weight, bias)
    partial = chunks * 5 * 1024 * 4
    # float taps and biases are staged by pairs of threads in one bank: only once a chunk
    check_launch(fwd, size(x) + parameters, size(x), banks=2.5)
    # two words of float sums to one of bfloat16 channels: halves of sectors
    halves = partial // 32 if dtype == BF16 else 0
    check_launch(bwd, 2 * size(x) + parameters, size(x) + partial, halves, banks=2.5)
    assert sums["unique_bytes_read"] == partial
    assert sums["unique_bytes_written"] == parameters
    # a chunk of 16 tokens has 3 rows of x besides, backward also of the later x and dy
    rows = size(x) // 256
    assert fwd["global_load_bytes"] <= size(x) + chunks * (3 * rows + parameters)
    assert bwd["global_load_bytes"] <= 2 * size(x) + chunks * (9 * rows + parameters)


@each_dtype
def test_bytes_of_the_update(emulated, dtype):
    x, weight, bias, state = conv_inputs((3, 1, 256, 4), dtype)
    with emulated.profile() as launches:
        causal_conv1d_update(x, state, weight, bias)
    (launch,) = launches
    check_launch(launch, size(x, state, weight, bias), size(x, state), banks=1.5)
    assert launch["global_load_bytes"] == size(x, state) + 3 * size(weight, bias)


@each_dtype
@pytest.mark.parametrize("V", [64, 128, 2048])
def test_bytes_of_the_norms(emulated, dtype, V):
    x, weight, gate = norm_inputs(264 * 8 if V < 2048 else 64, V, dtype)
    (fwd,), (bwd, _) = profiles(emulated, gated_rms_norm, (x, weight, gate))
    rows = bwd["grid"][0] * (8 if V == 2048 and dtype == F32 or V > 1024 else 1)
    check_launch(fwd, size(x, weight, gate), size(x))
    check_launch(bwd, 3 * size(x) + size(weight), 2 * size(x) + 4 * V * rows, 4 * V * rows // 32)
    (fwd,), (bwd,) = profiles(emulated, l2norm, (x,))
    check_launch(fwd, size(x), size(x))
    check_launch(bwd, 2 * size(x), size(x))


@each_dtype
def test_bytes_of_the_gate(emulated, dtype):
    a, A_log, dt_bias = gate_inputs(2048, 32, dtype)
    (fwd,), (bwd, sums) = profiles(emulated, fused_gdn_gate, (a, A_log, dt_bias))
    g, constants = 4 * a.numel(), size(A_log, dt_bias)
    partial = bwd["grid"][0] * 2 * 32 * 4
    spare = fwd["grid"][0] * 8 * 32  # of the constants
    check_launch(fwd, size(a) + constants, g, spare)
    check_launch(bwd, size(a) + g + constants, size(a) + partial, spare)
    check_launch(sums, partial, constants, 8)


@each_dtype
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 32)])
def test_bytes_of_the_rule(emulated, dtype, K, V):
    x = make(Case(T=24, HV=2, K=K, V=V), dtype, fused=True)
    named = list(x)
    forward, backward = profiles(
        emulated,
        lambda *t: fused_recurrent_gated_delta_rule(
            **dict(zip(named, t, strict=True)), **FUSED, output_final_state=True
        ),
        list(x.values()),
    )
    (fwd,), (bwd, keys, gates, _) = forward, backward
    o, state = size(x["v"]), size(x["initial_state"])
    check_launch(fwd, size(*x.values()), o + state)
    tiles = bwd["grid"][0] // 2
    partial = tiles * 24 * 2 * (2 * K + 2) * 4
    starts = (24 // (8 if K <= 128 else 4) - 1) * state
    # the blocks' states and the initial one are written, and read where they are needed
    check_launch(
        bwd, size(*x.values()) + o + starts + state, o + partial + starts + 2 * state, banks=1.2
    )
    check_launch(keys, 24 * 2 * tiles * 2 * K * 4 + size(x["q"], x["k"]), size(x["q"], x["k"]))
    assert gates["unique_bytes_written"] == 2 * 24 * 2 * 4 + 2 * 2 * 4


def test_no_float64_kernel(emulated):
    ops = getattr(torch.ops, _library._current)
    with pytest.raises(RuntimeError, match="float64"):
        ops.l2norm_fwd(torch.ones(2, 3, dtype=torch.float64), 1e-6)
    with pytest.raises(RuntimeError, match="float64"):
        ops.gdn_gate_fwd(torch.ones(2, 3, dtype=torch.float64), torch.ones(3), None)
    assert l2norm(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
