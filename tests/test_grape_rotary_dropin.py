"""The calling conventions of flash-attn, transformers and Liger, and frequencies of checkpoints."""

import pytest
import torch

from deltafuse import grape
from grape_rotary_cases import BF16, F32, F64, error, heads, normal, thetas, turned

transformers = pytest.importorskip("transformers")


def fa_formula(x, cos, sin, interleaved):
    """Rotation with tables [T, P], evaluated in the dtype of x."""
    width = 2 * cos.shape[-1]
    c, s = cos[:, None], sin[:, None]
    r = x[..., :width]
    x0, x1 = (r[..., ::2], r[..., 1::2]) if interleaved else r.chunk(2, -1)
    parts = (x0 * c - x1 * s, x0 * s + x1 * c)
    y = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((y, x[..., width:]), -1)


def fa_tables(rows, width, dtype=F32):
    angle = torch.outer(torch.arange(rows).float(), thetas(width).float())
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 10])
def test_flash_attn(width, interleaved, inplace):
    x = normal(2, 9, 3, 16)
    cos, sin = fa_tables(12, width)
    wanted = fa_formula(x, cos[:9], sin[:9], interleaved)
    given = x.clone()
    y = grape.apply_rotary_emb(given, cos, sin, interleaved, inplace)
    assert error(y, wanted) < 3e-7
    assert (y is given) == inplace


def test_flash_attn_offsets():
    x = normal(2, 4, 3, 16)
    cos, sin = fa_tables(50, 16)
    y = grape.apply_rotary_emb(x, cos, sin, seqlen_offsets=7)
    assert error(y, fa_formula(x, cos[7:11], sin[7:11], False)) < 3e-7
    offsets = torch.tensor([3, 20], dtype=torch.int32)
    y = grape.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    for b, start in enumerate(offsets.tolist()):
        part = slice(start, start + 4)
        assert error(y[b], fa_formula(x[b], cos[part], sin[part], False)) < 3e-7


def test_flash_attn_varlen():
    x, cu = normal(11, 3, 16), torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    cos, sin = fa_tables(16, 16)
    y = grape.apply_rotary_emb(x, cos, sin, cu_seqlens=cu, max_seqlen=7)
    assert y.shape == x.shape
    for start, end in ((0, 4), (4, 11)):
        wanted = grape.apply_rotary_emb(x[None, start:end], cos, sin)[0]
        assert torch.equal(y[start:end], wanted)
    same = x.clone()
    assert grape.apply_rotary_emb(same, cos, sin, inplace=True, cu_seqlens=cu) is same
    assert torch.equal(same, y)


def test_flash_attn_gradient_and_16_bit_tables():
    x = normal(2, 9, 3, 16, dtype=BF16).requires_grad_()
    cos, sin = fa_tables(9, 16, BF16)
    cos.requires_grad_()
    y = grape.apply_rotary_emb(x, cos, sin)
    assert y.dtype == BF16
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    fa_formula(wide, cos.detach().double(), sin.double(), False).sum().backward()
    assert error(x.grad, wide.grad) < 8e-3 and cos.grad is None


def test_flash_attn_gradient_in_place():
    leaf = normal(2, 9, 3, 16).requires_grad_()
    cos, sin = fa_tables(9, 16)
    weight = normal(2, 9, 3, 16, seed=2)
    grads = []
    for inplace in (False, True):
        y = grape.apply_rotary_emb(leaf * 1, cos, sin, inplace=inplace)
        grads.append(torch.autograd.grad(y, leaf, weight)[0])
    assert torch.equal(*grads)


def llama():
    from transformers.models.llama import modeling_llama

    return modeling_llama


def config(**rope):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope},
    )


def hf_inputs(dtype=F32, T=9):
    q, k = normal(2, 4, T, 64, dtype=dtype), normal(2, 2, T, 64, seed=1, dtype=dtype)
    positions = torch.stack([torch.arange(T), torch.arange(T) + 100])
    return q, k, positions


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_transformers(dtype):
    q, k, positions = hf_inputs(dtype)
    cos, sin = llama().LlamaRotaryEmbedding(config())(q, positions)
    wanted = llama().apply_rotary_pos_emb(q, k, cos, sin)
    got = grape.apply_rotary_pos_emb(q, k, cos, sin)
    for a, b, x in zip(got, wanted, (q, k), strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert error(a, b) < (3e-7 if dtype == F32 else 1.2e-2)
    # [B, T, H, D], by keyword and fifth in place
    swapped = [t.transpose(1, 2) for t in (q, k)]
    for call in (
        grape.apply_rotary_pos_emb(*swapped, cos, sin, unsqueeze_dim=2),
        grape.apply_rotary_pos_emb(*swapped, cos, sin, 2),
    ):
        assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(call, got, strict=True))


def test_transformers_table_and_position_ids():
    q, k, positions = hf_inputs()
    everywhere = torch.arange(200)[None]
    cos, sin = llama().LlamaRotaryEmbedding(config())(q, everywhere)
    got = grape.apply_rotary_pos_emb(q, k, cos[0], sin[0], positions)
    rows = (cos[0][positions], sin[0][positions])
    wanted = grape.apply_rotary_pos_emb(q, k, *rows)
    assert all(map(torch.equal, got, wanted))


