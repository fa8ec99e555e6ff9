"""Finds torch, runs CMake and ninja once, tags the wheel. What compiles is in CMakeLists.txt."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FORWARDED = ("DELTAFUSE_CUDA", "DELTAFUSE_CUDA_ARCHS", "CUTLASS_PATH", "CUEMU_DIR")


def find_package(name):
    """Folder of an importable package, or None; imports nothing."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec else None


def find_torch():
    candidates = [os.environ.get("DELTAFUSE_TORCH_DIR"), find_package("torch")]
    # pip's build isolation hides site-packages from sys.path, but not from sysconfig
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in filter(None, candidates):
        if (Path(folder) / "include/torch/csrc/stable/library.h").exists():
            return Path(folder)
    sys.exit("deltafuse: no torch >= 2.11 here; run first: pip install torch==2.13.0")


def job_count():
    """One compiler a core, and 4 GB of memory for each."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, int(gigabytes / 4))))


class CMakeBuild(build_ext):
    """One CMake build for the whole package; setuptools only says where the result goes."""

    def run(self):
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT / "python" if in_place else Path(self.build_lib).resolve()) / "deltafuse"
        folder = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = os.environ.get("DELTAFUSE_BUILD_DIR") or ROOT / "build" / folder
        options = {
            "TORCH_DIR": find_torch(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_INSTALL_PREFIX": target,
            "CMAKE_BUILD_TYPE": os.environ.get("DELTAFUSE_BUILD_TYPE", "Release"),
            # the cache may name the ninja and pybind11 of an isolated environment that is gone
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            **{key: os.environ[key] for key in FORWARDED if key in os.environ},
        }
        if pybind11 := find_package("pybind11"):
            options["pybind11_DIR"] = pybind11 / "share/cmake/pybind11"
        flags = [f"-D{key}={value}" for key, value in options.items()]
        flags += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *flags], check=True)
        install = ["cmake", "--build", build, "--parallel", job_count(), "--target", "install"]
        subprocess.run(install, check=True)

    def get_outputs(self):  # an editable install would copy the one file it knows
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):  # libtorch's stable C ABI and no Python ABI at all
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("deltafuse._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
