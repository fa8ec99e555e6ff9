"""The gated delta rule layers of Hugging Face transformers (Qwen3-Next, Qwen3.5, OLMo Hybrid, ...).

These models call functions of their own modules, which are plain PyTorch unless
flash-linear-attention and causal-conv1d are installed. `replace(model)` puts ours in their place:
same parameters, caches and results, on the CPU too, and sequences packed by `cu_seq_lens_q`.
"""

import sys

import torch.nn.functional as F

from .. import _checks, gated_delta

OP = "integrations.transformers"
_replaced = {}  # (module or class, name): what was there


def chunk_gated_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **ignored,
):
    """`torch_chunk_gated_delta_rule` of transformers; other keywords of a model are ignored."""
    return gated_delta.chunk_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )


def recurrent_gated_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **ignored,
):
    """`torch_recurrent_gated_delta_rule` of transformers."""
    return gated_delta.fused_recurrent_gated_delta_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def causal_conv1d(
    hidden_states, weight, bias=None, activation=None, cu_seq_lens_q=None, seq_idx=None, **ignored
):
    """`causal_conv1d_fn` of transformers: hidden_states and the result are [B, D, T]."""
    if seq_idx is not None and cu_seq_lens_q is None:
        _checks.fail(OP, "packed sequences are told apart by cu_seq_lens_q, got seq_idx alone")
    y, _ = gated_delta.causal_conv1d(
        hidden_states.transpose(1, 2), weight, bias, None, cu_seq_lens_q, activation
    )
    return y.transpose(1, 2)


def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    """`causal_conv1d_update` of transformers: one token [B, D, 1], conv_state in place."""
    oldest = conv_state.shape[-1] + 1 - weight.shape[-1]  # inputs that no tap reads
    y = gated_delta.causal_conv1d_update(
        hidden_states.transpose(1, 2), conv_state, F.pad(weight, (oldest, 0)), bias, activation
    )
    return y.transpose(1, 2)


def gated_norm(self, hidden_states, gate):
    """`forward` of transformers' gated RMS norms."""
    return gated_delta.gated_rms_norm(hidden_states, self.weight, gate, self.variance_epsilon)


FUNCTIONS = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
    "causal_conv1d_fn": causal_conv1d,
    "causal_conv1d_update": causal_conv1d_update,
}


def _put(owner, name, function):
    _replaced.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, function)


def replace(model):
    """Runs the gated delta rule layers in `model` on our kernels.

    It changes the modules that define the layers, and so all models of these architectures in the
    process; `restore()` undoes it.

    Args:
        model: a model of transformers, or any torch.nn.Module that contains one.

    Raises:
        ValueError: no layer of it is a gated delta rule of transformers 5.24 or a release that
            names its functions alike.
    """
    classes = {type(module) for module in model.modules()}
    owners = {sys.modules[cls.__module__] for cls in classes}
    owners = [owner for owner in owners if all(hasattr(owner, name) for name in FUNCTIONS)]
    if not owners:
        _checks.fail(OP, f"no gated delta rule layer of transformers in {type(model).__name__}")
    for owner in owners:
        for name, function in FUNCTIONS.items():
            _put(owner, name, function)
    for cls in classes:
        if sys.modules[cls.__module__] in owners and cls.__name__.endswith("RMSNormGated"):
            _put(cls, "forward", gated_norm)


def restore():
    """Undoes every `replace`."""
    while _replaced:
        (owner, name), function = _replaced.popitem()
        setattr(owner, name, function)
