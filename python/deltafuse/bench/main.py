"""The command `deltafuse bench OP`."""

import os
import sys
from pathlib import Path

import torch

from ..cli import Parser, number
from ..train.errors import describe
from . import results, table
from .measure import COMPILED, measure
from .registry import REGISTRY


def make_parser():
    p = Parser(
        prog="deltafuse bench",
        description="Time operators against plain PyTorch, all in turns in one process.",
    )
    p.add_argument("ops", nargs="*", metavar="OP", help="see --list")
    p.add_argument("--all", action="store_true", help="every operator")
    p.add_argument("--list", action="store_true", help="name the operators and stop")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", nargs="+", type=number(int, 1, 1024), metavar="N",
                   help="CPU threads, each count in turn (default: 1 2)")  # fmt: skip
    p.add_argument("--json", metavar="FILE", help="add the measurements to this file")
    p.add_argument("--repeat", type=number(int, 1), metavar="N",
                   help="samples of each row (default: as many as fit 20 s)")  # fmt: skip
    p.add_argument("--compile-baseline", action="store_true",
                   help="time torch.compile of the plain PyTorch form, too")  # fmt: skip
    p.add_argument("--quick", action="store_true",
                   help="tiny sizes: to see that all runs, the times mean nothing")  # fmt: skip
    return p


def chosen(args, parser):
    """The operators' names; ends the process with code 2 for wrong ones."""
    unknown = [name for name in args.ops if name not in REGISTRY]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}, there are: {', '.join(REGISTRY)}")
    if bool(args.ops) == args.all:
        parser.error("name operators, or give --all" if not args.all else "--all takes no names")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here")
    if args.device == "cuda" and args.threads:
        parser.error("--threads is for the CPU")
    there = [name for name, benchmark in REGISTRY.items() if args.device in benchmark.devices]
    elsewhere = [name for name in args.ops if name not in there]
    if elsewhere:
        parser.error(f"{elsewhere[0]} is not measured with --device {args.device}")
    return there if args.all else args.ops


def earlier(args, parser):
    """Rows of the JSON file, read before anything is measured: hours may hang on it."""
    if args.json is None:
        return []
    try:
        rows = results.read(args.json)
    except results.ResultsError as error:
        parser.error(str(error))
    folder = Path(args.json).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--json: cannot write to {folder}")
    return rows


def wants_compiled(benchmark):
    return any(row == COMPILED for row, _ in benchmark.targets)


def run(args, names, rows):
    """Prints a table a case, and saves after each; the exit code: 1 if a kernel is wrong."""
    counts = (args.threads or (1, 2)) if args.device == "cpu" else (1,)
    wrong = False
    for name in names:
        benchmark = REGISTRY[name]
        print(f"{name}: {benchmark.title}\nreference: {benchmark.reference}\n", flush=True)
        for shape in (benchmark.tiny,) if args.quick else benchmark.shapes:
            for threads in counts:
                compiled = args.compile_baseline or (wants_compiled(benchmark) and not args.quick)
                row = measure(name, benchmark, shape, args.device, threads, args.repeat, compiled)
                wrong |= not row["correct"]["ok"]
                print(table.text(row) + "\n", flush=True)
                if args.json:
                    rows = results.merge(rows, [row])
                    results.write(args.json, rows)
    return 1 if wrong else 0


def main(argv=None):
    """The exit code: 0, 1 if an operator fails its check, 2 for wrong arguments."""
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        if args.list:
            for name, benchmark in REGISTRY.items():
                print(f"{name:24}{benchmark.title}")
            return 0
        return run(args, chosen(args, parser), earlier(args, parser))
    except SystemExit as stop:  # from the parser: a caller wants the code
        return stop.code
    except BrokenPipeError:
        # the reader has left (`| head`): nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"deltafuse bench: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deltafuse bench: interrupted", file=sys.stderr)
        return 130
