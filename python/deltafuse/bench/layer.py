"""Benchmarks of what surrounds the gated delta rule in its layer."""

import torch
import torch.nn.functional as F

from ..gated_delta import ops_layer, reference_layer
from .case import Benchmark, Case


def conv_case(shape, device):
    B, T, D, W = (shape[name] for name in "BTDW")
    x, weight = torch.randn(B, T, D, device=device), torch.randn(D, W, device=device)
    filters = weight.unsqueeze(1)

    def torch_conv():
        return F.silu(F.conv1d(x.mT, filters, padding=W - 1, groups=D)[..., :T]).mT

    def ours():
        return ops_layer.causal_conv1d(x, weight)[0]

    def reference():
        return reference_layer.naive_causal_conv1d(x, weight)[0]

    return Case(
        ours=ours,
        reference=reference,
        baselines={"F.conv1d + F.silu": torch_conv},
        check=lambda: [
            ("y", ours(), reference(), 1e-5),
            ("y against F.conv1d", ours(), torch_conv(), 1e-5),
        ],
    )


def norm_case(shape, device):
    size = [shape[name] for name in "BTHV"]
    x, gate = (torch.randn(*size, device=device) for _ in range(2))
    weight = torch.rand(shape["V"], device=device)

    def torch_norm():
        return F.rms_norm(x, weight.shape, weight, 1e-5) * F.silu(gate)

    def ours():
        return ops_layer.gated_rms_norm(x, weight, gate)

    def reference():
        return reference_layer.naive_gated_rms_norm(x, weight, gate)

    return Case(
        ours=ours,
        reference=reference,
        baselines={"F.rms_norm * F.silu": torch_norm},
        check=lambda: [("y", ours(), reference(), 1e-5)],
    )


ENTRIES = {
    "short_conv": Benchmark(
        title="causal_conv1d with SiLU, forward",
        reference="eager sum of shifted products (naive_causal_conv1d)",
        kernel="causal_conv1d_fwd",
        shapes=({"B": 1, "T": 2048, "D": 2048, "W": 4},),
        tiny={"B": 2, "T": 9, "D": 20, "W": 4},
        make=conv_case,
        flops=lambda s: s["B"] * s["T"] * s["D"] * (2 * s["W"] + 4),  # SiLU counts as 4
        bytes=lambda s: 4 * (2 * s["B"] * s["T"] * s["D"] + s["D"] * s["W"]),
    ),
    "gated_norm": Benchmark(
        title="gated_rms_norm, forward",
        reference="eager (naive_gated_rms_norm)",
        kernel="gated_rms_norm_fwd",
        shapes=({"B": 1, "T": 2048, "H": 16, "V": 128},),
        tiny={"B": 2, "T": 3, "H": 2, "V": 20},
        make=norm_case,
        flops=lambda s: (
            s["B"] * s["T"] * s["H"] * s["V"] * 9
        ),  # square, sum, 2 products, SiLU, gate
        bytes=lambda s: 12 * s["B"] * s["T"] * s["H"] * s["V"],
    ),
}
