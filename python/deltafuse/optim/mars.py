"""torch.optim interface of the MARS family (arXiv 2411.10438, 2510.21800)."""

import torch
from torch.optim import Optimizer

from . import sharded, state
from .groups import (
    check_flags,
    check_group,
    check_params,
    check_step,
    parameter_name,
    takes_mars_path,
    warn_decay,
)
from .layout import is_finite, owned, step_device
from .paths import (
    PATHS,
    has_master,
    keeps_copy,
    moments_of,
    options_of,
    path_of,
    places,
    uses_loop,
)
from .plan import plan_of
from .sections import run
from .step import FILLED, GroupStep, norms_of


class MARS(Optimizer):
    """Adam, Lion, SGD, Shampoo or Muon on a variance-reduced gradient, clipped per tensor.

    c = g + s (g - h), s = gamma beta1 / (1 - beta1), where h is the previous step's gradient
    (`is_approx`), or the gradient of this step's batch at the previous weights, staged with
    `update_previous_grad` and `update_last_grad`. Matrices take this path; biases, norms and
    scalars take AdamW with `lr_1d`, `betas_1d`, `weight_decay_1d`. Weight decay is decoupled and
    multiplied by lr, as in torch.optim.AdamW. One compiled call updates all groups. Every argument
    but `params` can be given per group.

    Args:
        params: tensors, (name, tensor) pairs or groups; any floating dtype, complex64, complex128
            (not for the matrix members), DTensors (FSDP2) with Shard and Replicate placements.
            State is float32 (float64 for float64 parameters), whatever the parameter's dtype.
        lr, gamma, weight_decay: float or 0-dim tensor.
        betas, eps, amsgrad, maximize: as in torch.optim.AdamW.
        is_approx: False for the exact variant.
        mars_type: with or without "mars-": "adamw"; "lion": sign of the momentum; "sgd": the
            momentum; "shampoo": U V^T of the momentum by Newton-Schulz, or by the decomposition
            with ns_steps=None; "m": MARS-M, Muon on c. The last two take matrices (other tensors of
            the MARS path take the AdamW formula).
        optimize_1d: every tensor takes the MARS path.
        lr_1d: learning rate of the 1-D path at the constructor's lr; a scheduler scales both.
        weight_decay_1d: None means the group's weight_decay.
        clip: bound of ||c||_2, or None; clip_scope: "tensor", "group", "global".
        caution: False, "elementwise" (no update where m and g disagree in sign), or "mean" (the
            rest divided by the fraction that agrees, arXiv 2411.16085).
        first_step: "zero" takes h = 0 at first (c = (1 + s) g), "grad" h = g.
        matrix_ndim: "eq2", or "ge2" to count tensors of three and more dimensions as matrices;
            flatten: the matrix members take such tensors as [dim 0, the rest] (else ValueError).
        ns_steps, ns_dtype: iterations of Newton-Schulz, dtype of its products.
        adjust_lr_fn: factor on lr for a matrix: "match_rms_adamw" 0.2 sqrt(max(rows, cols)),
            "original" sqrt(max(1, rows / cols)), "none"; None is the first for "m", the second for
            "shampoo".
        foreach, fused: None and True mean the compiled kernel; fused=False the PyTorch loop.
        capturable: accepted; the step never synchronizes.
        differentiable: PyTorch loop within autograd.
        master: of half-precision parameters: "fp32", a float32 copy that they are rounded from;
            "split16" (bfloat16), its lower 16 bits beside the parameter's upper ones.
        rounding: "stochastic" rounds bfloat16 parameters without a master at random, with `seed`
            (None: torch.initial_seed()), reproducibly.
        state_dtype: of the moments and the stored gradient, None, float32 or bfloat16 (second
            moments rounded at random); last_grad_dtype: of the stored gradient.
        state_bits: 8 keeps moments and stored gradient of tensors from 4096 elements on in blocks
            of 256 codes of 8 bits (arXiv 2110.02861).
        last_grad_mode: "copy", or "steal" to keep p.grad's own memory, which then must not be used
            again: zero_grad(set_to_none=True).
        nonfinite: "propagate", "skip_tensor", "skip_step", or "error" for NaN and inf gradients;
            all but the first look at the gradients on the host.

    Raises:
        ValueError: a hyper-parameter out of range, duplicate, integer or overlapping parameters.
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
        flatten=False,
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
        defaults["seed"] = (torch.initial_seed() if seed is None else seed) & (1 << 63) - 1
        self._stolen = {}
        self._places = {}
        self._plan = None
        self._loading = None
        self._warned = False
        super().__init__(params, defaults)

    @property
    def state(self):
        """{parameter: its state}. Whoever looks may replace tensors, whose memory then has to go:
        the plan, which holds them, is made again in the next step."""
        self._plan = None
        return self.__dict__["state"]

    @state.setter
    def state(self, value):
        self._plan = None
        self.__dict__["state"] = value

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
        self._places = {}
        group = self.param_groups[-1]
        try:
            check_flags(group["foreach"], group["fused"], group["differentiable"])
            check_group(group)
            check_params(group)
        except (ValueError, NotImplementedError):
            self.param_groups.pop()
            raise
        self._warned = self._warned or warn_decay(group)

    def __setstate__(self, state_dict):
        before = self.__dict__.get("param_groups")
        super().__setstate__(state_dict)
        self._stolen, self._places, self._plan = {}, {}, None
        self._warned = True
        for i, group in enumerate(self.param_groups):
            known = before[i] if before else self.defaults
            for name in self.defaults:
                group.setdefault(name, known[name])
        if self.__dict__.setdefault("_loading", None) is not None:
            self._restore(self._loading)

    def load_state_dict(self, state_dict):
        """Accepts checkpoints of this class, of torch.optim.AdamW and of the authors' code.

        State is brought into the formats of the groups and stays in float32 for half-precision
        parameters; unknown state is dropped; a tensor without last_grad takes a first step,
        whatever its step count.
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
        for group in self.param_groups:
            for p in group["params"]:
                i = next(indices)
                if i in saved["state"]:
                    self.state[p] = state.loaded(saved["state"][i], p)
                    state.fit(group, p, self.state[p], path_of(group, p))

    def _init_group(self, group, path, *filled):
        """Fills the lists with the group's parameters on that path, and creates missing state."""
        lists = dict(zip(FILLED, filled, strict=True))
        arrays = moments_of(group, path)
        states = self.state
        for i in self._placed(group)[path]:
            p = group["params"][i]
            if p.grad is None:
                continue
            check_step(group, i, p)
            kept = states[p]
            if "step" not in kept:
                kept["step"] = torch.zeros((), dtype=torch.float32, device=step_device(p))
            for name in arrays:
                if name not in kept:
                    self._first(group, p, kept, name)
            names = arrays
            if not path.startswith("vector") and "exp_avg_base" not in arrays:
                self._keep_last_grad(group, p, kept)
                names = [*arrays, "last_grad"]
            for name in names:
                lists[state.LIST_OF[name]].append(kept[name])
                if kept[name].dtype == torch.uint8:
                    lists["absmaxes"].append(kept[state.absmax_key(name)])
            if has_master(group, path):
                name = state.MASTERS[group["master"]]
                if name not in kept:
                    state.new_master(group, p, kept)
                lists["masters"].append(kept[name])
            lists["params"].append(p)
            lists["grads"].append(p.grad)
            lists["state_steps"].append(kept["step"])

    def _placed(self, group):
        """{path: indices of the group's parameters}, found again only where it may have changed."""
        key = options_of(group), [p.dtype for p in group["params"]]
        known = self._places.get(id(group))
        if known is None or known[0] != key:
            known = self._places[id(group)] = key, places(group)
        return known[1]

    def _first(self, group, p, kept, name):
        if name == "exp_avg_base" and group["first_step"] == "grad":
            state.fill_array(group, p, kept, name, -group["gamma"] * self._true_grad(group, p))
        else:
            state.new_array(group, p, kept, name)

    def _true_grad(self, group, p):
        """The gradient in the sign and scale of the stored ones."""
        scale = getattr(self, "grad_scale", None)
        g = p.grad if scale is None else p.grad / scale
        return -g if group["maximize"] else g

    def _keep_last_grad(self, group, p, kept):
        if "last_grad" in kept:
            if p in self._stolen and (
                kept["last_grad"].data_ptr() == p.grad.data_ptr()
                or kept["last_grad"]._version != self._stolen[p]
            ):
                raise RuntimeError(
                    "MARS: last_grad_mode='steal' owns the last gradient's memory, but it was"
                    " written again; use zero_grad(set_to_none=True) or last_grad_mode='copy'"
                )
        elif group["first_step"] == "grad":
            g = self._true_grad(group, p)
            # a stored gradient that is only read has the sign of the raw one
            raw = group["maximize"] and not keeps_copy(group)
            state.fill_array(group, p, kept, "last_grad", -g if raw else g)
        else:
            state.new_array(group, p, kept, "last_grad")

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
        grad_scale = getattr(self, "grad_scale", None)
        options = dict(found_inf=found_inf, seed=self.param_groups[0]["seed"])
        if torch.compiler.is_compiling():
            self._full_step(grad_scale, options)
        elif self._plan is None or not self._plan.step(self, grad_scale=grad_scale, **options):
            steps, norms = self._full_step(grad_scale, options)
            self._plan = plan_of(self, steps, norms)

    def _full_step(self, grad_scale, options):
        """A step from scratch; returns its parts."""
        steps = [GroupStep(self, group, path) for group in self.param_groups for path in PATHS]
        steps = [step for step in steps if step.section.params]
        options["loop"] = any(uses_loop(group) for group in self.param_groups)
        norms = norms_of(steps, grad_scale)
        run([step.section for step in steps], norms=norms, grad_scale=grad_scale, **options)
        run([section for step in steps for section in step.matrix_updates()], **options)
        for step in steps:
            step.finish()
        self._steal()
        return steps, norms

    def _must_skip(self, found_inf):
        """Whether nothing at all may happen; looks at values only for the options that need it."""
        if found_inf is not None and any(
            g["first_step"] == "grad" or g["last_grad_mode"] == "steal" for g in self.param_groups
        ):
            return found_inf.item() != 0  # else a gradient with inf would be stored
        for group in self.param_groups:
            if group["nonfinite"] not in ("skip_step", "error"):
                continue
            for i, p in enumerate(group["params"]):
                if p.grad is not None and not is_finite(sharded.local(p.grad)):
                    if group["nonfinite"] == "error":
                        raise RuntimeError(
                            f"MARS: gradient of {parameter_name(group, i)} has NaN or inf"
                        )
                    return True
        return False

    def _steal(self):
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            if group["last_grad_mode"] != "steal" or not group["is_approx"]:
                continue
            for p in group["params"]:
                if p.grad is not None and "last_grad" in self.state[p]:
                    if group["nonfinite"] == "skip_tensor" and not is_finite(sharded.local(p.grad)):
                        continue
                    buffer = owned(p.grad)
                    if scale is not None:
                        buffer.div_(scale)
                    self.state[p]["last_grad"] = buffer
                    self._stolen[p] = buffer._version

    def update_previous_grad(self, grad_scale=None):
        """Exact variant: moves every p.grad (next batch, current weights) into the state.

        Sets p.grad to None. Does nothing with is_approx=True. grad_scale: what the loss was
        multiplied by (GradScaler.get_scale()), the gradients are divided by it.
        """
        for group in self.param_groups:
            if group["is_approx"]:
                continue
            for p in group["params"]:
                if p.grad is not None and takes_mars_path(group, p):
                    staged = owned(p.grad)
                    self.state[p]["previous_grad"] = (
                        staged if grad_scale is None else staged.div_(grad_scale)
                    )
                    p.grad = None

    def update_last_grad(self):
        """Exact variant: the staged gradients become the h of the next step; nothing is copied.

        A tensor without a staged gradient keeps its h. Does nothing with is_approx=True.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if not group["is_approx"] and "previous_grad" in self.state.get(p, ()):
                    kept = self.state[p]
                    kept["last_grad"] = kept.pop("previous_grad")
                    kept.pop("last_grad_absmax", None)
