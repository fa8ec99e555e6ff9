"""`deltafuse bench` with its measurements saved: bench/results/<hardware>.json unless --json."""

import sys
from pathlib import Path

from deltafuse.bench import environment, main

RESULTS = Path(__file__).parent / "results"


def arguments(argv):
    device = "cuda" if "cuda" in argv else "cpu"
    if {"--list", "--quick", "--help", "-h"} & set(argv) or any(
        a.startswith("--json") for a in argv
    ):
        return argv
    try:
        name = environment.file_name(device)
    except (AssertionError, RuntimeError):  # no GPU: the command says so
        return argv
    return [*argv, "--json", str(RESULTS / f"{name}.json")]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
