"""RotaryEmbedding by flash-attn's calling convention: every packing, XPos, in place, offsets."""

import copy
import pickle

import pytest
import torch

import deltafuse
from deltafuse import grape
from deltafuse.grape import RotaryEmbedding
from grape_rotary_cases import BF16, F32, F64, error, normal, thetas, turned

B, T, D = 2, 9, 16


def angles(start, dim=D, length=T):
    theta = RotaryEmbedding(dim).inv_freq.double()  # rounded to float32
    assert error(theta, thetas(dim)) < 1e-6
    return (torch.arange(start, start + length)[:, None, None] * theta).expand(B, -1, -1, -1)


def packed(*middle, dtype=F32, seed=0):
    return normal(B, T, *middle, D, dtype=dtype, seed=seed)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [D, 10])
def test_qkv_side_by_side(dim, interleaved):
    m = RotaryEmbedding(dim, interleaved=interleaved)
    x = packed(3, 4, dtype=F64)
    given = x.clone()
    assert m(given, seqlen_offset=5) is given
    for i in (0, 1):
        assert error(given[:, :, i], turned(x[:, :, i], angles(5, dim), interleaved)) < 1e-6
    assert torch.equal(given[:, :, 2], x[:, :, 2])


def test_grouped_heads_behind_each_other():
    x = packed(4 + 2 * 2)
    given = x.clone()
    assert RotaryEmbedding(D)(given, num_heads_q=4) is given
    assert error(given[:, :, :6], turned(x[:, :, :6], angles(0))) < 1e-6
    assert torch.equal(given[:, :, 6:], x[:, :, 6:])


def test_q_beside_kv_with_an_offset_a_sequence():
    q, kv = packed(4), packed(2, 2, seed=1)
    given = q.clone(), kv.clone()
    offsets = torch.tensor([3, 100000], dtype=torch.int32)
    got = RotaryEmbedding(D)(*given, seqlen_offset=offsets, max_seqlen=7)
    assert got[0] is given[0] and got[1] is given[1]
    for b, start in enumerate(offsets.tolist()):
        row = slice(b, b + 1)
        assert error(got[0][row], turned(q[row], angles(start)[row])) < 1e-6
        assert error(got[1][row, :, 0], turned(kv[row, :, 0], angles(start)[row])) < 1e-6
    assert torch.equal(got[1][:, :, 1], kv[:, :, 1])


def test_strided_qkv_is_rotated_where_it_is():
    whole = normal(B, T, 4, 3, D)
    given = whole.clone()
    RotaryEmbedding(D)(given.transpose(2, 3))
    contiguous = whole.transpose(2, 3).contiguous()
    assert torch.equal(given.transpose(2, 3), RotaryEmbedding(D)(contiguous))


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_gradient_through_packed_qkv(scale_base):
    m = RotaryEmbedding(D, scale_base=scale_base)
    leaf, weight = packed(3, 4).requires_grad_(), packed(3, 4, seed=2)
    got = torch.autograd.grad(m(leaf * 1), leaf, weight)[0]
    parts = leaf.unbind(2)
    if scale_base is None:
        q, k = grape.rotary_qk(*parts[:2])
    else:
        tables = m._tables("", parts[0], 0, None)
        q, k = grape.rotary_qk(*parts[:2], **tables)
    wanted = torch.autograd.grad(torch.stack((q, k, parts[2]), 2), leaf, weight)[0]
    assert torch.equal(got, wanted)


def xpos_logits(m, offset, max_seqlen):
    q, kv = packed(2, dtype=F64), packed(2, 2, dtype=F64, seed=1)
    q, kv = m(q, kv, seqlen_offset=offset, max_seqlen=max_seqlen)
    return torch.einsum("bihd,bjhd->bhij", q, kv[:, :, 0])


def test_xpos_is_its_formula():
    m = RotaryEmbedding(D, scale_base=512.0)
    q, kv = packed(2, dtype=F64), packed(2, 2, dtype=F64, seed=1)
    got_q, got_kv = m(q.clone(), kv.clone(), seqlen_offset=4)
    zeta = (torch.arange(0, D, 2, dtype=F64) + 0.4 * D) / (1.4 * D)
    power = (torch.arange(4, 4 + T) - (4 + T) // 2) / 512.0
    for x, y, sign in ((q, got_q, 1), (kv[:, :, 0], got_kv[:, :, 0], -1)):
        factor = zeta ** (sign * power[:, None])
        wanted = turned(x, angles(4)) * torch.cat((factor, factor), -1)[:, None]
        assert error(y, wanted) < 1e-6
    assert torch.equal(got_kv[:, :, 1], kv[:, :, 1])


def test_xpos_depends_on_the_distance_alone():
    m = RotaryEmbedding(D, scale_base=32.0).double()
    near = xpos_logits(m, 0, 64)
    assert error(xpos_logits(m, 40, 64), near) < 1e-6
    assert error(xpos_logits(RotaryEmbedding(D), 0, 64), near) > 1e-2
    # offsets of sequences, as a tensor
    offsets = torch.tensor([40, 40])
    assert torch.equal(xpos_logits(m, offsets, 64), xpos_logits(m, 40, 64))


def test_far_positions_are_exact():
    x = packed(3, 2)
    near, far = (RotaryEmbedding(D)(x.clone(), seqlen_offset=n) for n in (0, 2**30))
    scores = [torch.einsum("bihd,bjhd->bhij", y[:, :, 0], y[:, :, 1]) for y in (near, far)]
    assert error(*scores) < 2e-6


def test_buffers_stay_float32_and_out_of_checkpoints():
    m = RotaryEmbedding(D, scale_base=512.0)
    before = m.inv_freq.clone(), m.scale.clone()
    for cast in (m.to(BF16), m.half(), pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
        assert torch.equal(cast.inv_freq, before[0]) and torch.equal(cast.scale, before[1])
    assert not m.state_dict() and deltafuse.RotaryEmbedding is RotaryEmbedding
    x = packed(3, 2, dtype=BF16)
    assert m(x).dtype == BF16


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_compiles_as_one_graph(scale_base):
    torch._dynamo.reset()
    m = RotaryEmbedding(D, scale_base=scale_base)
    compiled = torch.compile(lambda x, n: m(x * 1, seqlen_offset=n), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for offset in (0, 3, 4):
        x = packed(3, 4).requires_grad_()
        got, wanted = compiled(x, offset), m(x * 1, seqlen_offset=offset)
        assert error(got, wanted) < 1e-6
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted)]
        assert error(*grads) < 1e-6


def test_wrong_arguments_are_named():
    m = RotaryEmbedding(D)
    cases = [
        ((packed(2, 4),), "qkv must be"),
        ((packed(8),), "num_heads_q must leave"),
        ((packed(4), packed(4)), "kv must be"),
        ((packed(4), packed(3, 4)), "kv must be"),
        ((packed(3, 4).requires_grad_(),), "leaf that requires grad"),
        ((packed(1, 4).expand(-1, -1, 3, -1, -1),), "is expanded"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            m(*arguments)
    with pytest.raises(ValueError, match="needs max_seqlen"):
        RotaryEmbedding(D, scale_base=8.0)(packed(3, 4), seqlen_offset=torch.tensor([1, 2]))
