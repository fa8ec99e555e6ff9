"""Benchmarks of the operators against plain PyTorch: `deltafuse bench OP`."""

from .main import main
from .registry import REGISTRY, Benchmark, Case

__all__ = ["REGISTRY", "Benchmark", "Case", "main"]
