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
from deltafuse.bench import REGISTRY, Case, environment, main, results, table, timing
from deltafuse.bench.gated_delta import TRANSFORMERS
from deltafuse.bench.measure import COMPILED, measure

BENCH = Path(__file__).parent.parent / "bench"
ON_CPU = {name: entry for name, entry in REGISTRY.items() if "cpu" in entry.devices}


@pytest.fixture(scope="module")
def rows():
    """A measurement of every entry at its tiny size."""
    return {
        name: measure(name, entry, entry.tiny, threads=1, rounds=2)
        for name, entry in ON_CPU.items()
    }


@pytest.mark.parametrize("name", ON_CPU)
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
        (["mars", "newton_schulz"], "newton_schulz is not measured with --device cpu"),
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
    place = "cpu" if rows[0]["threads"] else "cuda"
    assert {row["op"] for row in rows} == {n for n, e in REGISTRY.items() if place in e.devices}
    for row in rows:
        assert row["correct"]["ok"] and "ratios" in row, row["op"]
        assert row["git"] and not row["git"].endswith("-dirty")


def test_page_has_all_published_measurements():
    page = (BENCH.parent / "docs" / "benchmarks.md").read_text()
    for path in (BENCH / "results").glob("*.json"):
        for row in results.read(path):
            assert table.markdown(row).strip() in page, "run bench/write_docs.py"
