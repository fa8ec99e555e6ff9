"""The CUDA kernels of learned rotations, on the emulator: every variant, races, bytes moved."""

import pytest
import torch

from deltafuse import _library, grape
from grape_frame_cases import BF16, F16, F32, F64, check, mixture_inputs, normal, run
from test_grape_frame import basis_inputs, frame_inputs

pytestmark = pytest.mark.emulated

MODES = {
    "race": {"race": True},
    "race, shuffled 1": {"race": True, "seed": 1},
    "race, shuffled 2": {"race": True, "seed": 2},
    "strict": {"strict": True},
}
# B, T, H, D, r and dtype: each group of lanes, and each way through the backward pass
CASES = {
    "8 lanes, 1 plane": ((1, 70, 2, 64, 1), BF16),
    "8 lanes, 2 planes": ((2, 37, 1, 40, 2), F32),
    "8 lanes, 3 planes": ((1, 35, 1, 32, 3), F16),
    "8 lanes, many planes": ((1, 35, 1, 64, 32), F32),
    "16 lanes, 1 plane": ((1, 40, 1, 128, 1), F32),
    "16 lanes, 2 planes": ((1, 33, 2, 128, 2), F16),
    "16 lanes, 4 planes": ((1, 33, 1, 128, 4), BF16),
    "16 lanes, a tail": ((1, 33, 1, 120, 3), BF16),
    "16 lanes, chunks of planes": ((1, 9, 1, 128, 40), F32),
    "tensor cores, 8 planes": ((2, 33, 2, 128, 8), BF16),
    "tensor cores, 5 planes": ((1, 70, 1, 120, 5), F16),
    "tensor cores, D <= 64": ((1, 17, 3, 40, 20), BF16),
    "tensor cores, more shared memory": ((1, 17, 1, 128, 30), F16),
    "tensor cores, 2 r = D": ((1, 17, 1, 64, 32), F16),
    "32 lanes, 1 plane": ((1, 17, 1, 256, 1), BF16),
    "32 lanes, chunks of planes": ((1, 9, 1, 192, 20), F32),
    "single elements": ((1, 33, 2, 33, 2), F32),
    "single elements, many planes": ((1, 9, 1, 130, 18), BF16),
    "several spans": ((1, 600, 8, 16, 1), F32),
}
BYTES = ["8 lanes, 1 plane", "16 lanes, 4 planes", "32 lanes, 1 plane", "tensor cores, 8 planes"]
each_case = pytest.mark.parametrize("case", CASES)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@each_case
@pytest.mark.parametrize("name", ["mixture", "frame"])
def test_each_variant(emulated, name, case):
    shape, dtype = CASES[case]
    if name == "mixture":
        check(grape.mixture_rotate, mixture_inputs(*shape, dtype=dtype), dtype)
    else:
        check(grape.frame_rotate, frame_inputs(*shape, dtype=dtype), dtype)


