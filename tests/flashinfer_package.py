"""The real flashinfer's source, where there is one; a skip otherwise. Never imported as a whole.

Looked for in the environment and in the folder that DELTAFUSE_TEST_FLASHINFER names.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest


def package():
    """The folder of the package."""
    folder = os.environ.get("DELTAFUSE_TEST_FLASHINFER")
    if folder:
        return Path(folder) / "flashinfer"
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        pytest.skip("no flashinfer (DELTAFUSE_TEST_FLASHINFER names a folder with it)")
    return Path(spec.origin).parent


def references():
    """Its references in PyTorch, which need nothing else of it."""
    root = package() / "trace"
    if not (root / "templates" / "gdn.py").exists():
        pytest.skip("this flashinfer has no references of the gated delta rule")
    for name, folder in (
        ("flashinfer_trace", root),
        ("flashinfer_trace.templates", root / "templates"),
    ):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    return importlib.import_module("flashinfer_trace.templates.gdn")
