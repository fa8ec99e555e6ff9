"""Rotations under torch.compile, opcheck, checkpointing, autocast and functorch (check 15)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltafuse import _library, backend_info, grape
from deltafuse.grape import raw_rotary as raw
from grape_rotary_cases import BF16, F32, F64, heads, normal, tables, uniform


def arguments(kind, grad=False):
    """Of grape_rotary_fwd: q to sin_k, offset, factor, flags."""
    q, k = heads(T=3, D=10)
    freqs = positions = offsets = cu = None
    table = [None] * 4
    flags = 0
    if kind == "tables":
        table[:2] = normal(2, 3, 1, 4), normal(2, 3, 1, 4, seed=1)
    elif kind == "tables of two":
        table = [normal(1, 3, 2, 5, seed=s) for s in range(4)]
    elif kind == "by position":
        table[:2] = (t[None, :, None] for t in tables(9, 5).values())
        flags = raw.BY_POSITION
    else:
        freqs = uniform(2, 4, 1)
    if kind == "phase":
        positions = uniform(2, 3, 2, 1)
    if kind == "offsets":
        offsets = torch.tensor([3, 4])
    if kind == "varlen":
        q, k, cu = q[:1], None, torch.tensor([0, 1, 3])
        flags |= raw.INTERLEAVED | raw.CLOCKWISE
    tensors = [q, k, freqs, positions, offsets, cu, *table]
    if grad:
        wanted = [t is not None and t.is_floating_point() for t in tensors]
        fixed = kind == "by position"
        for i, (t, real) in enumerate(zip(tensors, wanted, strict=True)):
            if real and not (fixed and i >= 6):
                t.requires_grad_()
    return (*tensors, 2, 1.5, flags)


KINDS = ("plain", "phase", "offsets", "varlen", "tables", "tables of two", "by position")


def operator(name):
    return _library.kernel(name, torch.empty(0)).default


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_15_opcheck_forward(kind, grad):
    torch.library.opcheck(operator("grape_rotary_fwd"), arguments(kind, grad))


@pytest.mark.parametrize("kind", KINDS)
def test_15_opcheck_backward(kind):
    q, k, *rest, flags = arguments(kind)
    flags |= raw.TABLES if kind.startswith("tables") else raw.ANGLES if "by" not in kind else 0
    saved = (None, None) if kind == "by position" else (q.clone(), k if k is None else k.clone())
    torch.library.opcheck(operator("grape_rotary_bwd"), (q, k, *saved, *rest, flags))


@pytest.mark.parametrize("kind", KINDS)
def test_15_opcheck_out(kind):
    given = arguments(kind)
    outputs = [t if t is None else torch.empty_like(t) for t in given[:2]]
    torch.library.opcheck(operator("grape_rotary_out"), (*given, *outputs))


def loss_of(q, k, freqs, omega):
    phi, _ = grape.cumulative_phase(omega)
    a, b = grape.rotary_qk(q, k, freqs=freqs, phase=phi)
    c, d = grape.rotary_qk(a, b, freqs=freqs, offsets=3, interleaved=True)
    e, f = grape.rotary_qk(c, d, base=500.0, angle="fp32")
    return sum((t * 2).tanh().sum() for t in (a, b, e, f))


def leaves(T, seed=0):
    q, k = heads(T=T, seed=seed)
    return [t.requires_grad_() for t in (q, k, uniform(2, 8), uniform(2, T))]


@pytest.mark.parametrize(
    "backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", True)]
)
def test_15_compile_whole_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in (6, 9):
        tensors = leaves(T)
        for a, e in zip(
            torch.autograd.grad(compiled(*tensors), tensors),
            torch.autograd.grad(loss_of(*tensors), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def dropins(q, k, cos, sin, cu):
    a = grape.apply_rotary_emb(q, cos, sin, cu_seqlens=cu, max_seqlen=4)
    emb = [torch.cat((t, t), -1) for t in (cos, sin)]
    b, c = grape.apply_rotary_pos_emb(*(t[None].transpose(1, 2) for t in (a, k)), *emb)
    return b + 1, c + 1


def test_15_compile_dropins():
    torch._dynamo.reset()
    q, k = (t[0] for t in heads(B=1, T=7))
    inputs = (q, k, *tables(9, 8).values(), torch.tensor([0, 3, 7], dtype=torch.int32))
    compiled = torch.compile(dropins, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(map(torch.equal, compiled(*inputs), dropins(*inputs)))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_15_compile_in_place(grad):
    torch._dynamo.reset()
    q, k = heads()
    if grad:
        q, k = q.requires_grad_(), k.requires_grad_()

    def step(q, k):
        q, k = q * 2, k * 2
        grape.rotary_qk(q, k, inplace=True)
        return q + 1, k + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(q, k), step(q, k)
    assert all(map(torch.equal, got, wanted))
    if grad:
        pair = [torch.autograd.grad(sum(t.sin().sum() for t in y), (q, k)) for y in (got, wanted)]
        assert all(map(torch.equal, *pair))


def test_15_few_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, k: grape.rotary_qk(q, k), fullgraph=True, backend=counter)
    for T in (4, 5, 6, 9):
        compiled(*heads(T=T))
    assert counter.frame_count <= 2


def test_15_export():
    class Rotation(torch.nn.Module):
        def forward(self, q, k):
            return grape.rotary_qk(q, k)

    q, k = heads()
    program = torch.export.export(Rotation(), (q, k))
    assert all(map(torch.equal, program.module()(q, k), grape.rotary_qk(q, k)))


def test_15_activation_checkpointing():
    tensors = leaves(6)
    kept = checkpoint(loss_of, *tensors, use_reentrant=False)
    pair = [torch.autograd.grad(y, tensors) for y in (kept, loss_of(*tensors))]
    assert all(map(torch.equal, *pair))


def test_15_autocast_changes_nothing():
    for dtype in (F32, BF16):
        q, k = heads(dtype=dtype)
        plain = grape.rotary_qk(q, k, freqs=uniform(8))
        with torch.autocast("cpu", torch.bfloat16):
            cast = grape.rotary_qk(q, k, freqs=uniform(8))
            table = grape.rotary_qk(q, k, angle="fp32")
            phi, _ = grape.cumulative_phase(uniform(2, 7))
        assert all(map(torch.equal, cast, plain)) and phi.dtype == F64
        assert all(map(torch.equal, table, grape.rotary_qk(q, k, angle="fp32")))
        assert cast[0].dtype == dtype


def test_second_derivatives_are_refused():
    q, _ = heads()
    q.requires_grad_()
    (dq,) = torch.autograd.grad(grape.rotary_qk(q).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the gradient is not implemented"):
        dq.sum().backward()


def test_inference_mode():
    q, k = heads()
    wanted = grape.rotary_qk(q, k)
    with torch.inference_mode():
        assert all(map(torch.equal, grape.rotary_qk(q, k), wanted))
        a, b = q.clone(), k.clone()
        grape.rotary_qk(a, b, inplace=True)
    assert torch.equal(a, wanted[0]) and torch.equal(b, wanted[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_one_by_one():
    q, k = heads()
    many = torch.stack([q, q + 1]), torch.stack([k, k - 1])
    got = torch.vmap(lambda q, k: grape.rotary_qk(q, k))(*many)
    for i in range(2):
        wanted = grape.rotary_qk(many[0][i], many[1][i])
        assert all(torch.equal(a[i], b) for a, b in zip(got, wanted, strict=True))


def test_meta_tensors():
    q, k = (t.to("meta") for t in heads())
    freqs = uniform(8).to("meta")
    y = grape.rotary_qk(q, k, freqs=freqs)
    assert [t.shape for t in y] == [q.shape, k.shape] and y[0].device.type == "meta"


def test_backends_are_listed():
    names = {"grape_rotary_fwd", "grape_rotary_bwd", "grape_rotary_out"}
    ops = backend_info()["ops"]
    assert names <= set(ops) and all(ops[name]["cpu"] == "cpu" for name in names)
    q, k = heads()
    a, b = q.clone(), k.clone()
    with _library.use("reference"):
        grape.rotary_qk(a, b, inplace=True)
    torch.testing.assert_close((a, b), grape.rotary_qk(q, k))
