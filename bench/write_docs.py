"""Rewrites the tables of docs/benchmarks.md from all files in bench/results."""

import sys
from pathlib import Path

from deltafuse.bench import results, table
from deltafuse.bench.registry import REGISTRY

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
MARK = "<!-- Below this line: written by bench/write_docs.py from bench/results. -->"


def section(rows):
    """All measurements of one file: one device."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [f"## {first['device']}, {first['isa'] or first['backend']}", versions]
    for name, benchmark in REGISTRY.items():
        measured = [row for row in rows if row["op"] == name]
        if measured:
            lines += [f"### {name}", f"{benchmark.title}; reference: {benchmark.reference}."]
            lines += [table.markdown(row).strip() for row in measured]
    return "\n\n".join(lines)


def main():
    page = PAGE.read_text()
    if MARK not in page:
        print(f"{PAGE.relative_to(ROOT)}: the line {MARK!r} is missing", file=sys.stderr)
        return 2
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    sections = [section(rows) for rows in map(results.read, files) if rows]
    PAGE.write_text("\n\n".join([page.split(MARK)[0] + MARK, *sections]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
