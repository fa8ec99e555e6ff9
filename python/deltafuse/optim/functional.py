"""MARS-AdamW as a function on lists of tensors: the compiled operator, or the PyTorch loop."""

import torch

from deltafuse import _library
from deltafuse._checks import fail

from .sections import CAUTIONS, Section, run, squares

__all__ = ["mars_", "mars_norm_", "mars_reference_"]

_library.register("mars_", lambda *args: None)
_library.register(
    "mars_plan", lambda params, *args: torch.empty(0, dtype=torch.uint8, device="cpu")
)
_library.register("mars_planned_", lambda *args: True)
_library.register(
    "mars_squares", lambda grads, *args: grads[0].new_empty(len(grads), dtype=torch.float64)
)


def _check(op, params, matrix, **lists):
    if matrix > len(params):
        fail(op, f"{matrix} last_grads for {len(params)} params")
    for name, tensors in lists.items():
        expected = params[:matrix] if name == "last_grads" else params
        if len(tensors) != len(expected):
            fail(op, f"{name} must have {len(expected)} tensors, got {len(tensors)}")
        for i, (t, p) in enumerate(zip(tensors, expected, strict=True)):
            if t.shape != p.shape:
                fail(op, f"{name}[{i}] must have shape {tuple(p.shape)}, got {tuple(t.shape)}")
            if name.startswith(("exp_avg", "max")) and t.dtype != _state_dtype(p):
                fail(op, f"{name}[{i}] must be {_state_dtype(p)}, got {t.dtype}", TypeError)


def _state_dtype(p):
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def mars_norm_(
    grads, last_grads, *, gamma, beta1, maximize=False, negate_last_grad=False, grad_scale=None
):
    """||c||_2 of each tensor, where c = g + s (g - h), s = gamma beta1 / (1 - beta1).

    Args:
        grads, last_grads: lists of n tensors of equal shapes, any floating dtypes; g and h.
        gamma, beta1: float; gamma may be a 0-dim tensor.
        maximize: the gradient's sign is flipped; negate_last_grad: that of h, too.
        grad_scale: 0-dim tensor that g is divided by, or None.

    Returns:
        float64 [n]. Sums are in float64 and in a fixed order: the bits do not depend on threads.
    """
    if len(grads) == 0 or len(last_grads) != len(grads):
        fail("mars_norm_", f"got {len(grads)} grads and {len(last_grads)} last_grads")
    _check("mars_norm_", grads, len(grads), last_grads=last_grads)
    section = Section(
        params=grads,
        grads=grads,
        last_grads=last_grads,
        gamma=gamma,
        beta1=beta1,
        clip=1.0,
        corrected=True,
        maximize=maximize,
        update_last_grad=not negate_last_grad,
    )
    return squares([section], grad_scale).sqrt()


def _step(loop, tensors, rates, rates_1d, options):
    """The two sections of a list whose first tensors have a last gradient."""
    params, grads, exp_avgs, exp_avg_sqs, last_grads, max_exp_avg_sqs, state_steps = tensors
    lists = dict(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        max_exp_avg_sqs=max_exp_avg_sqs,
        state_steps=state_steps,
    )
    k = len(last_grads)
    common = {name: options[name] for name in ("eps", "maximize")}
    matrices = Section(
        **{name: tensors[:k] for name, tensors in lists.items()},
        last_grads=last_grads,
        corrected=True,
        **{name: options[name] for name in ("clip", "caution", "update_last_grad")},
        **common,
        **rates,
    )
    vectors = Section(
        **{name: tensors[k:] for name, tensors in lists.items()}, **common, **rates_1d
    )
    norm = options["norm"]
    norms = None if norm is None else norm.expand(len(params))
    scaler = {name: options[name] for name in ("grad_scale", "found_inf")}
    run([matrices, vectors], norms=norms, loop=loop, **scaler)


def mars_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    last_grads,
    max_exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1=0.95,
    beta2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    gamma=0.025,
    clip=1.0,
    lr_1d=3e-3,
    beta1_1d=0.9,
    beta2_1d=0.95,
    weight_decay_1d=0.1,
    caution="off",
    maximize=False,
    update_last_grad=True,
    norm=None,
    grad_scale=None,
    found_inf=None,
    loop=False,
):
    """One MARS-AdamW step on lists of tensors, in place (arXiv 2411.10438, algorithm 2).

    Args:
        params: n tensors, any floating dtypes; grads: n, of any floating dtypes.
        exp_avgs, exp_avg_sqs: n tensors, float64 for float64 parameters, else float32.
        last_grads: k <= n tensors: the first k parameters take the MARS path, the others the 1-D
            AdamW path with lr_1d, beta1_1d, beta2_1d, weight_decay_1d.
        max_exp_avg_sqs: n tensors, or [] without amsgrad.
        state_steps: n 0-dim float32 tensors, steps done so far.
        lr, weight_decay, gamma, lr_1d, weight_decay_1d: float or 0-dim tensor.
        clip: bound of the 2-norm of c, or None; norm: 0-dim float64 tensor that is compared with
            clip instead of each tensor's own norm.
        caution: "off", "elementwise" or "mean".
        update_last_grad: write g to last_grads (False: exact variant, they are only read).
        grad_scale, found_inf: 0-dim tensors of a GradScaler, or None.
        loop: PyTorch operations instead of the compiled kernel.

    Raises:
        ValueError: lists whose lengths or shapes do not fit. TypeError: a state's dtype.
    """
    lists = dict(grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, last_grads=last_grads)
    if len(max_exp_avg_sqs):
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    _check("mars_", params, len(last_grads), **lists)
    if len(state_steps) != len(params):
        fail("mars_", f"state_steps must have {len(params)} tensors, got {len(state_steps)}")
    if caution not in CAUTIONS:
        fail("mars_", f"caution must be one of {sorted(CAUTIONS)}, got {caution!r}")
    tensors = (params, grads, exp_avgs, exp_avg_sqs, last_grads, max_exp_avg_sqs, state_steps)
    rates = dict(lr=lr, weight_decay=weight_decay, gamma=gamma, beta1=beta1, beta2=beta2)
    rates_1d = dict(lr=lr_1d, weight_decay=weight_decay_1d, beta1=beta1_1d, beta2=beta2_1d)
    options = dict(
        eps=eps,
        clip=clip,
        caution=caution,
        maximize=maximize,
        update_last_grad=update_last_grad,
        norm=norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    _step(loop, tensors, rates, rates_1d, options)


def mars_reference_(*tensors, **options):
    """`mars_` in plain PyTorch operations, also for float64; the oracle of the kernels."""
    mars_(*tensors, **options, loop=True)
