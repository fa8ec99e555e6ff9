"""Benchmarks: every entry runs, a wrong operator gets no ratio, files, arguments."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deltafuse import _library
from deltafuse.bench import (
    REGISTRY,
    Case,
    environment,
    gated_delta_gpu,
    main,
    results,
    table,
    timing,
)
from deltafuse.bench.gated_delta import TRANSFORMERS
from deltafuse.bench.measure import COMPILED, measure
from deltafuse.bench.registry import meant_for

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def rows():
    """A measurement of every entry at its tiny size."""
    return {
        name: measure(name, REGISTRY[name], REGISTRY[name].tiny, threads=1, rounds=2)
        for name in meant_for("cpu")
    }


@pytest.mark.parametrize("name", meant_for("cpu"))
def test_entry_measures_a_correct_kernel(rows, name):
    row, entry = rows[name], REGISTRY[name]
    assert row["correct"]["ok"], row["correct"]
    assert row["backend"] == "cpu"
    assert row["ratios"].keys() == row["seconds"].keys() - {"ours"}
    for name, _ in entry.targets:
        if name != COMPILED and (name != TRANSFORMERS or find_spec(TRANSFORMERS)):
            assert name in row["ratios"], "the target names a measured row"
    for sample in row["seconds"].values():
        assert 0 < sample["minimum"] <= sample["median"] and sample["rounds"] == 2
        assert sample["cores"] > 0


def test_counts_of_the_measured_sizes():
    (chunk,), (mars,) = REGISTRY["gated_delta_fwd"].shapes, REGISTRY["mars"].shapes
    tokens = chunk["T"] * chunk["H"]
    assert REGISTRY["gated_delta_fwd"].flops(chunk) / tokens == pytest.approx(166.6e3, rel=1e-3)
    training = (166.6 + 393.2 + 81.9) * 1e3
    assert REGISTRY["gated_delta_fwd_bwd"].flops(chunk) / tokens == pytest.approx(training, 1e-3)
    assert REGISTRY["mars"].bytes(mars) == 36 * 124_439_808, "GPT-2 small has 124.4 M parameters"


def test_counts_of_the_published_gpu_sizes():
    """Rows A, B and the backward of B of gated_delta.md 4.1 (which rounds B up to 161 GFLOP)."""
    forward, backward = REGISTRY["gated_delta_prefill"], REGISTRY["gated_delta_backward"]
    A, B = ({"H": 16, "HV": HV, "N": 1, "T": 32768, "first": 0} for HV in (64, 32))
    assert A in forward.shapes and B in forward.shapes and B in backward.shapes
    assert forward.flops(A) == pytest.approx(298e9, rel=2e-3)
    assert forward.bytes(A) == pytest.approx(1.36e9, rel=2e-3)
    assert forward.flops(B) == pytest.approx(157.5e9, rel=2e-3)
    assert forward.bytes(B) == pytest.approx(0.81e9, rel=1e-2)
    assert backward.flops(B) == pytest.approx(498e9, rel=2e-3)
    second_half_of_pairs = 2 * 64 * 32768 * 32
    assert backward.bytes(B) - second_half_of_pairs == pytest.approx(2.57e9, rel=1e-2)


@pytest.mark.parametrize("name", gated_delta_gpu.ENTRIES)
def test_goal_is_judged_by_the_median(name):
    entry = REGISTRY[name]
    assert entry.goal(entry.shapes[0]) in (1e-3, 2e-3) and entry.goal(entry.tiny) is None
    row = measure(name, entry, entry.tiny, rounds=1)
    assert row["correct"]["ok"] and "goal" not in row and "goal" not in table.text(row)
    for goal, word in ((1e3, "met"), (1e-9, "missed")):
        changed = row | {"goal": goal, "threads": None}
        assert table.text(changed).endswith(f"goal: {table.duration(goal)}, {word}")


def fake(check, kernel="gated_delta_fwd"):
    entry = REGISTRY["gated_delta_fwd"]
    case = Case(ours=lambda: None, reference=lambda: None, check=check)
    return dataclasses.replace(entry, kernel=kernel, make=lambda shape, device: case)


@pytest.mark.parametrize("value", [1.1, math.nan])
def test_wrong_operator_gets_no_ratio(value, monkeypatch, capsys):
    pairs = [("good", torch.ones(3), torch.ones(3), 1e-5)]
    pairs.append(("o", torch.tensor([1.0, value]), torch.ones(2), 1e-5))
    monkeypatch.setitem(REGISTRY, "wrong", fake(lambda: pairs))
    assert main(["wrong", "--threads", "1", "--repeat", "1", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "no ratios: o differs from the reference" in out
    assert not re.search(r"\d+x", out.split("minimum / ours")[1])


def test_operator_without_comparison_gets_no_ratio():
    assert "ratios" not in measure("none", fake(list), {"T": 1, "H": 1, "B": 1, "K": 1, "V": 1})


def test_reference_backend_gets_no_ratio():
    entry = REGISTRY["gated_norm"]
    with _library.use("reference"):
        row = measure("gated_norm", entry, entry.tiny, rounds=1)
    assert row["backend"] == "reference" and "ratios" not in row
    assert "no compiled kernel" in table.text(row)


def test_functions_take_turns_and_threads_are_set(threads):
    calls = []

    def function(name):
        return lambda: calls.append((name, torch.get_num_threads())) or timing.time.sleep(6e-3)

    threads(1)
    with timing.threads(2):
        samples = timing.interleave({name: function(name) for name in "ab"}, rounds=3)
    assert torch.get_num_threads() == 1
    assert {count for _, count in calls} == {2}
    # two warm-up calls each, then three rounds with the first place changing
    assert "".join(name for name, _ in calls) == "aabb" + "ab" + "ba" + "ab"
    assert samples["a"].minimum >= 6e-3 and samples["a"].rounds == 3


def test_json_file_keeps_other_rows_and_replaces_measured_ones(tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--threads", "1", "--repeat", "1", "--quick", "--json", str(path)]
    assert main(["gated_norm", *arguments]) == 0
    first = results.read(path)
    assert main(["short_conv", "gated_norm", *arguments]) == 0
    second = results.read(path)
    assert [row["op"] for row in second] == ["gated_norm", "short_conv"]
    assert second[0]["seconds"] != first[0]["seconds"]
    row = second[0]
    assert row.keys() - {"ratios"} == results.FIELDS
    assert row["versions"]["torch"] == torch.__version__
    assert row["isa"] == _library.cpu_isa() and row["threads"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    assert "gated_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_op"], "unknown operator 'no_such_op'"),
        ([], "name operators"),
        (["mars", "--all"], "--all takes no names"),
        (["mars", "--threads", "0"], "argument --threads"),
        (["mars", "--repeat", "x"], "argument --repeat"),
        (["mars", "--device", "tpu"], "argument --device"),
        (["mars", "--json", "{tmp}/none/x.json"], "--json: cannot write"),
        (["mars", "--json", "{tmp}"], "not a file of measurements"),
        (["mars", "--json", "{tmp}/broken.json"], "not a file of measurements"),
        (["mars", "--json", "{tmp}/other.json"], "a row lacks fields"),
        (["mars", "--bad-flag"], "unrecognized arguments"),
        (["mars", "newton_schulz"], "newton_schulz is measured with --device cuda"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('{"rows": [1')
    (tmp_path / "other.json").write_text(json.dumps({"rows": [{"op": "mars"}]}))
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.endswith("\n")
    assert (tmp_path / "broken.json").read_text() == '{"rows": [1', "nothing is overwritten"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu(capsys):
    assert main(["mars", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "deltafuse bench: --device cuda: no GPU here\n"


def test_list(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(REGISTRY)


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "deltafuse.bench", "no_such_op"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("deltafuse bench: unknown operator")


def test_file_name_is_of_the_device():
    name = environment.file_name("cpu")
    assert name == name.lower() and name.endswith("-cores") and " " not in name


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda p: p.name)
def test_published_measurements_are_of_correct_kernels(path):
    rows = results.read(path)
    device = "cpu" if rows[0]["isa"] else "cuda"
    measured, all_of_them = {row["op"] for row in rows}, set(meant_for(device))
    assert measured == all_of_them if device == "cpu" else measured <= all_of_them
    for row in rows:
        assert row["correct"]["ok"] and "ratios" in row, row["op"]
        assert row["git"] and not row["git"].endswith("-dirty")


def test_page_has_all_published_measurements():
    page = (BENCH.parent / "docs" / "benchmarks.md").read_text()
    for path in (BENCH / "results").glob("*.json"):
        for row in results.read(path):
            assert table.markdown(row).strip() in page, "run bench/write_docs.py"
