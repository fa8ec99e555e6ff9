"""Bad input of the command: one line on stderr, exit code 2, nothing overwritten."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import types

import pytest

from deltafuse.cli import PRESETS, main
from deltafuse.models import PRESETS as MODEL_PRESETS
from deltafuse.models import ModelConfig
from deltafuse.train import commands
from deltafuse.train.errors import UserError
from deltafuse.train.run_folder import RunFolder

FLAGS = [
    "--steps",
    "4",
    "--batch",
    "1",
    "--context",
    "16",
    "--checkpoint-every",
    "2",
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
        patch.setitem(MODEL_PRESETS, "tiny", SMALL)
        patch.setattr(commands, "SAMPLE_BYTES", 4)
        yield


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text to learn\n" * 30)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("some text to learn\n" * 30)
    out = folder / "run"
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def refuse(capsys, arguments, *parts):
    """The command must end with code 2 and one line that has the parts."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("step ")]
    assert code == 2, captured
    assert len(lines) == 1, captured.err
    for part in parts:
        assert part in lines[0]


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--steps", "0"], ["--steps", "must be a whole number >= 1, got 0"]),
        (["--steps", "many"], ["--steps", "must be a whole number"]),
        (["--lr", "nan"], ["--lr", "must be a number"]),
        (["--lr", "-1"], ["--lr must be a positive number"]),
        (["--seed", "-3"], ["--seed"]),
        (["--preset", "huge"], ["--preset", "huge"]),
        (["--optimizer", "sgd"], ["--optimizer", "sgd"]),
        (["--residual", "hyper"], ["--residual", "hyper"]),
        (["--value-channels", "4"], ["--value-channels must be 1 without --residual ddl"]),
        (["--residual", "ddl", "--value-channels", "17"], ["--value-channels", "1 .. 16"]),
        (["--mixer", "conv"], ["--mixer", "conv"]),
        (["--position", "rope"], ["--position must be left out without --mixer attention"]),
        (["--mixer", "attention", "--position", "alibi"], ["--position", "alibi"]),
        (["--colour", "red"], ["--colour"]),
        (["--step", "3"], ["--step"]),
    ],
)
def test_bad_flags_of_train(capsys, text, tmp_path, flags, parts):
    out = tmp_path / "run"
    refuse(capsys, ["train", "--data", text, "--out", out, *flags], "deltafuse", *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--tokens", "-1"], "--tokens"),
        (["--tokens", "2.5"], "--tokens"),
    ],
)
def test_bad_flags_of_generate(capsys, run, flags, part):
    refuse(capsys, ["generate", run, *flags], part)


def test_missing_and_unknown_command(capsys):
    refuse(capsys, [], "COMMAND")
    refuse(capsys, ["fly"], "fly")


def test_bad_data(capsys, tmp_path):
    out = tmp_path / "run"
    refuse(capsys, ["train", "--data", tmp_path / "no", "--out", out], "no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(capsys, ["train", "--data", empty, "--out", out], "empty corpus")
    short = tmp_path / "short.txt"
    short.write_text("short")
    refuse(capsys, ["train", "--data", short, "--out", out], "shorter than one context")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\0\1\2" * 100)
    refuse(capsys, ["train", "--data", binary, "--out", out], "binary file", str(binary))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xe9t\xe9 " * 100)
    refuse(capsys, ["train", "--data", latin, "--out", out], "not UTF-8", str(latin))
    assert not out.exists()


def test_run_is_not_overwritten(capsys, text, run):
    before = snapshot(run)
    refuse(capsys, ["train", "--data", text, "--out", run, *FLAGS], "already holds a run")
    assert snapshot(run) == before


def test_out_that_cannot_be_a_folder(capsys, text, tmp_path):
    refuse(capsys, ["train", "--data", text, "--out", text], "is a file")
    refuse(capsys, ["train", "--data", text, "--out", text / "below", *FLAGS], "below")


def test_resume_with_other_settings_names_the_difference(capsys, run):
    before = snapshot(run)
    base = ["train", "--out", run, "--resume"]
    refuse(capsys, [*base, "--steps", "9"], "--steps 9 differs", "which has 4")
    refuse(capsys, [*base, "--optimizer", "adamw"], "--optimizer adamw differs", "mars")
    refuse(capsys, [*base, "--seed", "5"], "--seed 5 differs")
    refuse(capsys, [*base, "--residual", "ddl"], "--residual ddl differs", "which has plain")
    refuse(capsys, [*base, "--mixer", "attention"], "--mixer attention differs", "has gated_delta")
    assert snapshot(run) == before


def test_run_from_before_residuals_and_mixers_is_still_read(capsys, run):
    config = json.loads((run / "config.json").read_text())
    for part in ("model", "settings"):
        for name in ("residual", "value_channels", "mixer", "position"):
            del config[part][name]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["generate", str(run), "--tokens", "2", "--device", "cpu"]) == 0
    assert main(["train", "--out", str(run), "--resume", "--device", "cpu"]) == 0
    old = types.SimpleNamespace(meta={"model": config["model"]})
    RunFolder(run).check_same_model(old, SMALL)
    with pytest.raises(UserError, match="residual is plain"):
        RunFolder(run).check_same_model(old, dataclasses.replace(SMALL, residual="ddl"))


