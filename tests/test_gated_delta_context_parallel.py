"""Sequences over several processes with gloo against one process that holds them whole."""

import types
from typing import NamedTuple

import pytest
import torch
import torch.utils.checkpoint

from deltafuse import _library
from deltafuse.gated_delta import (
    ContextParallel,
    GatedDeltaNet,
    chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
    segments,
)
from deltafuse.integrations import fla
from deltafuse.testing import assert_close
from gated_delta_cases import FUSED, Case, exactly, limit_of, make, offsets
from processes import free_port, in_processes, join

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
TOKENS = ("q", "k", "v", "g", "beta")
SHARED = ("A_log", "dt_bias")


class Spread(NamedTuple):
    """A case, the bounds of the ranks' spans, and options of the call."""

    case: Case
    bounds: tuple
    options: dict = {}
    hard: bool = False  # long keys and no decay: nothing fades away
    backend: str = "native"


BARE = {}
TWO = {
    "one sequence": Spread(Case(T=130, lengths=(130,)), (0, 70, 130)),
    "no decay, long keys": Spread(Case(T=130, lengths=(130,)), (0, 50, 130), hard=True),
    "batch": Spread(Case(B=2, T=150, H=1, HV=2), (0, 57, 150)),
    "packed across the border": Spread(Case(T=170, lengths=(40, 0, 90, 40)), (0, 80, 170), BARE),
    "packed at the border": Spread(Case(T=100, lengths=(40, 0, 60)), (0, 40, 100)),
    "without states": Spread(Case(T=100, lengths=(70, 30), h0=False, dht=False), (0, 20, 100)),
    "empty span": Spread(Case(T=90, lengths=(50, 40)), (0, 0, 90)),
    "padding tail": Spread(Case(T=90, lengths=(30, 20)), (0, 20, 90)),
    "fused": Spread(Case(T=130, lengths=(20, 110), HV=3), (0, 70, 130), FUSED),
    "state_v_first": Spread(Case(T=130, lengths=(130,)), (0, 70, 130), {"state_v_first": True}),
}
THREE = {
    "through the middle": Spread(Case(T=200, lengths=(190, 10)), (0, 70, 130, 200)),
    "through, no decay": Spread(Case(T=150, lengths=(150,)), (0, 50, 100, 150), hard=True),
    "batch": Spread(Case(B=2, T=100), (0, 30, 30, 100)),
    "empty span between tokens": Spread(Case(T=90, lengths=(60, 30)), (0, 40, 40, 90)),
    "empty span, reference": Spread(
        Case(T=90, lengths=(60, 30)), (0, 40, 40, 90), backend="reference"
    ),
    "span without sequences": Spread(Case(T=90, lengths=(40, 50)), (0, 40, 40, 90)),
    "only padding at the end": Spread(Case(T=90, lengths=(50,)), (0, 30, 60, 90)),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def whole(spread, dtype):
    """The inputs, and fixed gradients of o and of the final states."""
    x = make(spread.case, dtype, fused=spread.options is FUSED)
    if spread.hard:
        values = {"k": 3 * x["k"], "beta": 0.2 * torch.ones_like(x["beta"]), "g": 0 * x["g"]}
        x.update({name: t.detach().requires_grad_() for name, t in values.items()})
    case, random = spread.case, torch.Generator().manual_seed(3)
    d_o = torch.randn(x["v"].shape, generator=random).to(dtype)
    d_ht = torch.randn(case.N, case.HV, case.K, case.V, generator=random).to(dtype)
    return x, d_o, d_ht if case.dht else torch.zeros_like(d_ht)


def transposed(spread, state):
    return state.mT if spread.options.get("state_v_first") else state


def run_span(spread, dtype, rank):
    """This rank's part of {"o", "ht", "dq", ...}, with how many collectives it took."""
    x, d_o, d_ht = whole(spread, dtype)
    context = ContextParallel(x.pop("cu_seqlens", None), bounds=spread.bounds)
    tokens = context.tokens or slice(*spread.bounds[rank : rank + 2])
    rows = slice(None)
    if context.sequences is not None:
        rows = slice(context.sequences.start, context.sequences.stop)
    part = {name: t.detach() for name, t in x.items()}
    part.update({name: part[name][:, tokens] for name in TOKENS})
    if "initial_state" in part:
        part["initial_state"] = transposed(spread, part["initial_state"][rows].clone())
        if context.pre_num_ranks and context.sequences is not None:
            part["initial_state"][0] = torch.nan  # is not read
    part = {name: t.requires_grad_() for name, t in part.items()}
    described = context
    if spread.options is BARE:  # another package's object, without a copy on the host
        names = ("group", "cu_seqlens", "pre_num_ranks", "post_num_ranks")
        described = types.SimpleNamespace(**{name: getattr(context, name) for name in names})
    o, ht = chunk_gated_delta_rule(
        **part, cp_context=described, output_final_state=True, **spread.options
    )
    d_ht = d_ht[rows].clone()
    if context.post_num_ranks:  # the others end here
        d_ht[-1 if context.sequences is not None else slice(None)] = 0
    d_ht = transposed(spread, d_ht)
    grads = torch.autograd.grad(
        (o, ht), tuple(part.values()), (d_o[:, tokens], d_ht), materialize_grads=True
    )
    found = {"d" + name: grad for name, grad in zip(part, grads, strict=True)}
    ends = len(ht) - (context.post_num_ranks > 0)
    if context.sequences is None:
        ends = 0 if context.post_num_ranks else len(ht)
    found |= {"o": o, "ht": transposed(spread, ht)[:ends]}
    if "initial_state" in part:
        starts = slice(context.pre_num_ranks > 0, None)
        if context.sequences is None and context.pre_num_ranks:
            starts = slice(0, 0)
        found["dinitial_state"] = transposed(spread, found["dinitial_state"])[starts]
    return {name: t.detach().numpy() for name, t in found.items()}


def count_collectives():
    """A list that gets the dtype of each collective from now on."""
    gather, counts = torch.distributed.all_gather, []

    def counted(*args, **options):
        counts.append(args[1].dtype)
        return gather(*args, **options)

    torch.distributed.all_gather = counted
    return counts


def run_spans(rank, world, results):
    counts = count_collectives()
    for name, spread in (TWO if world == 2 else THREE).items():
        for dtype_name, dtype in DTYPES.items():
            counts.clear()
            with _library.use(spread.backend):
                results[name, dtype_name, rank] = run_span(spread, dtype, rank)
            results["collectives", name, dtype_name, rank] = list(counts)


@pytest.fixture(scope="module")
def results():
    return {world: in_processes(run_spans, world) for world in (2, 3)}


def expected_of(spread, dtype):
    """The float64 recurrence over whole sequences in one process."""
    x, d_o, d_ht = whole(spread, dtype)
    options = {name: v for name, v in spread.options.items() if name != "state_v_first"}
    y = exactly(x)
    o, ht = naive_recurrent_gated_delta_rule(**y, output_final_state=True, **options)
    leaves = {name: t for name, t in y.items() if t.is_floating_point()}
    grads = torch.autograd.grad((o, ht), tuple(leaves.values()), (d_o.double(), d_ht.double()))
    return {"o": o, "ht": ht, **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "world, name", [*((2, name) for name in TWO), *((3, name) for name in THREE)]
)
def test_spans_are_the_whole(results, world, name, dtype):
    spread = (TWO if world == 2 else THREE)[name]
    expected = expected_of(spread, DTYPES[dtype])
    parts = [results[world][name, dtype, rank] for rank in range(world)]
    for key, value in expected.items():
        found = [torch.from_numpy(part[key]) for part in parts]
        if key[1:] in SHARED:
            found = torch.stack(found).sum(0)
        else:
            found = torch.cat(found, 0 if key in ("ht", "dinitial_state") else 1)
        limit = limit_of(key, DTYPES[dtype])
        assert_close(key, found.to(value.dtype).view(value.shape), value, limit)


@pytest.mark.parametrize("world", [2, 3])
def test_one_collective_forward_and_one_backward(results, world):
    counts = {key: v for key, v in results[world].items() if key[0] == "collectives"}
    for (_, _, dtype, _), dtypes in counts.items():
        assert dtypes == 2 * [DTYPES[dtype]]
    assert len(counts) == world * 2 * len(TWO if world == 2 else THREE)


LAYERS = {
    "packed": ((20, 0, 60), (0, 30, 50, 80), {}),
    "spans shorter than the window": ((58, 2), (0, 2, 3, 60), {}),
    "bias, no gate": ((20, 60), (0, 50, 50, 80), {"conv_bias": True, "use_gate": False}),
    "no convolution": ((20, 60), (0, 50, 60, 80), {"use_short_conv": False}),
    "batch": (None, (0, 2, 15, 40), {}),
}


REFERENCE = ("bias, no gate",)


def layer_and_input(name):
    lengths, bounds, options = LAYERS[name]
    torch.manual_seed(0)
    layer = GatedDeltaNet(20, head_dim=6, num_heads=2, num_v_heads=4, layer_idx=0, **options)
    B = 2 if lengths is None else 1
    x, d_o = torch.randn(2, B, bounds[-1], 20, dtype=torch.float64)
    return layer.double(), x, d_o, None if lengths is None else offsets(lengths)


def run_layers(rank, world, results):
    for name, (_, bounds, _) in LAYERS.items():
        layer, x, d_o, cu_seqlens = layer_and_input(name)
        context = ContextParallel(cu_seqlens, bounds=bounds)
        span = slice(*bounds[rank : rank + 2])
        x = x[:, span].clone().requires_grad_()
        with _library.use("reference" if name in REFERENCE else "native"):
            o, _, _ = layer(x, cp_context=context)
            o.backward(d_o[:, span])
        with torch.no_grad():
            layer.eval()
            inference = layer(x, cp_context=context)[0]
        grads = {n: p.grad.numpy() for n, p in layer.named_parameters()}
        results[name, rank] = o.detach().numpy(), x.grad.numpy(), grads, inference.numpy()


@pytest.fixture(scope="module")
def layers():
    return in_processes(run_layers, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_over_ranks(layers, name):
    """Output, input gradient and parameter gradients, the convolution's history included."""
    layer, x, d_o, cu_seqlens = layer_and_input(name)
    o = layer(x.requires_grad_(), cu_seqlens=cu_seqlens)[0]
    o.backward(d_o)
    outputs, d_x, grads, inference = zip(*(layers[name, rank] for rank in range(3)), strict=True)
    whole = (torch.cat([torch.from_numpy(t) for t in parts], 1) for parts in (outputs, inference))
    for found in whole:
        assert_close("output", found, o, 1e-11)
    assert_close("dx", torch.cat([torch.from_numpy(t) for t in d_x], 1), x.grad, 1e-11)
    for n, p in layer.named_parameters():
        assert_close(n, sum(torch.from_numpy(part[n]) for part in grads), p.grad, 1e-11)


@pytest.fixture
def alone():
    """A group of this process."""
    join(0, free_port(), 1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process_is_the_plain_call(alone, threads):
    x = make(Case(T=90, lengths=(50, 40)))
    context = ContextParallel(x.pop("cu_seqlens"))
    assert context.tokens == slice(0, 90) and context.sequences == range(2)
    o, ht = chunk_gated_delta_rule(**x, cp_context=context, output_final_state=True)
    plain = chunk_gated_delta_rule(**x, cu_seqlens=context.cu_seqlens, output_final_state=True)
    assert torch.equal(o, plain[0]) and torch.equal(ht, plain[1])
    assert chunk_gated_delta_rule(**x, cp_context=context)[1] is None


def test_convolution_by_its_name_in_the_integration(alone):
    x, weight, cu_seqlens = torch.randn(1, 9, 5), torch.randn(5, 4), offsets((3, 6))
    context = ContextParallel(cu_seqlens)
    for activation in ("swish", None):
        y, state = fla.causal_conv1d(x, weight, activation=activation, cp_context=context)
        plain = fla.causal_conv1d(x, weight, activation=activation, cu_seqlens=cu_seqlens)
        assert state is None and torch.equal(y, plain[0])
    module = fla.ShortConvolution(5, 4, bias=True)
    assert torch.equal(module(x, cp_context=context)[0], module(x, cu_seqlens=cu_seqlens)[0])


def test_within_a_checkpoint(alone):
    x = make(Case(T=90, lengths=(50, 40)))
    context = ContextParallel(x.pop("cu_seqlens"))

    def call(*tensors):
        inputs = dict(zip(x, tensors, strict=True))
        return chunk_gated_delta_rule(**inputs, cp_context=context)[0].square().sum()

    again = torch.utils.checkpoint.checkpoint(call, *x.values(), use_reentrant=False)
    for a, b in zip(
        torch.autograd.grad(again, tuple(x.values())),
        torch.autograd.grad(call(*x.values()), tuple(x.values())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_keeps_the_maps_in_float32():
    """One precision for the states: a product of the scan in bfloat16 would cost three digits."""
    M, S = torch.randn(2, 1, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        within = segments.compose(M, S, S)
    assert torch.equal(within, M @ S + S)


BAD_CONTEXTS = {
    "another object": (object(), {}, TypeError, "cp_context must be a ContextParallel"),
    "zigzag": ({"layout": "zigzag"}, {}, ValueError, "contiguous spans, got layout 'zigzag'"),
    "auto_cp": ({}, {"auto_cp": True}, ValueError, "auto_cp=True and cp_context exclude"),
    "ranks that are not there": ({"post_num_ranks": 1}, {}, ValueError, "rank 0 of 1 .* 1 after"),
    "offsets beyond the span": ({"cu_seqlens": offsets((99,))}, {}, ValueError, "cu_seqlens must"),
}


@pytest.mark.parametrize("name", BAD_CONTEXTS)
def test_bad_contexts(alone, name):
    context, options, error, message = BAD_CONTEXTS[name]
    if isinstance(context, dict):
        good = {"group": None, "cu_seqlens": offsets((90,)), "pre_num_ranks": 0}
        context = types.SimpleNamespace(**{**good, "post_num_ranks": 0, **context})
    with pytest.raises(error, match=message):
        chunk_gated_delta_rule(**make(Case(T=90, h0=False)), cp_context=context, **options)


@pytest.mark.parametrize("bounds", [(0, 50), (0, 60, 90), (1, 90), (90, 0)], ids=str)
def test_bad_bounds(alone, bounds):
    with pytest.raises(
        ValueError, match="bounds must be 2 numbers that rise from 0 to at least 90"
    ):
        ContextParallel(offsets((90,)), bounds=bounds)


def test_layer_refuses_caches_and_masks_with_a_context(alone):
    layer = GatedDeltaNet(20, head_dim=6, num_heads=2, layer_idx=0)
    x, context = torch.randn(1, 9, 20), ContextParallel(offsets((9,)))
    for options in ({"use_cache": True}, {"attention_mask": torch.ones(1, 9)}):
        with pytest.raises(ValueError, match="cp_context excludes"):
            layer(x, cp_context=context, **options)
