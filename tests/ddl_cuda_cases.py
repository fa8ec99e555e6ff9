"""Boundaries for the tests of the CUDA kernels: inputs, calls, float64 expectations."""

import torch

from deltafuse import _library
from deltafuse.ddl import raw, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = (
    "x", "k", "v", "beta", "beta_erase", "read", "norm", "W_v", "b_v", "W_beta", "b_beta",
)  # fmt: skip
OUTPUTS = ("y", "x_in", "c", "z_v", "z_beta")
GATES = {"v_logits": True, "beta_logits": True}
FULL = raw.Options(x_in=True, norm=True, **GATES)


def make(N, d, d_v, state=F32, act=F32, weights=F32, without=(), seed=0):
    """{name: tensor or None} of a boundary, on the CPU; `without` names what is absent."""
    random = torch.Generator().manual_seed(seed + 1000 * d + d_v)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=random, dtype=torch.float64)

    small = d**-0.5
    made = {
        "x": randn(N, d, d_v).to(state),
        "k": randn(N, d).to(act),
        "v": randn(N, d_v).float(),
        "beta": randn(N).float(),
        "beta_erase": randn(N).float(),
        "read": (randn(d, d_v, scale=0.3) + 1 / d_v).to(weights),
        "norm": (1 + randn(d, scale=0.3)).to(weights),
        "W_v": randn(d_v, d, scale=small).to(weights),
        "b_v": randn(d_v).to(weights),
        "W_beta": randn(1, d, scale=small).to(weights),
        "b_beta": randn(1).to(weights),
    }
    if "k" in without:
        without = (*without, "v", "beta", "beta_erase")
    return {name: None if name in without else t for name, t in made.items()}


def on(device, given):
    return {name: t if t is None else t.to(device) for name, t in given.items()}


def act_of(given, options):
    return options.out_dtype or (given["x"] if given["k"] is None else given["k"]).dtype


def call(given, options=FULL, save=False):
    """All results of the operator, `saved` too, without autograd."""
    op = _library.kernel("ddl_boundary_fwd", given["x"])
    numbers = (options.k_eps, options.norm_eps, options.v_scale)
    act = raw.DTYPES.index(act_of(given, options))
    return op(*given.values(), act, *numbers, options.flags(save))


def reference_options(options):
    chosen = options._asdict()
    for name in ("x_in", "norm", "out_dtype"):
        del chosen[name]
    return chosen


def expected(given, options, y):
    """float64 results, the read-out those of y as it was rounded; differentiable."""
    wide = {name: t if t is None else t.double() for name, t in given.items()}
    chosen = reference_options(options)
    state = wide["x"]
    rewritten = None
    if wide["k"] is not None:
        rewrite = {**wide, **dict.fromkeys(NAMES[5:])}
        rewritten = reference.naive_boundary(*rewrite.values(), **chosen)[0]
        state = rewritten + (y.double() - rewritten).detach()
    head = {**wide, "x": state, **dict.fromkeys(NAMES[1:5])}
    return (rewritten, *reference.naive_boundary(*head.values(), **chosen)[1:])


def check_outputs(results, wants, d):
    for name, got, want in zip(OUTPUTS, results, wants, strict=True):
        if got is None or got.numel() == 0:
            continue
        error, size = (got.double() - want).abs(), want.abs()
        if got.dtype == F32:
            limit = 2e-6 * size.clamp(min=1) * max(1.0, torch.tensor(float(d)).log2().item())
        else:
            relative, absolute = {BF16: (2**-8, 1e-4), F16: (2**-11, 2e-5)}[got.dtype]
            limit = relative * size + absolute
        assert (error <= limit).all(), (name, (error - limit).max().item())


GRAD_LIMIT = {F32: 1e-5, BF16: 6e-3, F16: 1e-3}
WEIGHT_LIMIT = {F32: 1e-5, BF16: 4e-3, F16: 4e-3}


def relative(got, want, least=0.0):
    """Error by Frobenius norms; `least` is what a number of `want` counts as, at least."""
    scale = max(want.norm().item(), least * want.numel() ** 0.5)
    return (got.double() - want).norm().item() / (scale or 1)


def check_gradients(grads, wants, given):
    state, act = given["x"].dtype, (given["x"] if given["k"] is None else given["k"]).dtype
    for name, got, want in zip(NAMES, grads, wants, strict=True):
        if want is None:
            continue
        assert got.dtype == given[name].dtype and got.shape == given[name].shape, name
        table = GRAD_LIMIT if name in NAMES[:5] else WEIGHT_LIMIT
        limit = max(table[t] for t in (state, act, got.dtype))
        # one feature has the direction +-1: the gradient of k is a difference of equal numbers
        _, d, d_v = given["x"].shape
        least = d_v / given["k"].abs().min().item() if name == "k" and d == 1 else 0.0
        error = relative(got, want, least)
        assert error <= limit, (name, error, limit)


def tracked(given):
    return {n: t if t is None else t.detach().requires_grad_() for n, t in given.items()}


def derive(results, grads, inputs):
    """Gradients of the inputs (None for absent ones), zeros where nothing depends on one."""
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None and g is not None]
    present = [t for t in inputs.values() if t is not None]
    total = sum((r * g.to(r.dtype)).sum() for r, g in pairs)
    got = iter(torch.autograd.grad(total, present, allow_unused=True, materialize_grads=True))
    return [None if t is None else next(got) for t in inputs.values()]


def incoming(results, used, seed=7):
    """A gradient for each result that `used` names, in its dtype."""
    random = torch.Generator().manual_seed(seed)
    grads = []
    for name, t in zip(OUTPUTS, results, strict=True):
        wanted = t is not None and t.numel() > 0 and name in used
        g = torch.randn(t.shape, generator=random).to(t) if wanted else None
        grads.append(g)
    return grads


def check(device, given, options=FULL, used=OUTPUTS):
    """Results and all gradients of the kernels against float64."""
    ours = tracked(on(device, given))
    results = raw.boundary(tuple(ours.values()), options)
    assert results[2] is None or results[2].dtype == act_of(given, options)
    grads = incoming(results, used)
    theirs = tracked({n: t if t is None else t.double() for n, t in given.items()})
    y = given["x"] if results[0] is None else results[0].detach().cpu()
    wants = expected(theirs, options, y)
    shown = [t if t is None else t.detach().cpu() for t in results]
    check_outputs(shown, [w if w is None else w.detach() for w in wants], given["x"].shape[1])
    if all(g is None for g in grads):
        return
    got = torch.autograd.grad(
        [r for r, g in zip(results, grads, strict=True) if g is not None],
        [t for t in ours.values() if t is not None],
        [g for g in grads if g is not None],
        allow_unused=True,
        materialize_grads=True,
    )
    got = iter(got)
    ours = [None if t is None else next(got).cpu() for t in ours.values()]
    grads = [g if g is None else g.cpu() for g in grads]
    check_gradients(ours, derive(wants, grads, theirs), given)
