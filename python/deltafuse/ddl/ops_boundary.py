"""What lies between two sub-layers, in one pass: rewrite, read-out, RMS norm and projections."""

import torch

from .. import _checks
from .._checks import cast
from . import raw, validation
from .ops import _wide, project
from .reference import compute_dtype


def _projections(W_beta, b_beta):
    """(W_beta, b_beta) for the fused pass, and the two-layer gate's (W1, b1, w2, b2) or None."""
    if not isinstance(W_beta, (tuple, list)):
        return W_beta, b_beta, None
    W1, w2 = W_beta
    b1, b2 = (None, None) if b_beta is None else b_beta
    return None, None, (W1, b1, w2, b2)


def _two_layers(op, c, gate):
    """w2 tanh(W1 c + b1) + b2; tanh in the dtype of c, as in the paper's repository."""
    W1, b1, w2, b2 = gate
    _checks.expect_floats(op, error=TypeError, c=c, W1=W1, b1=b1, w2=w2, b2=b2)
    hidden = W1.shape[0]
    _checks.expect_shape(op, "W_beta[0]", W1, (hidden, c.shape[-1]), "[hidden, d]")
    _checks.expect_shape(op, "W_beta[1]", w2, (1, hidden), "[1, hidden]")
    bias = None if b1 is None else cast(b1, c.dtype)
    inner = torch.tanh(torch.nn.functional.linear(c, cast(W1, c.dtype), bias))
    return project(inner, w2, b2).squeeze(-1)


def _options(op, *, v_source, **chosen):
    validation.expect_choice(op, "v_source", v_source, validation.V_SOURCES)
    validation.expect_eps(op, norm_eps=chosen["norm_eps"])
    return raw.Options(v_from_context=v_source == "context", norm=True, **chosen)


def _run(op, layout, x, k, gates, weights, two_layers, options):
    dtype = compute_dtype(x, k)
    act = options.out_dtype or (x.dtype if k is None else k.dtype)
    state = layout.state_rows(_wide(x, dtype))
    direction = None if k is None else layout.rows(_wide(k, dtype))
    y, x_in, c, z_v, z_beta = raw.boundary((state, direction, *gates, *weights), options)
    c = cast(c.view(layout.token), act)
    if two_layers is not None:
        z_beta = _two_layers(op, c, two_layers)
    elif z_beta is not None:
        z_beta = z_beta.view(layout.leading)
    y = None if y is None else cast(y.view_as(x), x.dtype)
    z_v = None if z_v is None else z_v.view(*layout.leading, layout.d_v)
    return y, c, z_v, z_beta, None if x_in is None else cast(x_in.view(layout.token), act)


def _gates(op, layout, v_logits, beta_logits, v_activation, v_constant, dtype):
    """v and beta as rows; a constant v is one row that every token shares."""
    validation.expect_choice(op, "v_activation", v_activation, ("sigmoid", None))
    if (v_logits is None) == (v_constant is None):
        _checks.fail(op, "exactly one of v_logits and v_constant must be given")
    beta = layout.gate(op, "beta_logits", beta_logits, dtype)
    if v_constant is None:
        return layout.target(op, "v_logits", v_logits, dtype), beta, None
    row = torch.full((1, layout.d_v), v_constant, dtype=dtype, device=beta_logits.device)
    return row.expand(layout.N, layout.d_v), beta, None


def ddl_boundary(
    x,
    k,
    v_logits,
    beta_logits,
    read_weight,
    norm_weight,
    W_v,
    b_v,
    W_beta,
    b_beta,
    *,
    k_eps=1e-5,
    norm_eps=1e-5,
    v_scale=4.0,
    v_source="input",
    v_activation="sigmoid",
    v_constant=None,
    return_x_in=False,
):
    """Everything between two sub-layers in one pass over the state; differentiable.

    y = `delta_rewrite_logits`(x, k, v_logits, beta_logits) of the sub-layer that ended, then for
    the next one the read-out x_in = sum_j read_ij y_ij, its context c = RMSNorm(x_in), and the
    logits of its gates (Deep Delta Learning, arXiv 2601.00417, equation 2.2 and appendix A).

    Args:
        x: state [..., d, d_v], or [..., d] for d_v = 1.
        k: the sub-layer's output [..., d].
        v_logits: [..., d_v], or [...] where d_v = 1; None with v_constant.
        beta_logits: [...] or [..., 1].
        read_weight: [d, d_v]; None is the mean over channels (for d_v = 1 the state itself).
        norm_weight: [d]; None for ones.
        W_v, b_v: [d_v, d], [d_v]; None leaves out the next v_logits.
        W_beta, b_beta: [1, d], [1]; None leaves out the next beta_logits. (W1, w2) and
            (b1 or None, b2) are a two-layer gate w2 tanh(W1 c + b1) + b2, which runs after the
            fused pass.
        k_eps, v_scale, v_activation: as for `delta_rewrite_logits`.
        norm_eps: of the RMS norm.
        v_source: "input" projects x_in to v_logits, "context" projects c.
        v_constant: a number: v of this sub-layer's rewrite, without a gradient.
        return_x_in: also return x_in.

    Returns:
        (y, c, v_logits_next, beta_logits_next) and x_in if asked for: y like x; c and x_in
        [..., d] in the dtype of k; the logits [..., d_v] and [...] in float32 (float64 if x or k
        is float64), None where their weights are.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: tensors that are not real floating point, or on several devices.
    """
    op = "ddl_boundary"
    W_beta, b_beta, two_layers = _projections(W_beta, b_beta)
    weights = (read_weight, norm_weight, W_v, b_v, W_beta, b_beta)
    _expect_floats(op, x, k, v_logits, beta_logits, *weights)
    layout = validation.layout_with(op, x, k)
    validation.expect_weights(op, layout, *weights)
    validation.expect_eps(op, k_eps=k_eps)
    dtype = compute_dtype(x, k)
    gates = _gates(op, layout, v_logits, beta_logits, v_activation, v_constant, dtype)
    options = _options(
        op,
        v_source=v_source,
        k_eps=k_eps,
        norm_eps=norm_eps,
        v_scale=v_scale,
        v_logits=v_activation is not None and v_constant is None,
        beta_logits=True,
        x_in=return_x_in,
    )
    y, *rest, x_in = _run(op, layout, x, k, gates, weights, two_layers, options)
    return (y, *rest, x_in) if return_x_in else (y, *rest)


