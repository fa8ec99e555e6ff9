"""One benchmark on one device: correctness first, then times, as a JSON row."""

import contextlib
from dataclasses import asdict

import torch

from .. import _library
from ..testing import relative_error
from . import environment, timing

OURS, REFERENCE, COMPILED = "ours", "reference", "torch.compile"


def correctness(case):
    """The worst comparison of the gate: {"ok", "what", "error", "limit"}."""
    worst, position = None, -1.0
    for what, actual, expected, limit in case.check():
        error = relative_error(actual.detach(), expected.detach())
        # a NaN compares as false everywhere and must be the worst
        relative = error / limit if error == error else float("inf")
        if relative > position:
            worst, position = {"what": what, "error": error, "limit": limit}, relative
    if worst is None:
        return {"ok": False, "what": "no comparison", "error": float("inf"), "limit": 0.0}
    return {"ok": position <= 1, **worst}


def functions(case, compile_baseline):
    """{row name: function}, ours first."""
    reference = {REFERENCE: case.reference} if case.reference else {}
    named = {OURS: case.ours, **reference, **case.baselines}
    if compile_baseline and case.compiled:
        torch.compiler.reset()  # the limit on recompilations is one for all shapes and types
        named[COMPILED] = case.compiled(torch.compile)
    return named


def backend(benchmark, device):
    """What answers for ours: "cpu" or "cuda", or "reference" without a compiled kernel."""
    return _library.backend_info()["ops"][benchmark.kernel][device]


def measure(name, benchmark, shape, device="cpu", threads=1, rounds=None, compile_baseline=False):
    """Times one case; row["ratios"] exists only if ours is a kernel and passes the gate."""
    pool = timing.threads(threads) if device == "cpu" else contextlib.nullcontext()
    with pool:
        case = benchmark.make(shape, device)
        correct = correctness(case)
        samples = timing.interleave(functions(case, compile_baseline), device, rounds)
    row = {
        "op": name,
        "shape": shape,
        "dtype": benchmark.dtype,
        "threads": threads if device == "cpu" else None,
        "backend": backend(benchmark, device),
        **environment.describe(device),
        "correct": correct,
        "flops": benchmark.flops(shape),
        "bytes": benchmark.bytes(shape),
        "seconds": {key: asdict(sample) for key, sample in samples.items()},
        "targets": [list(target) for target in benchmark.targets],
    }
    goal = benchmark.goal(shape)
    if goal is not None:
        row["goal"] = goal
    if correct["ok"] and row["backend"] != "reference":
        ours = samples[OURS]
        row["ratios"] = {
            key: {
                "median": sample.median / ours.median,
                "minimum": sample.minimum / ours.minimum,
            }
            for key, sample in samples.items()
            if key != OURS
        }
    return row
