"""The `deltafuse` command. Torch is imported once a command runs, not for help or bad flags."""

import argparse
import os
import sys
from pathlib import Path

from .train.errors import UserError, describe

PRESETS = ("tiny", "small", "medium")


class Parser(argparse.ArgumentParser):
    """Mistakes are one line and exit code 2; abbreviations of flags are mistakes, too."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low=None, high=None):
    """A type for argparse: int or float within [low, high]."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        name = "a whole number" if kind is int else "a number"
        if value is None or value != value:
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f">= {low}" if high is None else f"in {low} .. {high}"
            raise argparse.ArgumentTypeError(f"must be {name} {bounds}, got {text}")
        return value

    return convert


def make_parser():
    parser = Parser(prog="deltafuse", description="Gated DeltaNet language models on own kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
    commands.add_parser("info", help="versions, instruction set, backend of each operator")
    commands.add_parser("bench", help="time an operator: deltafuse bench OP", add_help=False)
    return parser


def _add_train(commands):
    p = commands.add_parser("train", help="train a byte-level language model on text")
    positive, seed = number(int, 1), number(int, 0, 2**32 - 1)
    p.add_argument("--data", nargs="+", metavar="PATH", help="text files or folders "
                   "(default: the standard library's sources)")  # fmt: skip
    p.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the run "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--preset", choices=PRESETS, help="size of the model (default: tiny)")
    p.add_argument("--optimizer", choices=("mars", "mars-m", "adamw"), help="default: mars")
    p.add_argument("--residual", choices=("plain", "ddl"), help="x + f(x), or the rewrite of Deep "
                   "Delta Learning (default: plain)")  # fmt: skip
    p.add_argument("--value-channels", type=number(int, 1, 16), metavar="N",
                   help="of the ddl residual stream (default: 4)")  # fmt: skip
    p.add_argument("--mixer", choices=("gated_delta", "attention"), help="sequence mixer of the "
                   "layers (default: gated_delta)")  # fmt: skip
    p.add_argument("--position", choices=("rope", "grape-m", "grape-m-ctx", "grape-mixture"),
                   help="position encoding of --mixer attention (default: rope)")  # fmt: skip
    p.add_argument("--steps", type=positive, metavar="N")
    p.add_argument("--batch", type=positive, metavar="N", help="sequences a step")
    p.add_argument("--context", type=positive, metavar="N", help="bytes a sequence")
    p.add_argument("--lr", type=number(float), metavar="LR", help="peak learning rate")
    p.add_argument("--beta1", type=number(float), metavar="B", help="first moment (default: 0.9)")
    p.add_argument("--seed", type=seed, metavar="N", help="default: 0")
    p.add_argument("--eval-every", type=positive, metavar="N", help="steps (default: 100)")
    p.add_argument("--checkpoint-every", type=positive, metavar="N", help="steps (default: 100)")
    p.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--compare-reference", action="store_true",
                   help="at the end, time a step with the PyTorch reference, too")  # fmt: skip


def _add_generate(commands):
    p = commands.add_parser("generate", help="write text with a trained model")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a run (train's --out)")
    p.add_argument("--prompt", default="", metavar="TEXT")
    p.add_argument("--tokens", type=number(int, 0), default=400, metavar="N",
                   help="bytes to write (default: %(default)s)")  # fmt: skip
    p.add_argument("--temperature", type=number(float, 0, 100), default=0.8, metavar="T",
                   help="0: always the most likely byte (default: %(default)s)")  # fmt: skip
    p.add_argument("--top-p", type=number(float, 0, 1), default=1.0, metavar="P")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N")
    p.add_argument("--device", choices=("cpu", "cuda"))


SETTINGS = ("preset", "optimizer", "steps", "batch", "context", "lr", "beta1", "seed",
            "eval_every", "checkpoint_every", "compile", "residual", "value_channels", "mixer",
            "position")  # fmt: skip


def run(args):
    if args.command == "train":
        given = {name: getattr(args, name) for name in SETTINGS}
        if args.data:
            given["data"] = tuple(str(Path(path).resolve()) for path in args.data)
        given = {name: value for name, value in given.items() if value is not None}
        from .train import commands

        return commands.train(given, args.out, args.resume, args.device, args.compare_reference)
    from .train import commands

    if args.command == "info":
        return commands.info()
    return commands.sample(
        args.checkpoint,
        args.prompt,
        args.tokens,
        args.temperature,
        args.top_p,
        args.seed,
        args.device,
    )


def main(argv=None):
    """The exit code: 0, 2 for what the user can put right, 130 for a second Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        from .bench import main as bench

        return bench(argv[1:])
    args = make_parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # the reader has left (`| head`): nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = describe(error)
    except KeyboardInterrupt:
        message = "interrupted"
        print(f"deltafuse {args.command}: {message}", file=sys.stderr)
        return 130
    print(f"deltafuse {args.command}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
