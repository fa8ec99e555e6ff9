"""The rules of the layout: who may include or import whom, lengths, header comments."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "deltafuse"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON = MODULES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py"))
SLICES = {p.name for p in CSRC.iterdir() if p.is_dir()} - {"common", "python"}
# folder: what it may import from the package, besides itself
ALLOWED = {
    "optim": {"_library", "_checks"},
    "models": {"ddl", "gated_delta", "grape", "_checks"},
    "train": {"models", "optim", "gated_delta", "_library", "_checks"},
    "integrations": {"gated_delta", "optim", "_library", "_checks"},
    "gated_delta": {"_library", "_checks"},
    "ddl": {"_library", "_checks"},
    "grape": {"_library", "_checks"},
}


def name(path):
    return str(path.relative_to(ROOT))


def includes(path):
    return re.findall(r'#include [<"](.*?)[>"]', path.read_text())


def imports(path):
    """Absolute names of all modules that a file imports, `from . import x` resolved."""
    package = ("deltafuse", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes(path):
    folder = path.relative_to(CSRC).parts[0]
    for header in includes(path):
        if header.startswith("torch/"):
            assert path.name in ("op.h", "cuda_shim.h"), f"{header}: only through common/op.h"
        if (other := header.split("/")[0]) in SLICES:
            assert folder == other, f"{header}: an operator includes only itself and common/"
        if path.suffix in (".cu", ".cuh") or path.stem.endswith("_cpu_kernel"):
            assert header not in ("common/op.h", "common/cuda_shim.h"), "kernels know no torch"
        if path.stem.endswith("_cpu_kernel"):
            assert header not in ("vector", "string", "map", "functional"), "no std containers"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports(path):
    parts = path.relative_to(PACKAGE).parts
    for module in imports(path):
        words = module.split(".")
        if words[0] != "deltafuse" or len(words) < 2:
            continue
        if words[1] == "testing":
            assert parts[0] == "bench", "testing is for tests and benches"
        if path.stem.startswith("reference"):
            assert len(words) < 3 or words[2].startswith("reference"), "reference needs torch alone"
        if len(parts) > 1 and parts[0] in ALLOWED and (PACKAGE / words[1]).exists():
            assert words[1] in ALLOWED[parts[0]] | {parts[0]}, (
                f"{parts[0]} must not import {module}"
            )


@pytest.mark.parametrize("path", SOURCES + PYTHON, ids=name)
def test_lengths(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= (600 if path.suffix in (".cu", ".cuh") else 400)
    assert max(map(len, lines), default=0) <= 100


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_function_lengths(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 60, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".cu"], ids=name)
def test_cuda_files_open_with_their_design(path):
    text = path.read_text()
    header = re.match(r"(//.*\n)+", text)
    assert header and len(text.splitlines()) < 12 or len(header.group().splitlines()) >= 8


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_commented_out_code(path):
    statement = r"(return|if|for|while|auto|const|int\w*|float|double)\b.*[;{]"
    assignment, call = r"[\w.>\[\]-]+ [-+*/]?= [^,]*;", r"[\w.:>-]+\([^)]*\);"
    code = re.compile(rf"^\s*//\s*({statement}|{assignment}|{call})\s*$")
    assert not [line for line in path.read_text().splitlines() if code.match(line)]


@pytest.mark.parametrize("path", SOURCES + PYTHON, ids=name)
def test_nothing_unfinished(path):
    if path != Path(__file__):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b(?!.*https?:)", path.read_text())


def test_headers_define_a_function_once():
    """Two inline functions of one signature are one symbol: the linker keeps either."""
    found = {}
    for path in (p for p in SOURCES if p.suffix == ".h"):
        for match in re.finditer(
            r"^inline [\w:<>*& ]+?(\w+)\(([^)]*)\) (?:const )?\{", path.read_text(), re.M
        ):
            types = tuple(re.sub(r"\s*\w+$", "", a.strip()) for a in match[2].split(","))
            found.setdefault((match[1], types), []).append(name(path))
    assert len(found) > 100
    assert not {key: paths for key, paths in found.items() if len(paths) > 1}
