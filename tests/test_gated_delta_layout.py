"""Chunked gated delta rule: memory layouts, determinism, what is allocated, who gets a gradient."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deltafuse.gated_delta import chunk_gated_delta_rule
from gated_delta_cases import CASES, FUSED, Case, compare, make, outputs_and_gradients

CASE = Case(B=2, T=150, H=2, HV=4, K=24, V=40)


def assert_same_bits(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_v_first_is_the_transpose_bitwise(dtype):
    x = make(CASE, dtype)
    expected = outputs_and_gradients(chunk_gated_delta_rule, x, dht=False)
    x["initial_state"] = x["initial_state"].detach().mT.contiguous().requires_grad_()
    actual = outputs_and_gradients(chunk_gated_delta_rule, x, dht=False, state_v_first=True)
    for name in ("ht", "dinitial_state"):
        assert actual[name].is_contiguous()
        actual[name] = actual[name].mT
    assert_same_bits(actual, expected)


def fused_projection(x):
    """q, k, v as slices of one [B, T, ...] buffer, g and beta of another, as a layer makes them."""
    B, T, H, K = x["q"].shape
    HV, V = x["v"].shape[2:]
    qkv = torch.cat([x[n].detach().flatten(2) for n in ("q", "k", "v")], -1)
    ab = torch.stack([x["g"].detach(), x["beta"].detach()], -1)
    q, k, v = qkv.split([H * K, H * K, HV * V], -1)
    views = {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
    }
    views |= {"g": ab[..., 0], "beta": ab[..., 1]}
    return {**x, **{name: t.requires_grad_() for name, t in views.items()}}


def last_dimension_strided(x):
    return {
        name: t.detach().mT.contiguous().mT.requires_grad_() if t.dim() == 4 else t
        for name, t in x.items()
    }


@pytest.mark.parametrize("layout", [fused_projection, last_dimension_strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_bitwise(layout, dtype):
    x = make(CASE, dtype)
    strided = layout(x)
    assert not strided["q"].is_contiguous()
    expected = outputs_and_gradients(chunk_gated_delta_rule, x)
    assert_same_bits(outputs_and_gradients(chunk_gated_delta_rule, strided), expected)


def test_expanded_upstream_gradients():
    """sum() hands back a gradient whose strides are all zero."""
    x = make(CASE)
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    ones = torch.ones_like(o), torch.ones_like(ht)
    expected = torch.autograd.grad((o, ht), x["v"], ones, retain_graph=True)
    assert torch.equal(torch.autograd.grad(o.sum() + ht.sum(), x["v"])[0], expected[0])


def test_outputs_that_the_loss_ignores():
    x = make(CASE)
    o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    (both,) = torch.autograd.grad(o.sum() + ht.sum(), x["v"], retain_graph=True)
    (one,) = torch.autograd.grad(o.sum(), x["v"], retain_graph=True)
    (other,) = torch.autograd.grad(ht.sum(), x["v"])
    torch.testing.assert_close(one + other, both)


@pytest.mark.parametrize("needed", ["q", "beta", "initial_state", "A_log", "dt_bias"])
def test_gradients_for_a_subset(needed):
    x = make(Case(T=20), fused=True)
    expected = outputs_and_gradients(chunk_gated_delta_rule, x, dht=False, **FUSED)
    for name, t in x.items():
        t.requires_grad_(name == needed)
    o, _ = chunk_gated_delta_rule(**x, **FUSED)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(o)
    o.backward(do)
    assert torch.equal(x[needed].grad, expected["d" + needed])
    assert all(t.grad is None for name, t in x.items() if name != needed)


def test_mixed_gate_dtypes():
    """g and beta may have any dtype and get their gradients in it."""
    x = make(CASE, torch.bfloat16)
    x["g"] = x["g"].detach().bfloat16().requires_grad_()
    x["beta"] = x["beta"].detach().double().requires_grad_()
    compare(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable_with_any_number_of_threads(threads, dtype):
    cases = [CASES["T500"], CASES["packed"], Case(B=1, T=200, H=1, HV=4, K=64, V=130)]
    for case in cases:
        x = make(case, dtype, fused=True)
        results = []
        for n in (1, 1, 2, 8):
            threads(n)
            results.append(outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED))
        for other in results[1:]:
            assert_same_bits(other, results[0])


def test_bitwise_equal_over_twenty_runs():
    x = make(CASES["packed"], fused=True)
    first = outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED)
    for _ in range(19):
        assert_same_bits(outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED), first)


def test_concurrent_calls():
    """Calls from several Python threads do not share scratch memory."""
    inputs = [make(CASES[name], fused=True) for name in ("T500", "packed", "T64", "T17")]

    def run(x):
        return outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED)

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, one in zip(pool.map(run, inputs), expected, strict=True):
                assert_same_bits(actual, one)


@pytest.mark.parametrize("name", ["T17", "T65_group2", "packed"])
def test_every_element_is_written(nan_filled_memory, name):
    assert torch.empty(3).isnan().all()
    compare(make(CASES[name], fused=True), 2, **FUSED)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("options", [{}, FUSED], ids=["plain", "fused"])
def test_scratch_memory_does_not_carry_bad_numbers_on(threads, options, name, bad):
    """One worker runs the longest sequence first, on the memory that the others use after it."""
    threads(1)
    x = make(Case(T=207, HV=3, K=20, V=27, lengths=(37, 105, 5, 60)), fused=bool(options))
    expected = outputs_and_gradients(chunk_gated_delta_rule, x, **options)
    with torch.no_grad():
        x[name][:, 37:142] = bad
    actual = outputs_and_gradients(chunk_gated_delta_rule, x, **options)
    rest = torch.ones(207, dtype=torch.bool)
    rest[37:142] = False
    for key in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        assert torch.equal(actual[key][:, rest], expected[key][:, rest]), key
    for key in ("ht", "dinitial_state"):
        assert torch.equal(actual[key][[0, 2, 3]], expected[key][[0, 2, 3]]), key


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_in_their_sequence_and_head(bad):
    x = make(Case(B=2, T=100, H=2, HV=4), torch.float32)
    expected = outputs_and_gradients(chunk_gated_delta_rule, x)
    with torch.no_grad():
        x["v"][0, 50, 1] = bad
    actual = outputs_and_gradients(chunk_gated_delta_rule, x)
    assert not actual["o"][0, 50:, 1].isfinite().any()
    for name in ("o", "dv", "dg", "dbeta"):
        for t in (actual, expected):
            t[name] = torch.cat([t[name][1], t[name][0][:, [0, 2, 3]]], 1)
    for name in ("dq", "dk"):  # the group of value heads 0 and 1 reads key head 0
        for t in (actual, expected):
            t[name] = torch.cat([t[name][1], t[name][0][:, 1:]], 1)
    for name in ("ht", "dinitial_state"):
        for t in (actual, expected):
            t[name] = torch.cat([t[name][1], t[name][0][[0, 2, 3]]])
    assert_same_bits(actual, expected)


def test_inference_allocates_only_its_outputs():
    x = {name: t.detach() for name, t in make(CASE).items()}
    chunk_gated_delta_rule(**x)
    with torch.profiler.profile(profile_memory=True) as profile:
        o, ht = chunk_gated_delta_rule(**x, output_final_state=True)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert allocated <= 4 * (o.numel() + ht.numel()) + 256


PEAK = """
import torch
from deltafuse import chunk_gated_delta_rule

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def inputs(T):
    q, k = torch.rand(2, 1, T, 8, 128)
    return q, k, torch.rand(1, T, 8, 128), -torch.rand(1, T, 8), torch.rand(1, T, 8)

x, options = inputs(8192), {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
chunk_gated_delta_rule(*inputs(64), **options)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = memory("VmRSS")
o, ht = chunk_gated_delta_rule(*x, **options)
print(memory("VmHWM") - before, 4 * (o.numel() + ht.numel()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc")
def test_inference_needs_little_memory_beside_its_outputs():
    """The resident peak of a fresh process, the scratch that the profiler cannot see included."""
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, outputs = (int(number) for number in done.stdout.split())
    assert outputs <= peak + 2**20  # it did count
    assert peak <= outputs + 16 * 2**20


def test_training_saves_only_its_inputs():
    x = make(CASE, fused=True)
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk_gated_delta_rule(**x, **FUSED, save_states=False)
    assert set(saved) == {t.data_ptr() for t in x.values()}
