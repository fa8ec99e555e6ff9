"""All benchmarks by name. A new operator adds its module's entries here."""

from . import ddl, gated_delta, grape, grape_frame, layer, mars, model
from .case import Benchmark, Case

REGISTRY = {
    **gated_delta.ENTRIES,
    **layer.ENTRIES,
    **mars.ENTRIES,
    **ddl.ENTRIES,
    **grape.ENTRIES,
    **grape_frame.ENTRIES,
    **model.ENTRIES,
}
__all__ = ["REGISTRY", "Benchmark", "Case"]
