"""The list of bad arguments, by their messages (check 15)."""

import pytest
import torch

from deltafuse import _library, grape
from grape_rotary_cases import heads, normal, tables, uniform

Q, K = heads()  # [2, 7, 4 and 2, 16]
ONE = normal(1, 7, 2, 16)
T9 = tables(9, 8)


def rotate(*args, **options):
    return lambda: grape.rotary_qk(*args, **options)


def fa(*args, **options):
    return lambda: grape.apply_rotary_emb(*args, **options)


def hf(*args, **options):
    return lambda: grape.apply_rotary_pos_emb(*args, **options)


def cu(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


EMB = [torch.cat((t, t), -1) for t in T9.values()]
BAD = {
    "dtypes": (rotate(Q, K.half()), "expected one dtype, got q torch.float32, k torch.float16"),
    "k shape": (rotate(Q, K[:, :5]), r"q \(2, 7, 4, 16\) and k \(2, 5, 2, 16\)"),
    "k rank": (rotate(Q, K[0]), r"k \(7, 2, 16\)"),
    "rank": (rotate(Q[0, 0]), r"q must be \[B, T, H, D\].*got shape \(4, 16\)"),
    "groups": (rotate(Q, normal(2, 7, 3, 16)), "Hq must be a multiple of Hk, got 4 and 3"),
    "no heads of k": (rotate(Q, K[:, :, :0]), "got 4 and 0"),
    "wide": (rotate(Q, rotary_dim=18), "rotary width 18 must be even and at most D = 16"),
    "odd": (rotate(Q, rotary_dim=7), "rotary_dim: rotary width 7 must be even"),
    "odd D": (rotate(Q[..., :15]), "rotary width 15 must be even"),
    "wide freqs": (rotate(Q, freqs=uniform(9)), "freqs: rotary width 18"),
    "wide cos": (rotate(Q, **tables(9, 9)), "cos: rotary width 18"),
    "heads of freqs": (rotate(Q, K, freqs=uniform(4, 8)), r"4 heads, which do not divide \[4, 2\]"),
    "heads of phase": (rotate(Q, K, phase=uniform(2, 7, 4)), "phase has 4 heads"),
    "heads of both": (
        rotate(normal(2, 7, 8, 16), freqs=uniform(2, 8), phase=uniform(2, 7, 4)),
        "phase has 4 heads, freqs 2",
    ),
    "freqs rank": (rotate(Q, freqs=uniform(2, 2, 8)), r"freqs must be \[P\] or \[H, P\]"),
    "freqs axes": (
        rotate(Q, freqs=uniform(8, 3), position_ids=torch.zeros(2, 7, 2)),
        r"freqs must be \[P, A\].*with A = 2, got shape \(8, 3\)",
    ),
    "axes alone": (rotate(Q, position_ids=torch.zeros(2, 7, 2)), r"need freqs \[P, A\]"),
    "freqs and width": (rotate(Q, freqs=uniform(8), rotary_dim=8), "rotary_dim 8, but freqs"),
    "positions": (
        rotate(Q, position_ids=torch.zeros(3, 7)),
        r"position_ids must broadcast to \[B, T\] with B, T = \(2, 7\), got shape \(3, 7\)",
    ),
    "positions rank": (rotate(Q, position_ids=torch.zeros(1, 1, 2, 7)), "position_ids must"),
    "positions type": (rotate(Q, position_ids=torch.ones(7).bool()), "integers or real numbers"),
    "positions twice": (rotate(Q, position_ids=torch.zeros(7), offsets=3), "not both"),
    "phase twice": (rotate(Q, phase=uniform(2, 7), offsets=3), "phase replaces positions"),
    "offsets": (rotate(Q, offsets=cu(1, 2, 3)), "offsets must have 2 elements, got shape"),
    "offsets type": (rotate(Q, offsets=torch.zeros(2)), "offsets must be int32 or int64"),
    "cos alone": (rotate(Q, cos=T9["cos"]), "cos and sin belong together"),
    "cos and freqs": (rotate(Q, **T9, freqs=uniform(8)), "cos and sin replace freqs"),
    "cos shapes": (rotate(Q, cos=T9["cos"], sin=T9["sin"][:5]), "cos and sin must both be"),
    "cos of pairs": (rotate(Q, cos=(T9["cos"],) * 2, sin=T9["sin"]), "both pairs"),
    "cos of tokens": (rotate(Q, cos=normal(2, 6, 8), sin=normal(2, 6, 8)), r"\[B, T, P\]"),
    "cos and width": (rotate(Q, **T9, rotary_dim=8), "rotary_dim 8, but cos has 8 planes"),
    "positions of tokens": (
        rotate(Q, cos=normal(1, 7, 8), sin=normal(1, 7, 8), offsets=2),
        "no meaning beside cos and sin of every token",
    ),
    "real rows": (rotate(Q, **T9, position_ids=torch.zeros(7)), "integers"),
    "few rows": (rotate(Q, **tables(6, 8)), r"6 rows, but positions are 0\.\.6"),
    "offset beyond": (rotate(Q, **T9, offsets=3), r"9 rows, but positions are 3\.\.9"),
    "negative row": (rotate(Q, **T9, offsets=-1), r"positions are -1\.\.5"),
    "offsets beyond": (rotate(Q, **T9, offsets=cu(0, 3)), r"positions are 0\.\.9"),
    "positions beyond": (rotate(Q, **T9, position_ids=torch.arange(7) * 2), r"0\.\.12"),
    "packed": (rotate(Q[0]), r"packed \[total, H, D\]: give cu_seqlens"),
    "cu and batch": (rotate(Q, cu_seqlens=cu(0, 7)), "needs packed tensors with B = 1"),
    "cu type": (rotate(ONE, cu_seqlens=torch.tensor([0.0, 7.0])), "cu_seqlens must be int32"),
    "cu rank": (rotate(ONE, cu_seqlens=cu(0, 7)[None]), r"cu_seqlens must be \[N\]"),
    "cu start": (rotate(ONE, cu_seqlens=cu(1, 7)), r"from 0 to the total 7, got \[1, 7\]"),
    "cu end": (rotate(ONE, cu_seqlens=cu(0, 6)), r"total 7, got \[0, 6\]"),
    "cu order": (rotate(ONE, cu_seqlens=cu(0, 5, 3, 7)), r"got \[0, 5, 3, 7\]"),
    "angle": (rotate(Q, angle="fp16"), "angle must be 'exact' or 'fp32', got 'fp16'"),
    "expanded": (
        rotate(normal(1, 7, 4, 16).expand(2, -1, -1, -1), inplace=True),
        r"q \(2, 7, 4, 16\) is expanded \(strides \(0, ",
    ),
    "expanded heads": (rotate(Q, K[:, :, :1].expand(-1, -1, 2, -1), inplace=True), "k .* expanded"),
    "leaf": (rotate(Q.clone().requires_grad_(), inplace=True), "is a leaf that requires grad"),
    "leaf k": (rotate(Q, K.clone().requires_grad_(), inplace=True), r"k \(2, 7, 2, 16\) is a leaf"),
    "tables in place": (
        rotate(Q, cos=normal(1, 7, 8).requires_grad_(), sin=normal(1, 7, 8), inplace=True),
        "not in place",
    ),
    "cache without k": (rotate(Q, output_cache=K), "which is not given"),
    "cache shape": (rotate(Q, K, output_cache=Q), "output_cache must be the shape of k"),
    "flash-attn rows": (fa(Q, *tables(6, 8).values()), r"6 rows, but positions are 0\.\.6"),
    "flash-attn max_seqlen": (
        fa(
            ONE[0].to("meta"),
            *(t[:3].to("meta") for t in T9.values()),
            cu_seqlens=cu(0, 7).to("meta"),
            max_seqlen=4,
        ),
        r"3 rows, but positions are 0\.\.3",
    ),
    "flash-attn leaf": (fa(Q.clone().requires_grad_(), *T9.values(), inplace=True), "leaf"),
    "transformers rows": (hf(Q, Q, *(t[:3] for t in EMB)), "rows"),
    "transformers rank": (hf(Q, Q[0], *EMB), r"k must be \[B, H, T, D\]"),
    "transformers dim": (hf(Q, Q, *EMB, unsqueeze_dim=3), "unsqueeze_dim must be 1 or 2"),
    "transformers width": (hf(Q, Q, *(t[..., :7] for t in EMB)), "each frequency twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (rotate(Q.long()), "q must be floating point, got torch.int64"),
        (rotate(Q, K.to(torch.complex64)), "k must be floating point"),
        (rotate(Q, freqs=torch.arange(8)), "freqs must be floating point"),
        (rotate(Q, phase=torch.zeros(2, 7).long()), "phase must be floating point"),
        (fa(Q, *(t.long() for t in T9.values())), "cos must be floating point"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("other", [{"freqs": uniform(8)}, {"phase": uniform(2, 7)}, T9], ids=str)
def test_devices(other):
    moved = {name: t.to("meta") for name, t in other.items()}
    with pytest.raises(ValueError, match="expected one device, got q on cpu"):
        grape.rotary_qk(Q, **moved)


def test_a_cache_has_no_gradient():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="output_cache has no gradient"):
        grape.rotary_qk(q, K, output_cache=torch.empty_like(K))
    with torch.no_grad():
        grape.rotary_qk(q, K, output_cache=torch.empty_like(K))


def test_rows_are_checked_by_the_kernel_too():
    """Where Python must not look at values, as in a compiled graph."""
    op = _library.kernel("grape_rotary_fwd", Q)
    table = [t[None, :, None] for t in T9.values()]
    positions = torch.full((2, 7, 1, 1), 9)
    with pytest.raises(RuntimeError, match="9 rows, but there is position 9"):
        op(Q, K, None, positions, None, None, *table, None, None, 0, 1.0, 4)
    with pytest.raises(RuntimeError, match="there is position -[12]"):
        op(Q, K, None, None, None, None, *table, None, None, -2, 1.0, 4)
