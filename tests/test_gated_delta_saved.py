"""What the forward of the chunk form leaves to its backward (save_states)."""

import pytest
import torch

from deltafuse.gated_delta import chunk_gated_delta_rule, ops
from gated_delta_cases import CASES, FUSED, Case, make, outputs_and_gradients


def saved_bytes(x, **options):
    """Bytes that autograd keeps for a call's backward, besides the inputs."""
    inputs = {t.data_ptr() for t in x.values()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in inputs:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk_gated_delta_rule(**x, **options)
    return sum(kept.values())


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_recomputed_states_bitwise(cpu_isa, poisoned, name, dtype):
    x = make(CASES[name], dtype, fused=True)
    results = [
        outputs_and_gradients(chunk_gated_delta_rule, x, **FUSED, save_states=save)
        for save in (True, False)
    ]
    for key, saved in results[0].items():
        assert not saved.isnan().any(), key
        assert torch.equal(saved, results[1][key]), key


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_other_chunk_sizes_and_single_columns_bitwise(poisoned, chunk_size):
    x = make(Case(T=100, H=1, HV=1, K=33, V=150, lengths=(37, 0, 50)))  # a tile of V a thread
    saved, recomputed = (
        outputs_and_gradients(chunk_gated_delta_rule, x, chunk_size=chunk_size, save_states=save)
        for save in (True, False)
    )
    for key in saved:
        assert torch.equal(saved[key], recomputed[key]), key


def test_output_is_that_of_any_chunk_size_and_of_inference_bitwise(cpu_isa, poisoned):
    x = make(Case(T=100, H=1, HV=2, K=33, V=150, lengths=(37, 0, 50)))
    o, state = chunk_gated_delta_rule(**x, output_final_state=True, save_states=True)
    for chunk_size in (16, 32, 64):
        with torch.no_grad():
            results = chunk_gated_delta_rule(**x, output_final_state=True, chunk_size=chunk_size)
        assert torch.equal(results[0], o) and torch.equal(results[1], state), chunk_size


def test_what_is_kept(monkeypatch):
    x = make(Case(B=2, T=70, HV=4, K=24, V=40))
    bytes_of_chunk = 4 * (32 * 48 + 64 * 48)  # S and E, padded to 16
    assert saved_bytes(x, save_states=True) == 2 * 2 * 4 * bytes_of_chunk
    assert saved_bytes(x, save_states=False) == 0
    assert saved_bytes(x) == saved_bytes(x, save_states=True)
    monkeypatch.setattr(ops, "_HOST_MEMORY", 64 * (16 * bytes_of_chunk - 1))
    assert saved_bytes(x) == 0
    monkeypatch.undo()
    with torch.no_grad():
        assert saved_bytes(x, save_states=True) == 0
