"""The JSON file of measurements: {"rows": [...]}, one row a case and thread count."""

import json
import os
from pathlib import Path

KEY = ("op", "shape", "dtype", "threads", "device", "isa")
FIELDS = {*KEY, "backend", "versions", "git", "date", "load",
          "omp_wait_policy", "correct", "flops", "bytes",
          "seconds", "targets"}  # fmt: skip


class ResultsError(ValueError):
    """A file that is not one of measurements; the message names it."""


def key(row):
    return json.dumps([row[name] for name in KEY], sort_keys=True)


def read(path):
    """The rows of a file, [] if there is none; ResultsError for anything else."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        complete = all(row.keys() >= FIELDS for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ResultsError(f"{path}: not a file of measurements") from error
    if not complete:
        raise ResultsError(f"{path}: a row lacks fields")
    return rows


def merge(old, new):
    """Old rows, those measured again replaced in place, then the others."""
    rows = {key(row): row for row in old}
    rows.update({key(row): row for row in new})
    return list(rows.values())


def write(path, rows):
    """Whole or not at all: a full disk leaves the old file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)
