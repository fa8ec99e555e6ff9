"""pytest bench/bench_gated_delta.py: the gated delta rule and its layer, by pytest-benchmark."""

import pytest

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


@pytest.mark.parametrize("op, shape, name", CASES)
def test_gated_delta(run, op, shape, name):
    run(op, shape, name)