def test_6_heads_first_equals_native_layout():
    q, k, positions = hf_inputs()
    native = [t.transpose(1, 2).contiguous() for t in (q, k)]
    cos, sin = llama().LlamaRotaryEmbedding(config())(q, positions)
    a = grape.apply_rotary_pos_emb(q, k, cos, sin)
    b = grape.rotary_qk(*native, cos=cos[..., :32], sin=sin[..., :32])
    c = grape.rotary_qk(*native, position_ids=positions, freqs=frequencies(), angle="fp32")
    for x, y, z in zip(a, b, c, strict=True):
        assert torch.equal(x.transpose(1, 2), y) and torch.equal(y, z)


def frequencies():
    return grape.rotary_frequencies(64)[0]


def test_transformers_gradients():
    """Those of cos and sin included: both halves of their tables come from one half."""
    q, k, positions = hf_inputs()
    scale = torch.tensor(1.5, requires_grad=True)
    results = []
    for function in (llama().apply_rotary_pos_emb, grape.apply_rotary_pos_emb):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        angle = positions[..., None] * frequencies() * scale
        emb = torch.cat((angle, angle), -1)
        y = function(*leaves, emb.cos(), emb.sin())
        loss = sum(t.sin().sum() for t in y)
        results.append(torch.autograd.grad(loss, (*leaves, scale)))
    for a, b in zip(*results, strict=True):
        assert error(b, a) < 1e-5


def test_a_model_of_transformers(monkeypatch):
    """A Llama with our function in the place of its own: logits and gradients."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    settings = config()
    settings.update(
        {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 50, "head_dim": 64}
    )
    model = LlamaForCausalLM(settings)
    tokens = torch.randint(0, 50, (2, 12))

    def step():
        model.zero_grad()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        return [output.logits, *(p.grad.clone() for p in model.parameters())]

    wanted = step()
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return grape.apply_rotary_pos_emb(*args, **options)

    monkeypatch.setattr(llama(), "apply_rotary_pos_emb", counted)
    for got, ref in zip(step(), wanted, strict=True):
        assert error(got, ref) < 1e-4
    assert len(calls) == 2


def test_partial_tables_leave_the_rest():
    q, k, _ = hf_inputs()
    cos, sin = (torch.cat((t, t), -1) for t in fa_tables(9, 32))
    got, _ = grape.apply_rotary_pos_emb(q, k, cos[None], sin[None])
    assert torch.equal(got[..., 32:], q[..., 32:])
    wanted = llama().apply_rotary_pos_emb(q[..., :32], k[..., :32], cos[None], sin[None])[0]
    assert error(got[..., :32], wanted) < 3e-7


LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024
)
KINDS = {
    "default": ({}, {}),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "llama3": (
        {"rope_type": "llama3", **LLAMA3},
        {"factor": 8.0, "original_max_position": 1024},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"factor": 4.0, "original_max_position": 1024},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind):
    rope, options = KINDS[kind]
    module = llama().LlamaRotaryEmbedding(config(**rope))
    freqs, factor = grape.rotary_frequencies(64, scaling=kind, **options)
    assert torch.equal(freqs, module.inv_freq)
    assert factor == pytest.approx(module.attention_scaling, abs=1e-15)
    q, k, positions = hf_inputs()
    cos, sin = module(q, positions)
    a = grape.apply_rotary_pos_emb(q, k, cos, sin)[0]
    native = [t.transpose(1, 2) for t in (q, k)]
    options = dict(freqs=freqs, position_ids=positions, attention_factor=factor)
    b = grape.rotary_qk(*native, **options, angle="fp32")[0]
    assert torch.equal(a.transpose(1, 2), b)
    c = grape.rotary_qk(*native, **options)[0]
    assert error(c, b) < 1e-5


def test_ntk_raises_the_base():
    """At the full length that dynamic scaling is made for, its frequencies are the fixed ones."""
    module = llama().LlamaRotaryEmbedding(config(rope_type="dynamic", factor=1.0))
    freqs, factor = grape.rotary_frequencies(64, scaling="ntk", factor=1.0)
    assert torch.equal(freqs, module.inv_freq) and factor == 1.0
    stretched, _ = grape.rotary_frequencies(64, scaling="ntk", factor=4.0)
    assert stretched[0] == 1 and stretched[-1] == pytest.approx(freqs[-1].item() / 4, rel=1e-5)


def test_yarn_attention():
    options = dict(scaling="yarn", factor=40.0, original_max_position=4096)
    assert grape.rotary_frequencies(64, **options, mscale=1.0, mscale_all_dim=1.0)[1] == 1.0
    assert grape.rotary_frequencies(64, **options, attention_factor=0.5)[1] == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=7), "dim must be even"),
        (dict(dim=8, scaling="su"), "scaling must be one of"),
        (dict(dim=8, scaling="linear", factor=0.5), "factor must be at least 1, got 0.5"),
        (dict(dim=8, scaling="yarn", factor=2.0), "yarn needs original_max_position"),
        (dict(dim=2, scaling="ntk", factor=2.0), "ntk needs dim of at least 4"),
    ],
)
def test_bad_frequencies(arguments, message):
    with pytest.raises(ValueError, match=message):
        grape.rotary_frequencies(**arguments)


def test_tables_of_float64():
    q, _ = heads(dtype=F64)
    freqs = thetas(16)
    angle = torch.arange(7, dtype=F64)[:, None] * freqs
    y = grape.apply_rotary_emb(q, angle.cos(), angle.sin())
    assert error(y, turned(q, angle[None, :, None])) < 1e-14
