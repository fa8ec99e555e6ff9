"""Where a measurement was taken: processor or GPU, versions, commit, load of the machine."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .. import __version__, _library


def device_name(device):
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.*)", info.read_text())):
        name = found.group(1)
    return f"{name}, {os.cpu_count()} cores"


def file_name(device):
    """The device as a file's name: "intel-xeon-2-cores"."""
    words = re.sub(r"\((r|tm)\)|processor|@.*?,", " ", device_name(device).lower())
    return "-".join(re.findall(r"[a-z0-9]+", words))


def commit():
    """Short hash of this package's repository, "-dirty" after changes; None outside of it."""
    here = Path(__file__).parent

    def git(*arguments):
        command = ("git", "-C", str(here), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # an installed copy may lie in the repository of somebody else's project
        root = Path(git("rev-parse", "--show-toplevel"))
        if not (root / "python" / "deltafuse" / "_library.py").exists():
            return None
        # measured files that are being written are no change of the code
        changed = git("status", "--porcelain", "--", ":/csrc", ":/python", ":/CMakeLists.txt")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load():
    """Processes that wanted to run during the last minute; None where the system keeps no count."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def describe(device):
    """The part of a JSON row that the device and the installation decide."""
    return {
        "device": device_name(device),
        "isa": _library.cpu_isa() if device == "cpu" else None,
        "versions": {
            "torch": torch.__version__,
            "deltafuse": __version__,
            "python": platform.python_version(),
        },
        "git": commit(),
        "date": datetime.date.today().isoformat(),
        "load": load(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
