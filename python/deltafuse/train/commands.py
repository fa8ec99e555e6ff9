"""What `deltafuse train`, `generate` and `info` do once the flags are read."""

import importlib.util
import math
import platform
import sys

import torch

import deltafuse

from .compare import time_backends
from .errors import UserError
from .loop import load_model, open_run
from .plot import draw_losses
from .progress import Progress
from .sample import as_text, generate
from .stop import StopRequest

SAMPLE_BYTES = 400


def need(*modules):
    """UserError if an optional dependency is missing: before the work, not at its end."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: pip install 'deltafuse[train]' brings it"
        )


def choose_device(name):
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch finds no CUDA GPU")
    return torch.device(name)


def train(given, out, resume, device, compare_reference):
    """Trains, or continues to train, and writes the run's files; returns the exit code."""
    need("safetensors", "matplotlib", "numpy")
    run = open_run(given, out, resume, choose_device(device))
    _print_head(run)
    progress = Progress(run.settings.steps, run.step)
    try:
        with StopRequest() as stop:
            run.train(progress, stop)
    finally:
        progress.close()
        run.log.close()
    if run.step < run.settings.steps:
        print(
            f"{stop.name}: saved step {run.step} of {run.settings.steps} in {out}, "
            "--resume continues",
            file=sys.stderr,
        )
        return 0
    _finish(run)
    if compare_reference:
        _compare(run)
    return 0


def _print_head(run):
    corpus, s = run.corpus, run.settings
    size = sum(p.numel() for p in run.model.parameters())
    residual = f"ddl residual of {s.value_channels} channels, " if s.residual == "ddl" else ""
    mixer = f"attention with {s.position}, " if s.mixer == "attention" else ""
    print(
        f"model: {s.preset}, {size / 1e6:.2f} M parameters, {mixer}{residual}{s.optimizer} "
        f"on {run.device.type}"
    )
    print(
        f"data: {corpus.train_files} files, {corpus.train.numel() / 1e6:.2f} MB to train on; "
        f"{corpus.validation_files} files, {corpus.validation.numel() / 1e6:.2f} MB to validate"
    )
    print(f"unigram entropy of the validation text: {_both(corpus.unigram_nats)}")
    if run.step:
        print(f"continuing after step {run.step}")
    sys.stdout.flush()


def _both(nats):
    return f"{nats:.3f} nats, {nats / math.log(2):.3f} bits a byte"


def _finish(run):
    last = [row["val_loss"] for row in run.log.rows if "val_loss" in row][-1]
    title = f"{run.settings.preset}, {run.settings.optimizer}: validation {last:.3f} nats a byte"
    draw_losses(run.folder.picture, run.log.rows, run.corpus.unigram_nats, title)
    rate = run.step * run.settings.batch * run.settings.context / run.seconds
    print(f"validation loss: {_both(last)} (unigram {_both(run.corpus.unigram_nats)})")
    print(f"trained {run.step} steps in {run.seconds:.0f} s, {rate:.0f} tokens/s")
    print(f"written to {run.folder.path}: metrics.jsonl loss.png config.json checkpoint/")
    print("--- sample ---")
    print_stream(generate(run.model, b"", SAMPLE_BYTES, seed=run.settings.seed))
    print("--- end of sample ---", flush=True)


def _compare(run):
    seconds = time_backends(run)
    ratio = seconds["reference"] / seconds["native"]
    tokens = run.settings.batch * run.settings.context
    print(
        f"training step, compiled kernels: {seconds['native'] * 1e3:.0f} ms "
        f"({tokens / seconds['native']:.0f} tokens/s); reference backend: "
        f"{seconds['reference'] * 1e3:.0f} ms ({tokens / seconds['reference']:.0f} tokens/s); "
        f"{ratio:.1f} times as fast"
    )


def print_stream(values):
    """Writes byte values to stdout as text, each as soon as it is there."""
    for piece in as_text(values):
        write(piece)
    write("\n")


def write(text):
    """To stdout at once; characters that its encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def sample(path, prompt, tokens, temperature, top_p, seed, device):
    """`deltafuse generate`: the prompt and its continuation on stdout."""
    need("safetensors", "numpy")
    model = load_model(path, choose_device(device))
    prompt = prompt.encode("utf-8", errors="surrogateescape")
    write(prompt.decode("utf-8", errors="replace"))
    print_stream(generate(model, prompt, tokens, temperature, top_p, seed))
    return 0


def info():
    """`deltafuse info`: versions, hardware, and the backend of each operator."""
    backend = deltafuse.backend_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {
        "deltafuse": deltafuse.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.machine()} {platform.system()}",
        "build": backend["build"],
        "instruction set": backend["cpu_isa"] or "unknown",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "backend": backend["backend"] + (", strict" if backend["strict"] else ""),
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    print(f"\n{'operator':32} {'on cpu':10} on cuda")
    for name, uses in backend["ops"].items():
        print(f"{name:32} {uses['cpu']:10} {uses['cuda']}")
    return 0