def test_resume_without_a_run(capsys, text, tmp_path):
    refuse(capsys, ["train", "--data", text, "--out", tmp_path / "no", "--resume"], "no such run")
    (tmp_path / "empty").mkdir()
    refuse(capsys, ["train", "--out", tmp_path / "empty", "--resume"], "no run to continue")


def test_resume_with_changed_data(capsys, run):
    config = json.loads((run / "config.json").read_text())
    config["corpus"]["sha256"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    refuse(capsys, ["train", "--out", run, "--resume"], "data is not what")


def test_damaged_checkpoint(capsys, run):
    path = RunFolder(run).checkpoint
    good = path.read_bytes()
    for bad in (good[:-10], good[:100], b"", b"x" * 1000):
        path.write_bytes(bad)
        refuse(capsys, ["generate", run], "corrupt", str(path))
    flipped = bytearray(good)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    refuse(capsys, ["train", "--out", run, "--resume"], "checksum does not match")
    assert path.read_bytes() == flipped


def test_checkpoint_of_another_config(capsys, run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["num_layers"] = 3
    (run / "config.json").write_text(json.dumps(config))
    for arguments in (["generate", run], ["train", "--out", run, "--resume"]):
        refuse(capsys, arguments, "checkpoint of another config: num_layers is 2", "3 in")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"model": {"a": 1}}'])
def test_damaged_config(capsys, run, content):
    (run / "config.json").write_text(content)
    refuse(capsys, ["generate", run], "config.json is not the config of a run")


def test_generate_without_a_run(capsys, tmp_path):
    refuse(capsys, ["generate", tmp_path / "nowhere"], "no such run folder", "nowhere")
    refuse(capsys, ["generate", tmp_path], "config.json")


def test_full_disk_keeps_the_last_checkpoint(capsys, text, tmp_path):
    """The limit lets the small files through and stops the checkpoint, as a small disk would."""
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        arguments = ["train", "--data", text, "--out", out, *FLAGS]
        refuse(capsys, arguments, "cannot write", "state.safetensors: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((out / "checkpoint").iterdir()) == []
    assert main(["train", "--out", str(out), "--resume", "--device", "cpu"]) == 0


def test_missing_optional_dependency_is_named(capsys, monkeypatch, text, tmp_path):
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else plain(name)
    )
    arguments = ["train", "--data", text, "--out", tmp_path / "run", *FLAGS]
    refuse(capsys, arguments, "matplotlib not installed: pip install 'deltafuse[train]'")
    assert not (tmp_path / "run").exists()


def test_diverged_loss_is_reported(capsys, text, tmp_path):
    arguments = ["train", "--data", text, "--out", tmp_path / "run", *FLAGS, "--lr", "1e30"]
    refuse(capsys, arguments, "the loss is", "smaller --lr")


def test_info_lists_versions_and_operators(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("deltafuse", "torch", "instruction set", "threads", "gated_delta_fwd"):
        assert part in out


def test_help_of_every_command(capsys):
    for arguments in (["--help"], ["train", "--help"], ["generate", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
    assert "--temperature" in capsys.readouterr().out


def test_presets_of_the_flag_are_those_of_the_models():
    assert set(PRESETS) == set(MODEL_PRESETS)


def test_bench_gets_the_remaining_arguments(monkeypatch):
    fake = types.ModuleType("deltafuse.bench")
    fake.main = lambda argv: (argv, 7)
    monkeypatch.setitem(sys.modules, "deltafuse.bench", fake)
    assert main(["bench", "mars", "--threads", "1"]) == (["mars", "--threads", "1"], 7)


def test_reader_that_leaves_is_no_error(run):
    """As in `deltafuse generate RUN | head -c 1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltafuse.cli", "generate", str(run), "--tokens", "3000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
