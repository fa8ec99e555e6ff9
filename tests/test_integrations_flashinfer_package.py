"""The adapters against flashinfer's own references in PyTorch, where the package is there."""

import pytest
import torch
import torch.nn.functional as F

from deltafuse.integrations import flashinfer
from deltafuse.testing import assert_close
from flashinfer_package import references
from gated_delta_cases import offsets
from layer_cases import normal

H, HV, SIZE = 2, 4, 16
BF16 = 6e-3  # their outputs are rounded to bfloat16


def tokens(*shape):
    """q, k, v of unit keys, and the logits a, b."""
    q, k = (F.normalize(normal(*shape, H, SIZE, seed=n), dim=-1) for n in range(2))
    return q, k, normal(*shape, HV, SIZE), normal(*shape, HV, seed=2), normal(*shape, HV, seed=3)


def gates():
    return normal(HV, seed=4), normal(HV, seed=5)


def test_prefill():
    q, k, v, a, b = tokens(70)
    A_log, dt_bias = gates()
    state, cu_seqlens = normal(2, HV, SIZE, SIZE), offsets((30, 40))
    expected, states = references()._gdn_prefill_reference(
        q, k, v, state, A_log, a, dt_bias, b, cu_seqlens, 0.3
    )
    alpha = torch.exp(-A_log.exp() * F.softplus(a + dt_bias))
    o, found = flashinfer.chunk_gated_delta_rule(
        q, k, v, alpha, b.sigmoid(), 0.3, state, True, cu_seqlens
    )
    assert_close("o", o, expected, BF16)
    assert_close("state", found, states, 5e-6)


def test_decode():
    q, k, v, a, b = tokens(3, 1)
    A_log, dt_bias = gates()
    state = normal(3, HV, SIZE, SIZE)
    inputs = (A_log, a, dt_bias, b)
    expected, states = references()._gdn_decode_reference(q, k, v, state.clone(), *inputs, 0.3)
    v_first, k_first = state.clone(), state.mT.contiguous()
    o, _ = flashinfer.gated_delta_rule_decode_pretranspose(
        q, k, v, v_first, *inputs, 0.3, use_qk_l2norm=False
    )
    assert_close("o", o, expected, BF16)
    assert_close("state", v_first, states, 5e-6)
    flashinfer.gated_delta_rule_decode(q, k, v, k_first, *inputs, 0.3, use_qk_l2norm=False)
    assert_close("state", k_first.mT, states, 5e-6)


@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_verify(keep, l2norm):
    q, k, v, a, b = (t.bfloat16().float() for t in tokens(3, 4))  # what theirs rounds to
    if l2norm:
        q, k = 4 * q, 0.5 * k
    A_log, dt_bias = gates()
    pool, slots = normal(6, HV, SIZE, SIZE), torch.tensor([5, -1, 2], dtype=torch.int32)
    buffers = [torch.zeros(3, 4, HV, SIZE, SIZE) for _ in range(2)]
    options = {"disable_state_update": keep, "use_qk_l2norm": l2norm}
    inputs = (A_log, a, dt_bias, b)
    expected, states = references()._gdn_mtp_reference(
        q, k, v, pool, slots, *inputs, intermediate_states_buffer=buffers[0], **options
    )
    o, found = flashinfer.gated_delta_rule_mtp(
        q, k, v, pool.clone(), slots, *inputs, intermediate_states_buffer=buffers[1], **options
    )
    assert_close("o", o, expected, 5e-6)
    assert_close("states", found, states, 5e-6)
    assert_close("snapshots", buffers[1], buffers[0], 5e-6)
