"""Products of tiles on tensor cores (csrc/common/cuda), under the emulator."""

import json
import os
import subprocess

import pytest

from conftest import EMULATED, EMULATED_ARCHS

pytestmark = pytest.mark.emulated

MODES = {"plain": {}, "race": {"CUEMU_RACE": "1"}, "shuffled": {"CUEMU_SEED": "1"}}
# sums of products that are exact in each type; floats go as three products of TF32
LIMITS = {"bfloat16": 3e-7, "float16": 3e-7, "float32": 5e-7}
CASES = {"sm80": 16, "sm90a": 12}


def run(arch, **environment):
    program = EMULATED / f"tile_products_{arch}"
    if not program.exists():
        pytest.skip("no emulated build (make emulated)")
    return subprocess.run(
        [program], env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", EMULATED_ARCHS)
def test_products_both_ways_round(arch, mode):
    lines = run(arch, **MODES[mode])
    assert len(lines) == CASES[arch]
    for line in lines:
        assert float(line.split()[-1]) <= LIMITS[line.split()[1]], line


@pytest.mark.parametrize("arch", EMULATED_ARCHS)
def test_fragments_are_read_without_bank_conflicts(arch, tmp_path):
    out = tmp_path / "profile.json"
    run(arch, CUEMU_PROFILE="1", CUEMU_PROFILE_OUT=str(out))
    launches = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(launches) == CASES[arch]
    for launch in launches:
        assert launch["shared_load_wavefronts"] == launch["shared_load_wavefronts_ideal"]
        assert launch["local_loads"] == launch["local_stores"] == 0
