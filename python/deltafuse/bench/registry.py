"""All benchmarks by name. A new operator adds its module's entries here."""

from . import ddl, gated_delta, gated_delta_gpu, grape, grape_frame, host, layer, mars, model
from .case import Benchmark, Case

REGISTRY = {
    **gated_delta.ENTRIES,
    **gated_delta_gpu.ENTRIES,
    **layer.ENTRIES,
    **mars.ENTRIES,
    **ddl.ENTRIES,
    **grape.ENTRIES,
    **grape_frame.ENTRIES,
    **model.ENTRIES,
    **host.ENTRIES,
}
__all__ = ["REGISTRY", "Benchmark", "Case", "meant_for"]


def meant_for(device):
    """The names of the benchmarks for "cpu" or "cuda"."""
    return [name for name, benchmark in REGISTRY.items() if device in benchmark.devices]
