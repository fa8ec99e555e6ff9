"""The error of the gated delta rule against the strength of its gate, measured on the kernels.

    python bench/gated_delta_error.py

Writes docs/ops/gated_delta_error.png. Gates are uniform in (-s, 0). The left picture has the
relative errors of outputs and gradients against the float64 recurrence; the right one that of
sum g dg, what A_log receives, beside the shorter form of dg (Euler's identity), from the same
kernel's dq and dv. With an emulated build (`make emulated`) the bfloat16 errors of the CUDA kernels
are drawn, too.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltafuse import _library
from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from deltafuse.testing import relative_error

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "ops" / "gated_delta_error.png"
EMULATED = ROOT / "build" / "emulated" / "libdeltafuse_emulated_sm90a.so"
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
STRENGTHS = (1e-3, 1e-2, 6e-2, 0.25, 1, 2, 4, 8, 16, 32)
T, HEADS, D = 256, 2, 64


def inputs(strength, dtype):
    random = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(1, T, HEADS, *size, generator=random)

    q, k = (F.normalize(normal(D), dim=-1) for _ in range(2))
    v, g, beta = (
        normal(D),
        -strength * torch.rand(1, T, HEADS, generator=random),
        normal().sigmoid(),
    )
    d_o = normal(D).to(dtype)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta], d_o


def results(function, tensors, d_o):
    tensors = [x.detach().requires_grad_() for x in tensors]
    o, _ = function(*tensors)
    return dict(zip(NAMES, (o, *torch.autograd.grad(o, tensors, d_o)), strict=True))


def euler(tensors, values):
    """dg_t = sum over s >= t of q_s . dq_s - v_s . dv_s, from the same gradients."""
    q, _, v, *_ = tensors
    per_token = (q * values["dq"]).sum(-1, dtype=torch.float32)
    per_token -= (v * values["dv"]).sum(-1, dtype=torch.float32)
    return per_token.flip(1).cumsum(1).flip(1)


def errors(strength, dtype):
    """{name: relative error}, with "sum" and "sum, Euler" for sum g dg by the two forms."""
    tensors, d_o = inputs(strength, dtype)
    exact = results(naive_recurrent_gated_delta_rule, [x.double() for x in tensors], d_o.double())
    values = results(chunk_gated_delta_rule, tensors, d_o)
    found = {name: relative_error(values[name], exact[name]) for name in NAMES}
    wanted = (tensors[3].double() * exact["dg"]).sum((0, 1))
    for name, dg in (("sum", values["dg"]), ("sum, Euler", euler(tensors, values))):
        found[name] = relative_error((tensors[3].double() * dg).sum((0, 1)), wanted)
    return found


def curves():
    """{label: (errors at each strength)} of the CPU kernel, and of the CUDA kernels if built."""
    backends = {
        "CPU, float32": ("native", torch.float32),
        "CPU, bfloat16": ("native", torch.bfloat16),
    }
    if EMULATED.exists():
        sys.path.insert(0, str(EMULATED.parent))
        _library.load_emulated(EMULATED, "sm90a")
        backends["CUDA (emulated), bfloat16"] = ("cuda-emulated-sm90a", torch.bfloat16)
    for label, (backend, dtype) in backends.items():
        with _library.use(backend) if backend != "native" else contextlib.nullcontext():
            yield label, [errors(strength, dtype) for strength in STRENGTHS]


def main():
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"CPU, float32": "-", "CPU, bfloat16": "--", "CUDA (emulated), bfloat16": ":"}
    for label, found in curves():
        for i, name in enumerate(NAMES):
            left.plot(STRENGTHS, [e[name] for e in found], styles[label], color=f"C{i}")
        for name, color in (("sum", "#2171b5"), ("sum, Euler", "#d94801")):
            shown = f"{label}: {'as in the kernel' if name == 'sum' else 'Euler form'}"
            right.plot(STRENGTHS, [e[name] for e in found], styles[label], color=color, label=shown)
        left.plot([], [], styles[label], color="black", label=label)
    for i, name in enumerate(NAMES):
        left.plot([], [], color=f"C{i}", label=name)
    left.set_title("outputs and gradients")
    right.set_title("sum g dg, the gradient of A_log")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="s: gates uniform in (-s, 0)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("relative error against float64")
    FigureCanvasAgg(figure).print_png(PICTURE)


if __name__ == "__main__":
    main()
