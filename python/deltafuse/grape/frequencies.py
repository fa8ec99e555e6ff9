"""Frequencies of the planes, with the usual ways of stretching them for longer contexts."""

import math

import torch

from .. import _checks

KINDS = ("default", "linear", "ntk", "llama3", "yarn")


def rotary_frequencies(
    dim,
    base=10000.0,
    *,
    scaling="default",
    factor=1.0,
    original_max_position=None,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
    attention_factor=None,
    device=None,
):
    """Frequencies base^(-2p / dim) of the planes p, scaled, and the factor for cos and sin.

    Those of rotary embeddings (arXiv 2104.09864), which are Multiplicative GRAPE (arXiv 2512.07805)
    with coordinate planes and this spectrum. The arithmetic is float32 in the order that
    transformers uses, so that the tables of a checkpoint are met bit by bit.

    Args:
        dim: rotary width Dr, even.
        base: wavelength base.
        scaling: "default"; "linear" divides by `factor`; "ntk" raises the base by
            factor^(dim / (dim - 2)); "llama3" divides long wavelengths by `factor` and blends
            between `low_freq_factor` and `high_freq_factor`; "yarn" (arXiv 2309.00071) blends by
            the number of turns within the original context.
        factor: how many times longer the context becomes, at least 1.
        original_max_position: the context that was trained on; for llama3 and yarn.
        low_freq_factor, high_freq_factor: of llama3.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: of yarn.
        attention_factor: of yarn, instead of 0.1 ln(factor) + 1.
        device: where the result is.

    Returns:
        freqs float32 [dim / 2], and the attention factor (float; 1.0 except for yarn).

    Raises:
        ValueError: an odd dim, an unknown scaling, a factor below 1, no original_max_position.
    """
    op = "rotary_frequencies"
    if dim < 0 or dim % 2:
        _checks.fail(op, f"dim must be even and at least 0, got {dim}")
    if scaling not in KINDS:
        _checks.fail(op, f"scaling must be one of {KINDS}, got {scaling!r}")
    if not factor >= 1:
        _checks.fail(op, f"factor must be at least 1, got {factor}")
    if scaling in ("llama3", "yarn") and not original_max_position:
        _checks.fail(op, f"{scaling} needs original_max_position, got {original_max_position}")
    if scaling == "ntk":
        if dim < 4:
            _checks.fail(op, f"ntk needs dim of at least 4, got {dim}")
        base = base * factor ** (dim / (dim - 2))
    spread = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    freqs = 1.0 / spread
    if scaling == "linear":
        freqs = freqs / factor
    elif scaling == "llama3":
        freqs = _llama3(freqs, factor, low_freq_factor, high_freq_factor, original_max_position)
    elif scaling == "yarn":
        turns = (beta_fast, beta_slow, original_max_position)
        freqs = _yarn(spread, dim, base, factor, *turns, truncate)
        if attention_factor is None:
            attention_factor = _yarn_attention(factor, mscale, mscale_all_dim)
        return freqs, float(attention_factor)
    return freqs, 1.0


def _llama3(freqs, factor, low, high, original):
    wavelength = 2 * math.pi / freqs
    stretched = torch.where(wavelength > original / low, freqs / factor, freqs)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, stretched)


def _yarn(spread, dim, base, factor, beta_fast, beta_slow, original, truncate):
    def plane(turns):
        """The (real) channel whose plane makes that many turns in the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = plane(beta_fast), plane(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    index = torch.arange(dim // 2, dtype=torch.float32, device=spread.device)
    kept = 1 - ((index - first) / (last - first)).clamp(0, 1)
    return 1.0 / (factor * spread) * (1 - kept) + 1.0 / spread * kept


def _yarn_attention(factor, mscale, mscale_all_dim):
    def growth(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return growth(mscale) / growth(mscale_all_dim)
    return growth(1)
