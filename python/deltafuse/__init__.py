"""deltafuse: fused CPU and CUDA kernels for linear-attention language models."""

from . import _library

backend_info = _library.backend_info
build_info = _library.build_info
has_cuda = _library.has_cuda
__version__ = "0.1.0"
