"""Whole runs: files, reproducibility, and that a stopped run continues as if never stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from deltafuse.cli import main
from deltafuse.models import PRESETS, ModelConfig
from deltafuse.train import checkpoint, commands
from deltafuse.train.progress import Progress
from deltafuse.train.run_folder import RunFolder, read_rows

FLAGS = [
    "--steps",
    "12",
    "--batch",
    "2",
    "--context",
    "32",
    "--eval-every",
    "5",
    "--checkpoint-every",
    "4",
    "--device",
    "cpu",
]


SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=1, num_v_heads=1, head_dim=16, mlp_size=32
)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """A model and a sample that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        patch.setattr(commands, "SAMPLE_BYTES", 4)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"line {i} of some text\n" * 40)
    return folder


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """Folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main(command(text, out)) == 0
    return out


def command(text, out, *more):
    return ["train", "--data", str(text), "--out", str(out), *FLAGS, *more]


def rows_without_times(out):
    rows = read_rows(RunFolder(out).metrics)
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
            for row in rows]  # fmt: skip


def assert_same_run(one, two):
    """Checkpoints and metrics are bitwise equal but for the clock."""
    assert rows_without_times(one) == rows_without_times(two)
    a, b = (checkpoint.load(RunFolder(out).checkpoint) for out in (one, two))
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert {**a.meta, "seconds": 0} == {**b.meta, "seconds": 0}


def test_run_leaves_the_promised_files(unbroken):
    names = {p.relative_to(unbroken).as_posix() for p in unbroken.rglob("*") if p.is_file()}
    checkpoint_file = "checkpoint/state.safetensors"
    assert names == {"config.json", "metrics.jsonl", "loss.png", checkpoint_file}
    rows = read_rows(unbroken / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(list(row) == ["step", "loss", "lr", "tokens_per_second", "seconds"] for row in steps)
    assert [row["step"] for row in validations] == [5, 10, 12]
    assert all(list(row) == ["step", "val_loss", "bits_per_byte"] for row in validations)
    config = json.loads((unbroken / "config.json").read_text())
    assert config["settings"]["steps"] == 12 and config["model"]["vocab_size"] == 256
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_output_ends_with_losses_and_a_sample(text, tmp_path, capsys):
    assert main(command(text, tmp_path / "run", "--compare-reference")) == 0
    out = capsys.readouterr().out
    for part in ("unigram entropy", "validation loss: ", "bits a byte", "--- sample ---"):
        assert part in out
    assert "reference backend: " in out and "times as fast" in out


def test_seed_fixes_everything(text, unbroken, tmp_path):
    assert main(command(text, tmp_path / "same", "--seed", "0")) == 0
    assert_same_run(tmp_path / "same", unbroken)
    assert main(command(text, tmp_path / "other", "--seed", "1")) == 0
    assert rows_without_times(tmp_path / "other")[0] != rows_without_times(unbroken)[0]


@pytest.mark.parametrize("number, optimizer", [(signal.SIGINT, "mars"), (signal.SIGTERM, "adamw")])
def test_signal_saves_and_the_run_continues(text, tmp_path, monkeypatch, capsys, number, optimizer):
    more = ["--optimizer", optimizer]
    before = signal.getsignal(signal.SIGINT)  # a background job of a shell ignores it
    assert main(command(text, tmp_path / "whole", *more)) == 0
    plain = Progress.update

    def interrupt(self, step, *values):
        plain(self, step, *values)
        if step == 6:  # between two checkpoints
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        assert main(command(text, tmp_path / "run", *more)) == 0
    assert f"{number.name}: saved step 6 of 12" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--device", "cpu"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_process_loses_at_most_an_interval(text, unbroken, tmp_path):
    out = tmp_path / "run"
    # training sleeps in step 6, so that the kill falls between two checkpoints
    script = (
        "import sys, time\n"
        "from deltafuse.models import PRESETS, ModelConfig\n"
        f"PRESETS['tiny'] = {SMALL}\n"
        "from deltafuse.train.progress import Progress\n"
        "Progress.update = lambda self, step, *v: time.sleep(600 if step == 6 else 0)\n"
        "from deltafuse.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command(text, out)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while not any(row["step"] == 6 for row in read_rows(out / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.load(RunFolder(out).checkpoint).meta["step"] == 4
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a row that the kill cut off
    assert main(command(text, out, "--resume")) == 0
    assert_same_run(out, unbroken)


def test_run_killed_before_its_first_checkpoint_starts_again(text, unbroken, tmp_path):
    out = tmp_path / "run"
    assert main(command(text, out)) == 0
    RunFolder(out).checkpoint.unlink()
    assert main(command(text, out, "--resume")) == 0
    assert_same_run(out, unbroken)


def test_resume_of_a_finished_run_changes_nothing(text, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert main(command(text, unbroken, "--resume")) == 0
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_ddl_run_stops_continues_and_samples(text, tmp_path, monkeypatch, capsys):
    """Settings, checkpoint and sample of --residual ddl, which has 4 channels by default."""
    more = ["--residual", "ddl"]
    assert main(command(text, tmp_path / "whole", *more)) == 0
    assert "ddl residual of 4 channels" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for part in ("model", "settings"):
        assert (config[part]["residual"], config[part]["value_channels"]) == ("ddl", 4)
    steps = [
        row["loss"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if "loss" in row
    ]
    assert steps[-1] < steps[0]
    plain = Progress.update

    def interrupt(self, step, *values):
        plain(self, step, *values)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        assert main(command(text, tmp_path / "run", *more, "--value-channels", "4")) == 0
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--device", "cpu"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    capsys.readouterr()
    flags = ["generate", str(tmp_path / "run"), "--tokens", "8", "--prompt", "line"]
    assert main([*flags, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("line")


def test_generate_continues_the_prompt(unbroken, capsys):
    flags = ["generate", str(unbroken), "--tokens", "16", "--device", "cpu"]
    assert main([*flags, "--prompt", "line"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("line")
    assert main([*flags, "--prompt", "line"]) == 0
    assert capsys.readouterr().out == first
