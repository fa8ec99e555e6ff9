"""The machine code of the CUDA kernels: instructions that must and must not be there, registers.

Needs a CUDA build and cuobjdump (CUDA toolkit, or the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm), but no GPU.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import deltafuse

LIBRARY = Path(deltafuse.__file__).with_name("libdeltafuse.so")
GENERAL, HOPPER = ("sm_80", "sm_90"), ("sm_90a",)


class Kernel(NamedTuple):
    """What is asked of the functions whose mangled name matches `name`."""

    name: str
    instances: int  # an architecture
    registers: int  # at most
    contains: tuple
    archs: tuple = GENERAL  # HOPPER: of the files *_sm90.cu


KERNELS = [
    # 5 CTAs of 128 threads an SM need no more than 96 registers, 4 no more than 128
    Kernel(r"decode_kernel.*Lb1ELi\d+ELi[48]E", 9, 96, ("LDG.E.128", "STG.E.128", "LDS.128")),
    Kernel(r"decode_kernel.*Lb0ELi(64ELi[48]|128ELi4)E", 4, 96, ("LDG.E.128", "STG.E.128")),
    Kernel(r"decode_kernel.*Lb0ELi(256ELi[48]|128ELi8)E", 5, 128, ("LDG.E.128", "STG.E.128")),
    Kernel(r"decode_kernel.*ELi256ELi1E", 6, 96, ("LDG.E", "STG.E")),
    # 3 CTAs of 128 threads an SM; with decay channels 2, as backward one of 256 threads
    Kernel(r"recurrent_fwd_kernel.*Lb0E", 9, 168, ("LDG.E.128", "STG.E.128", "LDS.128", "SHFL")),
    Kernel(r"recurrent_fwd_kernel.*Lb1E", 9, 255, ("LDG.E.128", "STG.E.128", "LDS.128", "SHFL")),
    Kernel(r"recurrent_bwd_kernel", 9, 255, ("LDG.E.128", "STG.E.128", "LDS.128", "SHFL.BFLY")),
    Kernel(r"recurrent_(keys|gates)_kernel", 2, 128, ("LDG.E", "STG.E")),
    # rows, taps and sums of 128 bits of channels in registers: 4 CTAs of 128 threads for float and
    # 3 for 16-bit channels or more taps, backward 2
    Kernel(r"conv_fwd_kernel.*IfLb1ELi4E", 1, 128, ("LDG.E.128", "STG.E.128")),
    Kernel(r"conv_fwd_kernel.*f16ELb1ELi4E", 2, 168, ("LDG.E.128", "STG.E.128")),
    Kernel(r"conv_fwd_kernel.*Lb1ELi8E", 3, 168, ("LDG.E", "STG.E")),
    Kernel(r"conv_fwd_kernel.*Lb0ELi[48]E", 6, 64, ("LDG.E", "STG.E")),
    Kernel(r"conv_bwd_kernel.*Lb1ELi4E", 3, 255, ("LDG.E.128", "STG.E.128")),
    Kernel(r"conv_bwd_kernel.*Lb(0ELi[48]|1ELi8)E", 9, 255, ("LDG.E", "STG.E")),
    Kernel(r"conv_(initial|final)_kernel", 6, 128, ("LDG.E", "STG.E")),
    Kernel(r"conv_update_kernel", 3, 64, ("LDG.E", "STG.E", "LDS", "STS")),
    # 4 CTAs of 256 threads an SM, backward and wide rows 2, both 1
    Kernel(r"row_norm_fwd_kernel.*Lb1ELb0E", 3, 64, ("LDG.E.128", "STG.E.128", "SHFL.BFLY")),
    Kernel(r"row_norm_fwd_kernel.*Lb1ELb1E", 3, 128, ("LDG.E.128", "STG.E.128", "SHFL.BFLY")),
    Kernel(r"row_norm_fwd_kernel.*Lb0ELb[01]E", 6, 64, ("LDG.E", "STG.E", "SHFL.BFLY")),
    Kernel(r"row_norm_bwd_kernel.*Lb1ELb0E", 3, 128, ("LDG.E.128", "STG.E.128", "SHFL.BFLY")),
    Kernel(r"row_norm_bwd_kernel.*Lb1ELb1E", 3, 255, ("LDG.E.128", "STG.E.128", "SHFL.BFLY")),
    Kernel(r"row_norm_bwd_kernel.*Lb0ELb[01]E", 6, 128, ("LDG.E", "STG.E", "SHFL.BFLY")),
    Kernel(r"gate_fwd_kernel.*Lb1E", 3, 64, ("STG.E.128",)),
    Kernel(r"gate_bwd_kernel.*Lb1E", 3, 64, ("LDG.E.128",)),
    Kernel(r"gate_(fwd|bwd)_kernel.*Lb0E", 6, 64, ("LDG.E", "STG.E")),
    # the second stage of these kernels', and of other operators', sums
    Kernel(r"column_sums_kernel", 3, 64, ("LDG.E", "STG.E")),
    # two CTAs of 7 + 1 warps an SM; float64 has one
    Kernel(r"mars_kernelIf", 1, 128, ("LDG.E.EF.128", "STG.E.EF.128")),
    Kernel(r"mars_kernelId", 1, 255, ("LDG.E.EF.128", "STG.E.EF.128")),
    Kernel(r"mars_squares_kernel", 2, 128, ("LDG.E.128",)),
    Kernel(r"mars_upload_kernel", 1, 128, ("STG.E",)),
    # two CTAs of 256 threads an SM, and of 288
    Kernel(r"\dproduct_kernel.*Lb1EEEv", 4, 128, ("HMMA.16816.F32", "LDGSTS.E.BYPASS")),
    Kernel(r"\dproduct_kernel.*Lb0EEEv", 4, 128, ("HMMA.16816.F32", "LDSM.16.M88.4")),
    Kernel(r"product_async_kernel", 4, 112, ("HGMMA.64x128x16.F32", "UTMALDG.4D"), HOPPER),
    # 128-bit accesses of the wide tensor, of taps and partial sums; 3 CTAs of 128 threads an SM, 2
    # for sums of 16-bit channels
    Kernel(r"mix_fwd_kernel.*Lb0E", 12, 168, ("LDG.E.128",)),
    Kernel(r"mix_fwd_kernel.*Lb1E", 12, 168, ("LDG.E.128", "STG.E.128")),
    Kernel(r"mix_bwd_kernel", 24, 208, ("LDG.E.128", "STG.E.128")),
    Kernel(r"mix_(fwd_any|bwd_any|final|initial)_kernel", 12, 128, ("LDG.E", "STG.E")),
    Kernel(r"shift_(fwd|bwd|bwd_wide)_kernel.*Lb1E", 9, 128, ("LDG.E.128", "STG.E.128")),
    Kernel(r"shift_(fwd|bwd|bwd_wide)_kernel.*Lb0E", 9, 128, ("LDG.E", "STG.E")),
    Kernel(r"shift_(last|cache)_kernel", 6, 64, ("STG.E",)),
    # two CTAs of 256 threads an SM have 32 KB in flight, more than the latency of memory asks for
    Kernel(r"\drotary_kernel.*Li[48]EL", 6, 128, ("LDG.E.128", "STG.E.128", "LDS")),
    Kernel(r"\drotary_kernel.*Li1EL", 3, 128, ("LDG.E", "STG.E")),
    Kernel(r"rotary_grads_kernel.*Li[48]EL", 6, 128, ("LDG.E.128", "STG.E.128", "SHFL")),
    Kernel(r"rotary_grads_kernel.*Li1EL", 3, 128, ("LDG.E", "STG.E", "SHFL")),
    Kernel(r"rotary_sum_kernel", 1, 64, ("LDG.E.64",)),
    Kernel(r"phase_[fb]wd_kernel", 2, 128, ("SHFL.UP", "STG.E.64")),
    # 4 CTAs of 128 threads an SM; where sums stay in registers and for products 3
    Kernel(r"frame_fwd_kernel.*Lb1E", 9, 128, ("LDG.E.128", "STG.E.128", "LDS.128", "DFMA")),
    Kernel(r"frame_fwd_kernel.*Lb0E", 3, 128, ("LDG.E", "STG.E", "LDS.128", "DFMA")),
    Kernel(r"frame_bwd_kernel.*Lb1EEELi0E", 9, 128, ("LDG.E.128", "STG.E.128", "LDS.128")),
    Kernel(r"frame_bwd_kernel.*Lb1EEELi[124]E", 18, 168, ("LDG.E.128", "STG.E.128", "LDS.128")),
    Kernel(r"frame_bwd_kernel.*Lb0EEELi0E", 3, 128, ("LDG.E", "STG.E", "LDS.128")),
    Kernel(r"frame_mma_kernel.*ELi2E.*Lb0E", 2, 168, ("HMMA.16816.F32", "LDG.E.128", "LDS.128")),
    Kernel(r"frame_mma_kernel.*ELi(4E|2E.*Lb1E)", 6, 255, ("HMMA.16816.F32", "LDG.E.128")),
    Kernel(r"frame_products_mma_kernel", 4, 168, ("HMMA.16816.F32", "LDSM.16.MT88", "LDG.E.128")),
    Kernel(r"frame_products_kernel", 12, 168, ("LDG.E.128", "LDS.128")),
    Kernel(r"frame_channels_kernel", 6, 64, ("LDG.E", "STG.E", "DFMA")),
    Kernel(r"frame_pairs_kernel", 1, 128, ("LDG.E.128", "STG.E.128")),
    Kernel(r"frame_(sum|skew)_kernel", 2, 64, ("LDG.E", "STG.E")),
    # one CTA an SM: of 16 warps; backward by features and channels an item also of 12 and 8
    Kernel(r"boundary_fwd_kernel", 15, 128, ("LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128")),
    Kernel(r"boundary_fwd_whole_kernel", 45, 128, ("LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128")),
    Kernel(r"boundary_bwd_kernel.*(IfLi[248]E|f16ELi[48]E)", 7, 128, ("LDGSTS.E.BYPASS.128",)),
    Kernel(r"boundary_bwd_kernel.*(IfLi1E|f16ELi2E)", 3, 168, ("LDGSTS.E.BYPASS.128", "LDS.128")),
    Kernel(r"boundary_bwd_kernel.*(f16ELi1E|Li16E)", 5, 255, ("LDGSTS.E.BYPASS.128", "LDS.128")),
    Kernel(r"boundary_finish_kernel", 1, 40, ("LDG.E", "STG.E")),
    # five CTAs an SM, K = 256: three
    Kernel(r"chunk_inverse.*ELi(64|128)E", 4, 96, ("HMMA.1688.F32.TF32", "LDSM.16")),
    Kernel(r"chunk_inverse.*ELi256E", 2, 168, ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
    # one CTA an SM, of 384 threads (two state warpgroups) or of 256
    Kernel(r"chunk_fwd.*Sm80.*f16ELi\d+ELi2E", 6, 168, ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")),
    Kernel(r"chunk_fwd.*Sm80.*f16ELi\d+ELi1E", 12, 255, ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")),
    Kernel(r"chunk_fwd.*Sm80EfLi\d+ELi2E", 2, 168, ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
    Kernel(r"chunk_fwd.*Sm80EfLi\d+ELi1E", 3, 255, ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
    Kernel(r"chunk_fwd.*Sm90.*ELi\d+ELi2E", 8, 168, ("HGMMA.64x64x16", "UTMALDG.4D"), HOPPER),
    Kernel(r"chunk_fwd.*Sm90.*ELi(64|128)ELi1E", 8, 255, ("HGMMA.64x64x16", "UTMALDG.4D"), HOPPER),
    Kernel(r"chunk_fwd.*Sm90.*ELi256ELi1E", 4, 255, ("HGMMA.64x64x16", "UTMALDG.4D"), HOPPER),
    Kernel(r"bwd_states.*Sm80.*f16ELi(64|128)E", 4, 168, ("HMMA.16816.F32", "STG.E.128")),
    Kernel(r"bwd_states.*Sm80.*f16ELi256E", 2, 255, ("HMMA.16816.F32", "STG.E.128")),
    Kernel(r"bwd_states.*Sm80.*IfLi64E", 1, 168, ("HMMA.1688.F32.TF32", "STG.E.128")),
    Kernel(r"bwd_states.*Sm80.*IfLi128E", 1, 232, ("HMMA.1688.F32.TF32", "STG.E.128")),
    Kernel(r"bwd_states.*Sm80.*IfLi256E", 1, 255, ("HMMA.1688.F32.TF32", "STG.E.128")),
    Kernel(r"bwd_states.*Sm90.*Li(64|128)E", 4, 168, ("HGMMA.64x64x16", "STSM.16.M88.4"), HOPPER),
    Kernel(r"bwd_states.*Sm90.*Li256E", 2, 255, ("HGMMA.64x64x16", "UTMALDG.4D"), HOPPER),
    Kernel(r"chunk_scan.*Li\d+ELi2E", 4, 136, ("HMMA.1688.F32.TF32", "LDS.128", "LDGSTS.E.BYPASS")),
    Kernel(r"chunk_scan.*Li\d+ELi1E", 4, 184, ("HMMA.1688.F32.TF32", "LDS.128", "LDGSTS.E.BYPASS")),
    # one CTA of 8 or 4 warps an SM: dQ and dK of K = 256 take half of the registers
    Kernel(r"chunk_grads.*Sm80.*f16E", 8, 255, ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")),
    Kernel(r"chunk_grads.*Sm80Ef", 4, 255, ("HMMA.1688.F32.TF32", "STG.E.128")),
    # three warpgroups: 232 registers for two of them
    Kernel(r"chunk_grads.*Sm90.*Li64E", 2, 168, ("HGMMA.64x64x16", "USETMAXREG"), HOPPER),
    Kernel(r"chunk_grads.*Sm90.*Li128E", 2, 168, ("HGMMA.64x128x16",), HOPPER),
    Kernel(r"chunk_grads.*Sm90.*Li(192|256)E", 4, 255, ("HGMMA.64x128x16",), HOPPER),
    Kernel(r"chunk_bwd_sums_kernel", 1, 40, ("SHFL.BFLY", "DADD")),
    Kernel(r"chunk_zero_tail_kernel", 1, 64, ("STG.E.128",)),
]
FORBIDDEN = ("LDL", "STL")


def find(tool):
    """A tool on the PATH, in the usual place of the toolkit or in its Python package."""
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    folders += [str(p) for entry in sys.path for p in Path(entry).glob("nvidia/*/bin")]
    return shutil.which(tool, path=os.pathsep.join(folders))


@pytest.fixture(scope="module")
def dump():
    """dump(option): the text that cuobjdump prints about the library."""
    if not deltafuse.has_cuda():
        pytest.skip("a build without CUDA kernels")
    tool, disassembler = find("cuobjdump"), find("nvdisasm")
    if not (tool and disassembler):
        pytest.skip("no cuobjdump and nvdisasm")
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ["PATH"]])

    def run(option):
        return subprocess.run(
            [tool, option, LIBRARY],
            env={**os.environ, "PATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    return run


@pytest.fixture(scope="module")
def usage(dump):
    """{(architecture, function): {"REG": registers, "STACK": bytes, ...}}."""
    functions, arch = {}, None
    text = dump("-res-usage")
    for line in re.findall(r"arch = \w+|Function [^:]+:\s*\n?[^\n]*", text):
        if line.startswith("arch"):
            arch = line.split()[-1]
        else:
            name, values = line[len("Function ") :].split(":", 1)
            functions[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", values)}
    return functions


@pytest.fixture(scope="module")
def code(dump):
    """{(architecture, function): its instructions}."""
    functions, arch = {}, None
    for part in re.split(r"(?=arch = |Function : )", dump("-sass")):
        head = part.split("\n", 1)[0]
        if head.startswith("arch"):
            arch = head.split()[-1]
        elif head.startswith("Function"):
            functions[arch, head.split()[-1]] = part
    return functions


def matching(functions, kernel):
    found = {key: value for key, value in functions.items() if re.search(kernel.name, key[1])}
    assert {arch for arch, _ in found} == set(kernel.archs)
    assert len(found) == kernel.instances * len(kernel.archs)
    return found


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_registers_and_no_stack(usage, kernel):
    for key, used in matching(usage, kernel).items():
        assert used["REG"] <= kernel.registers, key
        assert used["STACK"] == used["LOCAL"] == 0, key


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_instructions(code, kernel):
    for key, text in matching(code, kernel).items():
        for instruction in kernel.contains:
            assert instruction in text, (key, instruction)
        for instruction in FORBIDDEN:
            assert not re.search(rf"\b{instruction}\b", text), (key, instruction)


def test_every_kernel_is_in_the_table(usage):
    listed = [key for kernel in KERNELS for key in usage if re.search(kernel.name, key[1])]
    assert sorted(listed) == sorted(usage)
