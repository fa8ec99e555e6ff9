"""The eigenvalues of the Delta operator over its gate, measured on the kernel.

    python bench/ddl_spectrum.py

Writes docs/ops/ddl_spectrum.png.
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltafuse import delta_rewrite

PICTURE = Path(__file__).parent.parent / "docs" / "ops" / "ddl_spectrum.png"
FEATURES = 8
REGIMES = {0.0: "identity", 1.0: "projection", 2.0: "reflection"}


def operator(k, beta):
    """A of Y = A X: the operator applied to the identity, with nothing to write."""
    eye = torch.eye(FEATURES, dtype=torch.float64)
    return delta_rewrite(eye, k, torch.zeros(FEATURES, dtype=torch.float64), beta, k_eps=0.0)


def main():
    k = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = torch.linspace(-0.5, 2.5, 121, dtype=torch.float64)
    matrices = [operator(k, beta) for beta in gates]
    values = torch.stack([torch.linalg.eigvalsh(A) for A in matrices])
    norms = torch.stack([torch.linalg.matrix_norm(A, 2) for A in matrices])
    determinants = torch.stack([A.det() for A in matrices])
    along = torch.where(gates >= 0, values[:, 0], values[:, -1])  # the one that moves
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(gates, values[:, 1:-1], color="#9ecae1", linewidth=2)
    axes.plot([], [], color="#9ecae1", label=f"the other {FEATURES - 1} eigenvalues")
    axes.plot(gates, along, color="#d94801", label="eigenvalue along k")
    axes.plot(gates, determinants, ":", color="black", label="determinant")
    axes.plot(gates, norms, "--", color="#2171b5", label="spectral norm")
    for beta, name in REGIMES.items():
        axes.axvline(beta, color="gray", linewidth=0.6)
        axes.annotate(name, (beta, -1.45), (4, 0), textcoords="offset points", color="gray")
    axes.set(xlabel="beta", title=f"I - beta k k^T, d = {FEATURES}, as delta_rewrite computes it")
    axes.set_ylim(-1.6, 1.7)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    FigureCanvasAgg(figure).print_png(PICTURE)


if __name__ == "__main__":
    main()
