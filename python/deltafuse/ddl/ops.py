"""The rewrite and the read-outs of Deep Delta Learning (arXiv 2601.00417)."""

import torch
import torch.nn.functional as F

from .. import _checks
from .._checks import cast
from . import raw, reference, validation
from .reference import compute_dtype


def _rewrite(op, x, k, v, beta, beta_erase, options, out=None):
    """Checks, the rewrite on rows, and the shape of x again."""
    _checks.expect_floats(op, error=TypeError, x=x, k=k, v=v, beta=beta, beta_erase=beta_erase)
    validation.expect_eps(op, k_eps=options.k_eps)
    layout = validation.layout_with(op, x, k)
    dtype = compute_dtype(x, k)
    gates = (
        layout.target(op, "v", v, dtype),
        layout.gate(op, "beta", beta, dtype),
        None if beta_erase is None else layout.gate(op, "beta_erase", beta_erase, dtype),
    )
    rows = (layout.state_rows(_wide(x, dtype)), layout.rows(_wide(k, dtype)))
    if out is None:
        y = raw.boundary((*rows, *gates, *[None] * 6), options)[0]
        return cast(y.view_as(x), x.dtype)
    return _into(op, out, x, layout, rows, gates, options)


def _into(op, out, x, layout, rows, gates, options):
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *rows)):
        raise RuntimeError(f"{op}: writing into a tensor has no gradient; use torch.no_grad()")
    _checks.expect_shape(op, "out", out, x.shape, "the shape of x")
    _checks.expect_same_dtype(op, x=x, out=out)
    _checks.expect_floats(op, error=TypeError, x=x, out=out)
    direct = rows[0].dtype == x.dtype and out.is_contiguous()
    to = out.view(rows[0].shape) if direct else torch.empty_like(rows[0])
    raw.rewrite_out(*rows, *gates, to.detach(), options)
    if not direct:
        out.copy_(to.view(out.shape))
    return out


def _wide(t, dtype):
    """float64 beside another type is computed in float64."""
    return cast(t, dtype) if dtype == torch.float64 else t


def _erasing(op, beta, erase, beta_erase):
    if erase:
        return beta_erase
    if beta_erase is not None:
        _checks.fail(op, "beta_erase has no meaning with erase=False")
    return beta.new_zeros(()).expand(beta.shape)


def delta_rewrite(
    x,
    k,
    v,
    beta,
    *,
    k_eps=1e-5,
    normalize_k=True,
    erase=True,
    beta_erase=None,
    out=None,
):
    """The Delta operator: Y = X + k (beta v - beta_erase k^T X), k = k~ / sqrt(|k~|^2 + k_eps^2).

    Deep Delta Learning (arXiv 2601.00417), equations 2.1 and 2.2. Differentiable in every tensor.
    Computed in float32 (float64 if x or k is float64) and rounded once.

    Args:
        x: state [..., d, d_v], 1 <= d_v <= 16, or [..., d] for d_v = 1; float32, bfloat16,
            float16 or float64.
        k: direction [..., d], not normalised, any float dtype.
        v: target of the readout k^T X, [..., d_v], or [...] where d_v = 1.
        beta: gate [...] or [..., 1], any real number: 0 keeps X, 1 replaces the readout by v, 2
            reflects.
        k_eps: at least 0; with 0 a row of zeros has k = 0.
        normalize_k: False takes k as it is.
        erase: False leaves out the erasing term (the write-only control, beta_erase = 0).
        beta_erase: a gate of its own for the erasing term, like beta; None is beta.
        out: receives the result (x itself is allowed); without gradients only.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: shapes that do not fit, a negative k_eps.
        TypeError: tensors that are not real floating point, or on several devices.
        RuntimeError: out while gradients are recorded.
    """
    op = "delta_rewrite"
    beta_erase = _erasing(op, beta, erase, beta_erase)
    options = raw.Options(k_eps=k_eps, normalize_k=normalize_k)
    return _rewrite(op, x, k, v, beta, beta_erase, options, out)


def delta_rewrite_(x, k, v, beta, **options):
    """`delta_rewrite` in place; without gradients only. Returns x."""
    return delta_rewrite(x, k, v, beta, **options, out=x)


def delta_rewrite_logits(
    x, k, v_logits, beta_logits, *, v_scale=4.0, v_activation="sigmoid", k_eps=1e-5
):
    """`delta_rewrite` with beta = 2 sigmoid(beta_logits) and v = v_scale sigmoid(v_logits).

    Args:
        x, k, k_eps: as for `delta_rewrite`.
        v_logits: [..., d_v], or [...] where d_v = 1.
        beta_logits: [...] or [..., 1].
        v_scale: bound of v.
        v_activation: "sigmoid", or None for v = v_logits.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError, TypeError: as `delta_rewrite`.
    """
    op = "delta_rewrite_logits"
    validation.expect_choice(op, "v_activation", v_activation, ("sigmoid", None))
    options = raw.Options(
        k_eps=k_eps, v_scale=v_scale, v_logits=v_activation is not None, beta_logits=True
    )
    return _rewrite(op, x, k, v_logits, beta_logits, None, options)


