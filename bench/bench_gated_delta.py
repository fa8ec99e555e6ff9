"""pytest bench/bench_gated_delta.py: the gated delta rule and its layer, by pytest-benchmark.

On a GPU also the published shapes of forward and backward (bfloat16), with the packages that are
installed: fla, FlashQLA, flashinfer.
"""

import pytest
import torch

from deltafuse.bench import gated_delta_gpu
from deltafuse.bench.measure import correctness
from deltafuse.bench.registry import REGISTRY

ROWS = {
    "gated_delta_fwd": ("ours", "reference"),
    "gated_delta_fwd_bwd": ("ours", "reference"),
    "gated_delta_recurrent": ("ours", "reference", "eager chunk form"),
    "gated_delta_decode": ("ours", "reference", "eager step"),
    "short_conv": ("ours", "reference", "F.conv1d + F.silu"),
    "gated_norm": ("ours", "reference", "F.rms_norm * F.silu"),
}
CASES = [(op, shape, name) for op, names in ROWS.items()
         for shape in REGISTRY[op].shapes for name in names]  # fmt: skip
GPU_CASES = [(op, shape) for op in gated_delta_gpu.ENTRIES for shape in REGISTRY[op].shapes]


@pytest.mark.parametrize("op, shape, name", CASES)
def test_gated_delta(run, op, shape, name):
    run(op, shape, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ("ours", *gated_delta_gpu.RIVALS))
@pytest.mark.parametrize("op, shape", GPU_CASES)
def test_published_shape(benchmark, op, shape, name):
    case = REGISTRY[op].make(shape, "cuda")
    functions = {"ours": case.ours, **case.baselines}
    if name not in functions:
        pytest.skip(f"{name} is not installed")
    if name == "ours":
        assert correctness(case)["ok"], f"{op} differs from its reference"
    benchmark.group = f"{op} {shape}"

    def call():
        functions[name]()
        torch.cuda.synchronize()

    benchmark(call)