def _expect_floats(op, x, k, v_logits, beta_logits, read, norm, W_v, b_v, W_beta, b_beta):
    _checks.expect_floats(
        op,
        error=TypeError,
        x=x,
        k=k,
        v_logits=v_logits,
        beta_logits=beta_logits,
        read_weight=read,
        norm_weight=norm,
        W_v=W_v,
        b_v=b_v,
        W_beta=W_beta,
        b_beta=b_beta,
    )


def ddl_head(
    x,
    read_weight,
    norm_weight,
    W_v=None,
    b_v=None,
    W_beta=None,
    b_beta=None,
    *,
    norm_eps=1e-5,
    v_source="input",
    return_x_in=False,
    out_dtype=None,
):
    """`ddl_boundary` before the first sub-layer: read-out, norm and projections, no rewrite.

    Args:
        x: state [..., d, d_v], or [..., d] for d_v = 1.
        read_weight, norm_weight, W_v, b_v, W_beta, b_beta, norm_eps, v_source: as for
            `ddl_boundary`.
        return_x_in: also return x_in.
        out_dtype: of c and x_in; None is the dtype of x.

    Returns:
        (c, v_logits, beta_logits) and x_in if asked for.

    Raises:
        ValueError, TypeError: as `ddl_boundary`.
    """
    op = "ddl_head"
    W_beta, b_beta, two_layers = _projections(W_beta, b_beta)
    weights = (read_weight, norm_weight, W_v, b_v, W_beta, b_beta)
    _expect_floats(op, x, None, None, None, *weights)
    layout = _layout_of_head(op, x, read_weight, norm_weight, W_v)
    validation.expect_weights(op, layout, *weights)
    options = _options(
        op, v_source=v_source, norm_eps=norm_eps, x_in=return_x_in, out_dtype=out_dtype
    )
    _, *rest, x_in = _run(op, layout, x, None, [None] * 3, weights, two_layers, options)
    return (*rest, x_in) if return_x_in else tuple(rest)


def _layout_of_head(op, x, read, norm, W_v):
    for name, weight, dim in (("read_weight", read, 2), ("W_v", W_v, 2), ("norm_weight", norm, 1)):
        if weight is not None:
            _checks.expect_dim(op, name, weight, dim, ["", "[d]", "two-dimensional"][dim])
    if read is not None:
        return validation.layout_of(op, x, *read.shape)
    if W_v is not None:
        return validation.layout_of(op, x, *W_v.shape[::-1])
    if norm is None:
        _checks.fail(op, "one of read_weight, norm_weight and W_v must be given")
    return validation.layout_of(op, x, norm.shape[0], None)


def ddl_tail(
    x,
    k,
    v_logits,
    beta_logits,
    read_weight,
    norm_weight,
    *,
    k_eps=1e-5,
    norm_eps=1e-5,
    v_scale=4.0,
    v_activation="sigmoid",
    v_constant=None,
):
    """`ddl_boundary` after the last sub-layer: rewrite, final read-out and norm.

    Returns:
        (y, c): the last state, and what the language model's head takes.

    Raises:
        ValueError, TypeError: as `ddl_boundary`.
    """
    return ddl_boundary(
        x,
        k,
        v_logits,
        beta_logits,
        read_weight,
        norm_weight,
        *[None] * 4,
        k_eps=k_eps,
        norm_eps=norm_eps,
        v_scale=v_scale,
        v_activation=v_activation,
        v_constant=v_constant,
    )[:2]
