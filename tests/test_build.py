"""What the library asks of the system and shows to it, and how it chooses backends."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltafuse
from deltafuse import _library

LIBRARY = Path(deltafuse.__file__).with_name("libdeltafuse.so")
NEEDED = {"libtorch", "libtorch_cpu", "libc10", "libstdc++", "libm", "libgcc_s", "libc"}
CUDA_TORCH_ONLY = "aoti_torch_get_current_cuda_stream|torch_c10_cuda_(check|free_error)_msg"
# the C functions of torch's stable ABI; a new one needs a look at the version that brought it
SHIM = r"(aoti_)?torch_\w+$"


def output(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_needs_exactly_these_libraries():
    names = set(re.findall(r"NEEDED.*\[(.*?)\.so", output("readelf", "-d", str(LIBRARY))))
    assert {"libtorch", "libtorch_cpu"} <= names <= NEEDED | {"ld-linux-x86-64"}


def test_symbols_are_the_stable_abi_and_nothing_leaks():
    lines = [line.split() for line in output("nm", "-D", str(LIBRARY)).splitlines()]
    undefined = {line[1]: line[0] for line in lines if len(line) == 2}
    exported = [line[2] for line in lines if len(line) == 3]
    assert not [s for s in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", s)]
    shim = [s for s in undefined if "torch" in s]
    assert shim and all(re.match(SHIM, s) for s in shim)
    assert all(kind == "w" for s, kind in undefined.items() if re.match(CUDA_TORCH_ONLY, s))
    assert exported and all(s.startswith("_ZN2df") for s in exported)


def test_no_build_paths_in_the_library():
    path = rb"/[^\0]*/(csrc/(common|gated_delta|mars)|site-packages)/"
    assert not re.search(path, LIBRARY.read_bytes())


def test_import_is_light():
    code = """
import time, torch, sys
start = time.perf_counter()
import deltafuse
print(time.perf_counter() - start, *(m for m in ("matplotlib", "safetensors") if m in sys.modules))
"""
    words = python(code, CUDA_VISIBLE_DEVICES="").stdout.split()
    assert float(words[0]) < 0.3 and len(words) == 1  # seconds; no optional dependency


def test_backend_info_names_every_operator():
    info = deltafuse.backend_info()
    assert info["build"].startswith("cpu") and info["backend"] == "auto"
    assert info["ops"]["gated_delta_fwd"]["cpu"] == "cpu"
    with _library.use("reference"):
        assert set(deltafuse.backend_info()["ops"]["gated_delta_fwd"].values()) == {"reference"}


def test_environment_forces_the_reference():
    code = """
import torch, deltafuse
print(deltafuse.backend_info()["ops"]["gated_delta_fwd"]["cpu"])
q = torch.ones(1, 2, 1, 4); g = torch.zeros(1, 2, 1)
print(deltafuse.chunk_gated_delta_rule(q, q, q, g, g)[0].sum().item())
"""
    assert python(code, DELTAFUSE_BACKEND="reference").stdout.split()[0] == "reference"
    failed = python("import deltafuse", DELTAFUSE_BACKEND="fast")
    assert failed.returncode and "DELTAFUSE_BACKEND" in failed.stderr


class FakeCuda:
    """Stands for a tensor on a GPU; `kernel` looks at the device alone."""

    device = torch.device("cuda")


def test_missing_cuda_kernel_warns_once(monkeypatch):
    monkeypatch.setattr(_library, "_warned", set())
    with pytest.warns(UserWarning, match="no cuda kernel for no_such_op"):
        assert _library.kernel("no_such_op", FakeCuda) is None
    assert _library.kernel("no_such_op", FakeCuda) is None  # a second warning would be an error


def test_missing_cuda_kernel_raises_when_strict(monkeypatch):
    monkeypatch.setattr(_library, "_strict", True)
    with pytest.raises(RuntimeError, match="no cuda kernel for no_such_op"):
        _library.kernel("no_such_op", FakeCuda)
