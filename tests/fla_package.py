"""The real flash-linear-attention, where there is one; a skip otherwise.

Looked for in the environment and in the folder that DELTAFUSE_TEST_FLA names.
"""

import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

import pytest


def package():
    """The folder of the package, without importing it."""
    folder = os.environ.get("DELTAFUSE_TEST_FLA")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("no flash-linear-attention (DELTAFUSE_TEST_FLA names a folder with it)")
    return Path(spec.origin).parent


def version(root):
    return re.search(r'__version__ = "(.*?)"', (root / "__init__.py").read_text())[1]


def imported(name):
    """A module of the package; importing its kernels needs triton, but no GPU."""
    root = package()
    for needed in ("triton", "einops"):
        pytest.importorskip(needed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            pytest.skip(f"flash-linear-attention {version(root)} has no {name}")


def naive():
    """Its references, a file that needs no triton."""
    root = package()
    pytest.importorskip("einops")
    path = root / "ops" / "gated_delta_rule" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
