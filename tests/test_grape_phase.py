"""The contextual phase: sums, equal bits of all divisions, gradients, rotations by it (check 7)."""

import pytest
import torch

from deltafuse import _library, grape
from grape_rotary_cases import BF16, F16, F32, F64, error, heads, normal, uniform


def naive(omega):
    return omega.double().cumsum(1) - omega.double()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 7, 4), (2, 5, 2, 3)])
def test_7_exclusive_sums(shape, dtype):
    omega = uniform(*shape, dtype=dtype)
    phi, final = grape.cumulative_phase(omega)
    assert phi.dtype == F64 and final.dtype == torch.int64
    assert phi[:, 0].eq(0).all()
    torch.testing.assert_close(phi, naive(omega), rtol=0, atol=1e-10)
    total = omega.double().sum(1)
    torch.testing.assert_close(final.double() * 2.0**-40, total, rtol=0, atol=1e-10)


def test_7_error_at_128k_tokens():
    omega = torch.sigmoid(normal(1, 131072))
    phi, _ = grape.cumulative_phase(omega)
    assert (phi - naive(omega)).abs().max() <= 6e-10 + 1e-9  # of float64's own sum


@pytest.mark.parametrize("size", [1, 7, 64])
def test_7_streaming_has_the_bits_of_one_call(size):
    omega = uniform(2, 150)
    whole, total = grape.cumulative_phase(omega)
    parts, state = [], None
    for part in omega.split(size, 1):
        phi, state = grape.cumulative_phase(part, initial=state)
        parts.append(phi)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, total)


def test_7_packed_sequences():
    omega = uniform(1, 20, 2)
    bounds = [0, 7, 7, 8, 20]
    initial = torch.arange(8).view(4, 2) << 38
    phi, final = grape.cumulative_phase(omega, torch.tensor(bounds), initial)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        one, last = grape.cumulative_phase(omega[:, start:end], initial=initial[n : n + 1])
        assert torch.equal(phi[:, start:end], one) and torch.equal(final[n : n + 1], last)


@pytest.mark.parametrize("cu", [None, [0, 3, 3, 8]], ids=["one", "packed"])
@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 2)])
def test_7_gradcheck(shape, cu):
    """Steps are a multiple of the fixed point's unit."""
    omega = uniform(*shape, dtype=F64).requires_grad_()
    cu = None if cu is None else torch.tensor(cu)

    def function(omega):
        return grape.cumulative_phase(omega, cu)[0].sin()

    assert torch.autograd.gradcheck(function, omega, eps=2.0**-18, atol=1e-5)


def test_7_gradient_is_the_exclusive_sum_from_the_end():
    omega = uniform(2, 6, dtype=BF16).requires_grad_()
    phi, final = grape.cumulative_phase(omega)
    weight = torch.arange(12.0, dtype=F64).view(2, 6)
    (grad,) = torch.autograd.grad(phi, omega, weight)
    wanted = weight.flip(1).cumsum(1).flip(1) - weight
    assert grad.dtype == BF16 and error(grad, wanted) < 4e-3
    assert not final.requires_grad


def test_7_gradient_through_the_rotation():
    q, k = (t.double() for t in heads(T=5, D=8))
    omega = uniform(2, 5, dtype=F64).requires_grad_()
    freqs = uniform(4, dtype=F64).requires_grad_()

    def function(omega, freqs):
        return grape.rotary_qk(q, k, freqs=freqs, phase=grape.cumulative_phase(omega)[0])

    assert torch.autograd.gradcheck(function, (omega, freqs), eps=2.0**-18, atol=1e-5)


def test_7_one_a_token_is_the_position():
    q, k = heads(T=500, D=32)
    phi, _ = grape.cumulative_phase(torch.ones(2, 500))
    contextual = grape.rotary_qk(q, k, phase=phi)
    plain = grape.rotary_qk(q, k)
    assert all(error(a, b) <= 2e-7 for a, b in zip(contextual, plain, strict=True))


def test_7_relative_law():
    """A logit depends on the phase between its two tokens alone."""
    q, k = heads(B=1, T=40, Hq=1, Hk=1, D=32)
    omega = uniform(1, 40)

    def logits(start):
        first = torch.tensor([int(start * 2**40)])
        a, b = grape.rotary_qk(q, k, phase=grape.cumulative_phase(omega, initial=first)[0])
        return torch.einsum("bthd,bshd->ts", a.double(), b.double())

    assert error(logits(0), logits(100000.25)) < 2e-6