def delta_residual(
    x,
    k_in,
    v_in,
    context,
    W_v,
    b_v,
    W_beta,
    b_beta,
    k_eps=1e-5,
    v_scale=4.0,
    *,
    v_activation="sigmoid",
    anchor_eps=False,
):
    """The gates' projections and the rewrite: a residual connection of Deep Delta Learning.

    beta = 2 sigmoid(W_beta context + b_beta), v = v_scale sigmoid(W_v v_in + b_v), then
    `delta_rewrite`. The order of arguments is that of `FusedDeepDeltaFunction.apply` in the
    paper's repository.

    Args:
        x: state [..., d, d_v] or [..., d].
        k_in: the sub-layer's output [..., d].
        v_in, context: what v and beta are projected from, [..., d].
        W_v, b_v: [d_v, d], [d_v] or None.
        W_beta, b_beta: [1, d], [1] or None.
        k_eps, v_scale, v_activation: as for `delta_rewrite_logits`.
        anchor_eps: the repository's fused passes add d k_eps^2 instead of k_eps^2.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError, TypeError: as `delta_rewrite`.
    """
    op = "delta_residual"
    _checks.expect_floats(op, error=TypeError, x=x, k_in=k_in, v_in=v_in, context=context, W_v=W_v)
    layout = validation.layout_with(op, x, k_in)
    validation.expect_weights(op, layout, None, None, W_v, b_v, W_beta, b_beta)
    for name, source in (("v_in", v_in), ("context", context)):
        _checks.expect_shape(op, name, source, k_in.shape, "the shape of k_in, [..., d]")
    v_logits = project(v_in, W_v, b_v)
    beta_logits = project(context, W_beta, b_beta)
    eps = k_eps * layout.d**0.5 if anchor_eps else k_eps
    return delta_rewrite_logits(
        x, k_in, v_logits, beta_logits, v_scale=v_scale, v_activation=v_activation, k_eps=eps
    )


def project(x, weight, bias):
    """x weight^T + bias in the compute dtype: the gates' logits are never rounded to 16 bits."""
    dtype = compute_dtype(x)
    bias = None if bias is None else cast(bias, dtype)
    with reference.autocast_off(x):
        return F.linear(cast(x, dtype), cast(weight, dtype), bias)


def ddl_compress(x, weight=None):
    """Read-out x_i = sum_j weight_ij X_ij (arXiv 2601.00417, appendix A.2); differentiable.

    Args:
        x: state [..., d, d_v].
        weight: [d, d_v], any float dtype; None is the mean over channels.

    Returns:
        [..., d] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors that are not real floating point, or on several devices.
    """
    op = "ddl_compress"
    _checks.expect_floats(op, error=TypeError, x=x, weight=weight)
    if weight is None:
        if x.dim() < 2:
            _checks.fail(op, f"x must be [..., d, d_v], got shape {tuple(x.shape)}")
        layout = validation.layout_of(op, x, *x.shape[-2:])
    else:
        _checks.expect_dim(op, "weight", weight, 2, "[d, d_v]")
        layout = validation.layout_of(op, x, *weight.shape)
    tensors = (layout.state_rows(x), *[None] * 4, weight, *[None] * 5)
    return raw.boundary(tensors, raw.Options(x_in=True))[1].view(layout.token)


def ddl_compress_cc(x, weight, read, *, causal=False):
    """Read-out by a convolution along the channels, then a read vector ("CC" of the repository).

    It equals `ddl_compress` with the weight that `cc_weight` makes once a call.

    Args:
        x: state [..., d, d_v].
        weight: taps [d, K], K = d_v.
        read: [d_v].
        causal: pad K - 1 zeros before the channels, else (K - 1) // 2.

    Returns:
        [..., d] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, K != d_v.
        TypeError: tensors that are not real floating point, or on several devices.
    """
    op = "ddl_compress_cc"
    _checks.expect_floats(op, error=TypeError, x=x, weight=weight, read=read)
    return ddl_compress(x, cc_weight(weight, read, causal=causal))


def cc_weight(weight, read, *, causal=False):
    """The read-out weight [d, d_v] of `ddl_compress_cc`, in the compute dtype; differentiable.

    Raises:
        ValueError: weight is not [d, K] with K = d_v, or read not [d_v].
    """
    op = "ddl_compress_cc"
    _checks.expect_dim(op, "weight", weight, 2, "[d, K]")
    _checks.expect_dim(op, "read", read, 1, "[d_v]")
    if weight.shape[1] != read.shape[0] or read.shape[0] < 1:
        _checks.fail(
            op,
            "weight must be [d, K] with K = d_v at least 1, got weight "
            f"{tuple(weight.shape)} and read {tuple(read.shape)}",
        )
    dtype = compute_dtype(weight, read)
    return reference.cc_weight(cast(weight, dtype), cast(read, dtype), causal)
