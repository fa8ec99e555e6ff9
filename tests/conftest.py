"""Devices and the emulator. A test that takes `device` runs on cpu, cuda and cuda-emulated."""

import contextlib
import os
import sys
from pathlib import Path

# the compile caches do not notice a changed register_autograd
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
# scalar code for what surrounds our operators: trying out vector instructions compiles for 15 s
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
# threads that wait spin, by default: on a machine with other work tests take twenty times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from deltafuse import _eager, _library

EMULATED = Path(__file__).parent.parent / "build" / "emulated"
EMULATED_ARCHS = ("sm80", "sm90a")
MODES = {  # settings of the emulator that every kernel is run with
    "race": {"race": True},
    "race, shuffled 1": {"race": True, "seed": 1},
    "race, shuffled 2": {"race": True, "seed": 2},
    "strict": {"strict": True},
    "early": {"async": "early"},
}


@pytest.fixture(scope="session")
def emulator():
    """cuemu's runtime, with every test library that was built."""
    paths = {arch: EMULATED / f"libdeltafuse_emulated_{arch}.so" for arch in EMULATED_ARCHS}
    if not all(path.exists() for path in paths.values()):
        pytest.skip("no emulated build (make emulated)")
    sys.path.insert(0, str(EMULATED))
    import cuemu

    runtime = cuemu.Emulator(EMULATED / "libcudart.so.13")
    for arch, path in paths.items():
        _library.load_emulated(path, arch)
    return runtime


@pytest.fixture(params=EMULATED_ARCHS)
def emulated(request, emulator):
    """Operators run their CUDA kernels on CPU tensors; a failed launch fails the test."""
    with _library.use(f"cuda-emulated-{request.param}"):
        yield emulator
    emulator.check()


@pytest.fixture
def emulated_with(emulated):
    """with emulated_with(race=True): the settings of cuemu, within the block."""

    @contextlib.contextmanager
    def settings(**values):
        emulated.configure(**values)
        try:
            yield emulated
        finally:
            for name in values:
                del os.environ["CUEMU_" + name.upper()]
            emulated.configure()

    return settings


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.cuda),
    *(pytest.param(f"cuda-emulated-{arch}", marks=pytest.mark.emulated) for arch in EMULATED_ARCHS),
]


@pytest.fixture(params=DEVICES)
def device(request):
    """Where the tensors are; "cuda-emulated-..." is CPU tensors and another library."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param.startswith("cuda-emulated"):
        emulator = request.getfixturevalue("emulator")
        with _library.use(request.param):
            yield "cpu"
        emulator.check()
    else:
        yield request.param


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def cpu_isa(request):
    """The CPU kernels of one instruction set; skipped where the CPU lacks it."""
    if _library._C is None:
        pytest.skip("no pybind11 module for this Python")
    before = _library._C.cpu_isa()
    if not _library._C.set_cpu_isa(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    yield request.param
    _library._C.set_cpu_isa(before)


@pytest.fixture
def registered(monkeypatch):
    """registered(): from now on operators run as torch.library has them."""
    return lambda: monkeypatch.setattr(_eager, "_is_heard", lambda args: True)


@pytest.fixture
def threads():
    """threads(n) sets the thread count; the one before comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_filled_memory():
    """New tensors hold NaN, those allocated in C++ included: a kernel that skips one is seen."""
    mode = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), mode.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    mode.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    mode.fill_uninitialized_memory = before[1]