@each_case
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_in_every_mode(emulated_with, mode, case):
    shape, dtype = CASES[case]
    if mode.get("seed") and shape[1] > 100:
        pytest.skip("long; the other modes run it")
    with emulated_with(**mode):
        check(grape.mixture_rotate, mixture_inputs(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_channels_in_every_mode(emulated_with, mode):
    q, _, *rest = basis_inputs(2, 19, 2, 72, F32)
    with emulated_with(**mode):
        check(lambda *v: grape.basis_rotate(v[0], None, *v[1:]), [q, *rest], F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_channels_behind_the_planes_are_copied(emulated, dtype):
    x, t = normal(1, 9, 2, 70, dtype=dtype), normal(1, 9)
    y = torch.ops.deltafuse_emulated_sm80.grape_frame_fwd(x, None, normal(2, 33), t)
    assert torch.equal(y[..., 66:], x[..., 66:]) and not torch.equal(y[..., :66], x[..., :66])


@pytest.mark.parametrize("case", BYTES)
def test_forward_moves_the_fewest_bytes(emulated, case):
    shape, dtype = CASES[case]
    x, W, theta, t = frame_inputs(*shape, dtype=dtype)
    W, theta, t = W.double(), theta.double(), t.double()
    with emulated.profile() as launches:
        y = grape.frame_rotate(x, W, theta, t)
    (launch,) = launches
    assert launch["unique_bytes_read"] == size(x, W, theta, t)
    assert launch["unique_bytes_written"] == size(y)
    assert launch["local_loads"] == launch["local_stores"] == 0
    # of rows no sector twice; what is read again is W, once a CTA (thrice in the order of
    # fragments), and positions
    passes = 3 if "tensor" in case else 1
    once, tokens = size(x) // 32, x.shape[0] * x.shape[1] * x.shape[2]
    sectors = launch["global_load_sectors"]
    assert sectors <= 1.05 * once + launch["grid"][0] * (passes * size(W, theta) // 32 + 8) + tokens
    assert launch["global_store_sectors"] <= 1.05 * size(y) / 32
    loads = launch["shared_load_wavefronts"]
    assert loads <= 1.1 * launch["shared_load_wavefronts_ideal"]


@pytest.mark.parametrize("dtype, limit", [(F16, 2e-4), (BF16, 1.5e-3)], ids=str)
def test_tensor_cores_keep_norms(emulated, dtype, limit):
    """W in 16 bits alone would change them by 4e-3 (bfloat16); what remains is y's rounding."""
    x, W, theta, t = frame_inputs(1, 64, 1, 64, 16, dtype)
    y = grape.frame_rotate(x, W, theta, t)
    ratio = y.double().norm(dim=-1) / x.double().norm(dim=-1)
    assert (ratio - 1).abs().max() <= limit and (ratio - 1).mean().abs() <= limit / 10


@pytest.mark.parametrize("case", ["8 lanes, 1 plane", "16 lanes, 2 planes"])
def test_backward_reads_its_rows_once(emulated, case):
    shape, dtype = CASES[case]
    x, a, b, omega, t = mixture_inputs(*shape, dtype=dtype)
    leaves = [v.requires_grad_() for v in (x, a, b, omega)]
    y = grape.mixture_rotate(*leaves, t)
    dy = torch.ones_like(y)
    with emulated.profile() as launches:
        torch.autograd.grad(y, leaves, dy)
    rows, *rest = launches
    assert len(rest) == 3  # pairs, and the ends of both sums
    r, tokens = shape[-1], x.numel() // shape[-2]
    frame = 8 * (shape[2] * (2 * r * shape[3] + r) + shape[0] * shape[1])
    assert rows["unique_bytes_read"] == size(x, dy) + frame
    written = rows["unique_bytes_written"] - size(x)
    assert written <= 16 * r * tokens + 4 * 12 * shape[2] * 2 * r * shape[3]
    assert all(launch["local_loads"] == launch["local_stores"] == 0 for launch in launches)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("r", [2, 8])
def test_gradients_of_far_positions_and_small_rows(emulated, r, dtype):
    """Coefficients that grow with t, of planes that hardly turn, beside gradients of 1e-6."""
    x, a, b, omega, t = mixture_inputs(1, 40, 1, 64, r, dtype=dtype, scale=1e6)
    omega[:, 0] = 0
    inputs = [x, a, b, omega, t]
    check(grape.mixture_rotate, inputs, dtype)
    if dtype == F32:  # 16 bits would round the gradient once more
        check(lambda *v: 1e-6 * grape.mixture_rotate(*v), inputs, dtype)


@pytest.mark.parametrize("r", [2, 8])
def test_large_float16_rows(emulated, r):
    x, W, theta, t = frame_inputs(1, 40, 1, 128, r, F16)
    x = (4000 * x).clamp(-5000, 5000)
    check(grape.frame_rotate, [x, W, theta, t], F16)


def test_what_the_kernels_do_not_reach(emulated):
    inputs = frame_inputs(1, 3, 1, 8, 1, F64)
    y = grape.frame_rotate(*inputs)
    with _library.use("reference"):
        assert torch.equal(y, grape.frame_rotate(*inputs))
    with pytest.raises(RuntimeError, match="D must be at most 256"):
        grape.frame_rotate(*frame_inputs(1, 3, 1, 264, 1, F32))


def test_the_same_bits_twice_and_for_any_layout(emulated):
    x, *rest = mixture_inputs(2, 37, 2, 64, 2, dtype=BF16)
    y, grads = run(grape.mixture_rotate, [x, *rest])
    again, grads_again = run(grape.mixture_rotate, [x, *rest])
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)  # another stride of time and heads
    assert torch.equal(grape.mixture_rotate(spread, *rest), y)
    shifted = torch.empty(x.numel() + 1, dtype=BF16)[1:].view(x.shape).copy_(x)  # not aligned
    assert (grape.mixture_rotate(shifted, *rest).double() - y.double()).abs().max() <= 2e-2


def test_is_registered(emulated):
    for name in ("grape_frame_fwd", "grape_mixture_fwd", "grape_frame_bwd"):
        assert _library.backend_info()["ops"][name]["cpu"] == "cpu"