def test_12_decode_equals_prefill():
    q, k = heads(B=2, T=12, D=32)
    omega = uniform(2, 12)
    phi, _ = grape.cumulative_phase(omega)
    whole = grape.rotary_qk(q, k, phase=phi)
    state = None
    for t in range(12):
        step = slice(t, t + 1)
        phi, state = grape.cumulative_phase(omega[:, step], initial=state)
        got = grape.rotary_qk(q[:, step], k[:, step], phase=phi)
        assert all(torch.equal(a, b[:, step]) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("T", [0, 3])
def test_empty(T):
    phi, final = grape.cumulative_phase(torch.zeros(2, T))
    assert phi.shape == (2, T) and final.eq(0).all()
    phi, final = grape.cumulative_phase(torch.zeros(1, 0), torch.tensor([0, 0]))
    assert phi.shape == (1, 0) and final.tolist() == [0]


OMEGA = uniform(2, 5)
BAD = {
    "rank": (lambda: grape.cumulative_phase(OMEGA[0]), r"omega must be \[B, T\]"),
    "initial": (
        lambda: grape.cumulative_phase(OMEGA, initial=torch.zeros(3, dtype=torch.int64)),
        r"initial must be \[N, \.\.\.\] of omega = \(2,\), got \(3,\)",
    ),
    "initial type": (
        lambda: grape.cumulative_phase(OMEGA, initial=torch.zeros(2)),
        "initial must be the int64 `final` of a call",
    ),
    "cu": (
        lambda: grape.cumulative_phase(OMEGA[:1], torch.tensor([0, 4])),
        r"total 5, got \[0, 4\]",
    ),
    "batch": (lambda: grape.cumulative_phase(OMEGA, torch.tensor([0, 5])), "B = 1"),
    "large": (lambda: grape.cumulative_phase(OMEGA + 2**22), r"below 2\^23"),
    "nan": (lambda: grape.cumulative_phase(OMEGA * float("nan")), "finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_type():
    with pytest.raises(TypeError, match="omega must be floating point"):
        grape.cumulative_phase(torch.zeros(2, 3, dtype=torch.int64))


def both(omega, cu=None, initial=None):
    """phi, final and d omega."""
    leaf = omega.detach().clone().requires_grad_()
    phi, final = grape.cumulative_phase(leaf, cu, initial)
    weight = normal(*phi.shape, dtype=F64).round().to(phi)
    return phi, final, torch.autograd.grad(phi, leaf, weight)[0]


KERNELS = {
    "one": ((2, 9), None, F32),
    "several": ((2, 5, 3, 2), None, F64),
    "packed": ((1, 20, 2), [0, 7, 7, 8, 20], F32),
    "packed int32": ((1, 6), [0, 1, 6], BF16),
    "tiles": ((1, 4500), None, F32),
    "packed tiles": ((1, 4500), [0, 2048, 4099, 4500], F16),
    "blocks": ((1, 3, 130), None, F32),
    "empty": ((2, 0), None, F32),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_against_the_reference(device, name):
    shape, bounds, dtype = KERNELS[name]
    omega = uniform(*shape, dtype=dtype).to(device)
    index = torch.int32 if "int32" in name else torch.int64
    cu = None if bounds is None else torch.tensor(bounds, dtype=index, device=device)
    N = shape[0] if bounds is None else len(bounds) - 1
    initial = torch.arange(N * omega[0, :1].numel(), device=device)
    initial = initial.view(N, *shape[2:]) << 39 if omega.numel() else None
    got = both(omega, cu, initial)
    with _library.use("reference"):
        wanted = both(omega, cu, initial)
    # sums of whole numbers: exact in every order
    assert all(map(torch.equal, got, wanted))
    assert all(map(torch.equal, both(omega, cu, initial), got))


@pytest.mark.parametrize(
    "mode", [{"race": True}, {"race": True, "seed": 1}, {"strict": True}], ids=str
)
def test_kernels_in_every_mode(emulated_with, mode):
    omega = uniform(2, 2100, 2).transpose(0, 1).contiguous().transpose(0, 1)
    with emulated_with(**mode):
        got = both(omega)
    with _library.use("reference"):
        assert all(map(torch.equal, got, both(omega)))


def test_bytes(emulated):
    omega = uniform(1, 4096)
    with emulated.profile() as launches:
        grape.cumulative_phase(omega)
    (launch,) = launches
    assert launch["unique_bytes_read"] == 4 * 4096
    assert launch["unique_bytes_written"] == 8 * 4097
    assert launch["local_loads"] == launch["local_stores"] == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(packed, grad):
    omega = uniform(1, 5, 2).requires_grad_(grad)
    cu = torch.tensor([0, 2, 5]) if packed else None
    initial = torch.ones(2 if packed else 1, 2, dtype=torch.int64)
    op = _library.kernel("grape_phase_fwd", omega).default
    torch.library.opcheck(op, (omega, cu, initial))
    op = _library.kernel("grape_phase_bwd", omega).default
    torch.library.opcheck(op, (normal(1, 5, 2, dtype=F64), cu))


def test_instruction_sets(cpu_isa):
    test_kernels_against_the_reference("cpu", "blocks")
    test_kernels_against_the_reference("cpu", "packed tiles")


def test_any_strides():
    omega = uniform(3, 7, 4)
    plain = grape.cumulative_phase(omega)
    for other in (omega.transpose(1, 2).contiguous().transpose(1, 2), omega.repeat(1, 2, 1)[:, :7]):
        assert all(map(torch.equal, grape.cumulative_phase(other), plain))
    shared = omega[:, :, :1].expand(-1, -1, 4)
    assert torch.equal(grape.cumulative_phase(shared)[0][..., 3], plain[0][..., 0])
