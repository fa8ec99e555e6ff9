"""torch.optim interface of the MARS family (arXiv 2411.10438)."""

import warnings

import torch
from torch.optim import Optimizer

from .functional import mars_, mars_norm_
from .groups import check_flags, check_group, check_params, parameter_name, takes_mars_path
from .layout import (
    MOMENTS,
    as_real,
    is_dense,
    is_finite,
    like,
    loaded_state,
    only_finite,
    owned,
    state_dtype,
    step_device,
)
from .reference import mars_reference_


class MARS(Optimizer):
    """MARS-AdamW: AdamW on c = g + s (g - h), s = gamma beta1 / (1 - beta1), clipped per tensor.

    h is the previous step's gradient (`is_approx`), or the gradient of this step's batch at the
    previous weights, staged with `update_previous_grad` and `update_last_grad`. Matrices take this
    path; biases, norms and scalars take AdamW with `lr_1d`, `betas_1d`, `weight_decay_1d`. Weight
    decay is decoupled and multiplied by lr, as in torch.optim.AdamW. On CPU one compiled call
    updates a whole group. Every argument but `params` can be given per group.

    Args:
        params: tensors, (name, tensor) pairs or groups; any floating dtype, complex64, complex128.
            State is float32 (float64 for float64 parameters), whatever the parameter's dtype.
        lr, gamma, weight_decay: float or 0-dim tensor.
        betas, eps, amsgrad, maximize: as in torch.optim.AdamW.
        is_approx: False for the exact variant.
        mars_type: "mars-adamw"; the other members raise NotImplementedError.
        optimize_1d: every tensor takes the MARS path.
        lr_1d: learning rate of the 1-D path at the constructor's lr; a scheduler scales both.
        weight_decay_1d: None means the group's weight_decay.
        clip: bound of ||c||_2, or None; clip_scope: "tensor", "group", "global".
        caution: False, "elementwise" (no update where m and g disagree in sign), or "mean" (the
            rest divided by the fraction that agrees, arXiv 2411.16085).
        first_step: "zero" takes h = 0 at first (c = (1 + s) g), "grad" h = g.
        matrix_ndim: "eq2", or "ge2" to count tensors of three and more dimensions as matrices.
        foreach, fused: None and True mean the compiled kernel; fused=False the PyTorch loop.
        capturable: accepted; the step never synchronizes.
        differentiable: PyTorch loop within autograd.
        last_grad_dtype: dtype of the stored gradient, default that of the state.
        last_grad_mode: "copy", or "steal" to keep p.grad's own memory, which then must not be used
            again: zero_grad(set_to_none=True).
        nonfinite: "propagate", "skip_tensor", "skip_step", or "error" for NaN and inf gradients.
        ns_steps, adjust_lr_fn, ns_dtype: of the matrix members, no effect here.
        master, rounding, state_dtype, state_bits, seed: only their defaults are implemented.

    Raises:
        ValueError: a hyper-parameter out of range, duplicate, integer or overlapping parameters.
        NotImplementedError: a member or option that does not exist yet.
        RuntimeError: (step) a sparse gradient, reused memory in "steal" mode.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr=3e-3,
        betas=(0.95, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        gamma=0.025,
        is_approx=True,
        mars_type="mars-adamw",
        optimize_1d=False,
        lr_1d=3e-3,
        betas_1d=(0.9, 0.95),
        weight_decay_1d=0.1,
        *,
        clip=1.0,
        clip_scope="tensor",
        caution=False,
        first_step="zero",
        matrix_ndim="eq2",
        ns_steps=5,
        adjust_lr_fn=None,
        ns_dtype=torch.bfloat16,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        master=None,
        rounding="nearest",
        state_dtype=None,
        last_grad_dtype=None,
        state_bits=32,
        last_grad_mode="copy",
        nonfinite="propagate",
        seed=None,
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        check_flags(foreach, fused, differentiable)
        check_group(defaults)
        defaults["lr_constructor"] = lr.item() if isinstance(lr, torch.Tensor) else float(lr)
        self._stolen = {}
        self._loading = None
        self._warned = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As in torch.optim; duplicates and bad hyper-parameters raise, nothing is added then."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            given = param_group["params"]
            given = [given] if isinstance(given, torch.Tensor) else list(given)
            tensors = [p[1] if isinstance(p, tuple) else p for p in given]
            if len({id(p) for p in tensors}) != len(tensors):
                raise ValueError("MARS: a parameter appears twice in one group")
            param_group = {**param_group, "params": given}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_flags(group["foreach"], group["fused"], group["differentiable"])
            check_group(group)
            check_params(group)
        except (ValueError, NotImplementedError):
            self.param_groups.pop()
            raise
        self._warn_decay(group)

    def _warn_decay(self, group):
        plain = group["weight_decay"]
        silent = isinstance(plain, torch.Tensor) or plain != 0 or not group["weight_decay_1d"]
        if silent or self._warned or all(takes_mars_path(group, p) for p in group["params"]):
            return
        self._warned = True
        warnings.warn(
            f"MARS: weight_decay is 0, but vectors decay with weight_decay_1d ="
            f" {group['weight_decay_1d']}; weight_decay_1d=None follows weight_decay",
            stacklevel=4,
        )

    def __setstate__(self, state):
        before = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._stolen = {}
        self._warned = True
        for i, group in enumerate(self.param_groups):
            known = before[i] if before else self.defaults
            for name in self.defaults:
                group.setdefault(name, known[name])
        if self.__dict__.setdefault("_loading", None) is not None:
            self._restore(self._loading)

    def load_state_dict(self, state_dict):
        """Accepts checkpoints of this class, of torch.optim.AdamW and of the authors' code.

        Moments stay in float32 for half-precision parameters; unknown state is dropped; a tensor
        without last_grad takes a first step, whatever its step count.
        """

        def remember(_, final):  # registered last: sees what other hooks made of it
            self._loading = final

        hook = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def _restore(self, saved):
        """The state from `saved`, without the base class's cast to the parameter's dtype."""
        indices = (i for group in saved["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(indices, params, strict=True):
            if i in saved["state"]:
                self.state[p] = loaded_state(saved["state"][i], p)

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, last_grads, maxima, steps):
        """Fills the lists, MARS-path parameters first, and creates missing state."""
        with_grad = []
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                name = parameter_name(group, i)
                raise RuntimeError(f"MARS does not support sparse gradients: {name}")
            with_grad.append(p)
        with_grad.sort(key=lambda p: not takes_mars_path(group, p))
        for p in with_grad:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(p))
            for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
                if name not in state:
                    state[name] = torch.zeros_like(p, dtype=state_dtype(p))
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])
            if group["amsgrad"]:
                maxima.append(state["max_exp_avg_sq"])
            if takes_mars_path(group, p):
                last_grads.append(self._last_grad(group, p, state))

    def _last_grad(self, group, p, state):
        if "last_grad" in state:
            if p in self._stolen and (
                state["last_grad"].data_ptr() == p.grad.data_ptr()
                or state["last_grad"]._version != self._stolen[p]
            ):
                raise RuntimeError(
                    "MARS: last_grad_mode='steal' owns the last gradient's memory, but it was"
                    " written again; use zero_grad(set_to_none=True) or last_grad_mode='copy'"
                )
            return state["last_grad"]
        if group["first_step"] == "grad":
            if not _keeps_copy(group):
                return p.grad
            scale = getattr(self, "grad_scale", None)
            g = p.grad if scale is None else p.grad / scale
            g = -g if group["maximize"] else g
            state["last_grad"] = like(g.to(_last_grad_dtype(group, p), copy=True), p)
        else:
            state["last_grad"] = torch.zeros_like(p, dtype=_last_grad_dtype(group, p))
        return state["last_grad"]

    def step(self, closure=None):
        """One step; closure, if given, reevaluates the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self):
        found_inf = getattr(self, "found_inf", None)
        if self._must_skip(found_inf):
            return
        work = []
        for group in self.param_groups:
            lists = [[], [], [], [], [], [], []]
            self._init_group(group, *lists)
            if group["nonfinite"] == "skip_tensor":
                lists = only_finite(lists)
            if lists[0]:
                work.append((group, as_real(lists)))
        everywhere = self._global_norm(work)
        for group, lists in work:
            norm = None
            if group["clip"] is not None and group["clip_scope"] != "tensor":
                norm = everywhere if group["clip_scope"] == "global" else self._norm([group, lists])
            self._update(group, lists, norm, found_inf)
        self._steal()

    def _must_skip(self, found_inf):
        """Whether nothing at all may happen; looks at values only for the options that need it."""
        if found_inf is not None and any(g["first_step"] == "grad" for g in self.param_groups):
            return found_inf.item() != 0  # else a first gradient with inf would be stored
        for group in self.param_groups:
            if group["nonfinite"] not in ("skip_step", "error"):
                continue
            for i, p in enumerate(group["params"]):
                if p.grad is not None and not is_finite(p.grad):
                    if group["nonfinite"] == "error":
                        raise RuntimeError(
                            f"MARS: gradient of {parameter_name(group, i)} has NaN or inf"
                        )
                    return True
        return False

    def _norm(self, *work):
        """||c|| over the MARS-path tensors of the given (group, lists), 0-dim float64."""
        squares = []
        for group, (params, grads, _, _, last_grads, _, _) in work:
            if last_grads:
                norms = mars_norm_(
                    [like(g, p) for g, p in zip(grads, params, strict=True)][: len(last_grads)],
                    [like(h, p) for h, p in zip(last_grads, params, strict=False)],
                    gamma=group["gamma"],
                    beta1=group["betas"][0],
                    maximize=group["maximize"],
                    negate_last_grad=group["maximize"] and not _keeps_copy(group),
                    grad_scale=getattr(self, "grad_scale", None),
                )
                squares.append(norms.square().sum())
        return torch.stack(squares).sum().sqrt() if squares else None

    def _global_norm(self, work):
        work = [w for w in work if w[0]["clip"] is not None and w[0]["clip_scope"] == "global"]
        return self._norm(*work) if work else None

    def _update(self, group, lists, norm, found_inf):
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None and not _keeps_copy(group):
            raise NotImplementedError(
                "MARS: a GradScaler with is_approx=False or last_grad_mode='steal' is not"
                " implemented: unscale the gradients first (GradScaler.unscale_)"
            )
        params, grads, exp_avgs, exp_avg_sqs, last_grads, maxima, steps = lists
        dense = [p if is_dense(p) else p.contiguous() for p in params]
        grads = [like(g, p) for g, p in zip(grads, dense, strict=True)]
        last_grads = [like(h, p) for h, p in zip(last_grads, dense, strict=False)]
        loop = group["differentiable"] or (group["fused"] is False and not group["foreach"])
        (mars_reference_ if loop else mars_)(
            dense,
            grads,
            exp_avgs,
            exp_avg_sqs,
            last_grads,
            maxima,
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            gamma=group["gamma"],
            clip=group["clip"],
            lr_1d=_lr_1d(group),
            beta1_1d=group["betas_1d"][0],
            beta2_1d=group["betas_1d"][1],
            weight_decay_1d=group["weight_decay"]
            if group["weight_decay_1d"] is None
            else group["weight_decay_1d"],
            caution=group["caution"] or "off",
            maximize=group["maximize"],
            update_last_grad=_keeps_copy(group),
            norm=norm,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        for p, d in zip(params, dense, strict=True):
            if d is not p:
                p.copy_(d)

    def _steal(self):
        for group in self.param_groups:
            if group["last_grad_mode"] != "steal" or not group["is_approx"]:
                continue
            for p in group["params"]:
                if p.grad is not None and takes_mars_path(group, p):
                    buffer = owned(p.grad)
                    self.state[p]["last_grad"] = buffer
                    self._stolen[p] = buffer._version

    def update_previous_grad(self):
        """Exact variant: moves every p.grad (next batch, current weights) into the state.

        Sets p.grad to None. Does nothing with is_approx=True.
        """
        for group in self.param_groups:
            if group["is_approx"]:
                continue
            for p in group["params"]:
                if p.grad is not None and takes_mars_path(group, p):
                    self.state[p]["previous_grad"] = owned(p.grad)
                    p.grad = None

    def update_last_grad(self):
        """Exact variant: the staged gradients become the h of the next step; nothing is copied.

        A tensor without a staged gradient keeps its h. Does nothing with is_approx=True.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if not group["is_approx"] and "previous_grad" in self.state.get(p, ()):
                    self.state[p]["last_grad"] = self.state[p].pop("previous_grad")


def _last_grad_dtype(group, p):
    return state_dtype(p) if p.is_complex() else group["last_grad_dtype"] or state_dtype(p)


def _keeps_copy(group):
    return group["is_approx"] and group["last_grad_mode"] == "copy"


def _lr_1d(group):
    base = group["lr_constructor"]
    return group["lr"] * (group["lr_1d"] / base) if base else group["lr_1d"]
