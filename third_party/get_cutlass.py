"""Puts the CUTLASS headers into third_party/cutlass, where CMake looks for them.

    python third_party/get_cutlass.py [pip options, for example --find-links FOLDER]

The headers are in the wheel nvidia-cutlass; its Python dependencies are not needed, so none is
installed, and nothing goes into the running environment.
"""

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "4.2.0.0"
TARGET = Path(__file__).resolve().parent / "cutlass"


def main():
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    wheel = ["--no-deps", "--no-compile", "--target", TARGET, f"nvidia-cutlass=={VERSION}"]
    shutil.rmtree(TARGET, ignore_errors=True)
    subprocess.run([*pip, *sys.argv[1:], *wheel], check=True)
    header = TARGET / "cutlass_library/source/include/cutlass/version.h"
    if not header.exists():
        sys.exit(f"get_cutlass: the wheel has no {header.relative_to(TARGET)}")
    print(f"CUTLASS {VERSION} headers in {header.parent.parent}")


if __name__ == "__main__":
    main()
