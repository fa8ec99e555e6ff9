"""Checkpoints of the six models in the paper's repository load as they are, with its logits.

`NAMES` lists what those models save. `Model` is assembled from our modules under these names;
`expected_logits` states the same models' mathematics once more, from the tensors alone.
"""

import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltafuse.ddl import (
    DDLBlock,
    DDLStack,
    InputEmbedExpander,
    ResidualCompressor,
    RMSNorm,
    ShiftLinear,
)
from deltafuse.testing import assert_close
from test_ddl_modules import normal

D, HEADS, HEAD_DIM, VOCAB, LAYERS, K = 64, 2, 32, 50, 2, 4
INNER = math.floor(8 / 3 * D)
# variant: (read-out, whether the input is expanded by a convolution); None: one channel
VARIANTS = {
    "vdim1": (None, False),
    "TC": ("tc", False),
    "TC-EC": ("tc", True),
    "CC": ("cc", False),
    "CC-EC": ("cc", True),
    "CC-EC-accelerated": ("cc", True),
}
NAMES = {
    "top": {
        "transformer.wte.weight": (VOCAB, D),
        "lm_head.weight": (VOCAB, D),
        "ln_f.weight": (D,),
    },
    "block": {
        **{f"attn.{name}.weight": (HEADS * HEAD_DIM, D) for name in ("c_q", "c_k", "c_v")},
        "attn.c_proj.weight": (D, HEADS * HEAD_DIM),
        "attn.q_rms.weight": (HEAD_DIM,),
        "attn.k_rms.weight": (HEAD_DIM,),
        "mlp.c_fc1.weight": (INNER, D),
        "mlp.c_fc2.weight": (INNER, D),
        "mlp.c_proj.weight": (D, INNER),
        "ln_1.weight": (D,),
        "ln_2.weight": (D,),
    },
    "shift": {
        f"attn.{name}.{part}": shape
        for name in ("c_k", "c_v")
        for part, shape in (
            ("linear.weight", (HEADS * HEAD_DIM, D)),
            ("shift_proj.weight", (HEADS, D)),
        )
    },
    "beta": {"beta.weight": (1, D), "beta.bias": (1,)},
    "two_layers": {"beta_in.weight": (128, D), "beta_out.weight": (1, 128), "beta_out.bias": (1,)},
}


def compressor_names(read_out, channels):
    taps = {"cc": {"weight": (D, channels)}, "tc": {"shortconv.weight": (D * channels, K)}}
    return {**taps[read_out], "read": (channels,)}


def shapes_of(variant, channels, two_layers=False, shift=False):
    """{name: shape} of a checkpoint."""
    read_out, expanded = VARIANTS[variant]
    block = dict(NAMES["block"])
    if shift:
        del block["attn.c_k.weight"], block["attn.c_v.weight"]
        block.update(NAMES["shift"])
    gates = {**NAMES["two_layers" if two_layers else "beta"]}
    gates.update({"v_proj.weight": (channels, D), "v_proj.bias": (channels,)})
    for ddl in ("ddl_attn", "ddl_mlp"):
        block.update({f"{ddl}.{name}": shape for name, shape in gates.items()})
    top = dict(NAMES["top"])
    if read_out:
        names = compressor_names(read_out, channels)
        block.update({f"compress.{name}": shape for name, shape in names.items()})
        top.update({f"readout.{name}": shape for name, shape in names.items()})
    if expanded:
        top["input_embed.conv.weight"] = (D * channels, 1, K)
    layers = {f"transformer.h.{i}.{n}": s for i in range(LAYERS) for n, s in block.items()}
    return {**top, **layers}


def checkpoint_of(*args, **options):
    """A random checkpoint, the head tied to the embedding."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes_of(*args, **options).items()):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        shift = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
        shift = 1.0 if "_rms" in name else shift
        tensors[name] = scale * normal(*shape, seed=i, dtype=torch.float32) + shift
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return tensors


# Our modules under the repository's names


def rotated(x):
    """Rotary position embedding of x [B, T, H, D], halves as pairs, base 10000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, shift):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.c_q = nn.Linear(D, width, bias=False)
        for name in ("c_k", "c_v"):
            linear = ShiftLinear(D, width, HEADS, False) if shift else nn.Linear(D, width, False)
            self.add_module(name, linear)
        self.c_proj = nn.Linear(width, D, bias=False)
        self.q_rms, self.k_rms = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, HEAD_DIM)) for f in (self.c_q, self.c_k, self.c_v))
        q, k = self.q_rms(rotated(q)), self.k_rms(rotated(k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc1 = nn.Linear(D, INNER, bias=False)
        self.c_fc2 = nn.Linear(D, INNER, bias=False)
        self.c_proj = nn.Linear(INNER, D, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class Model(nn.Module):
    def __init__(self, variant, channels, shift=False, **config):
        super().__init__()
        read_out, expanded = VARIANTS[variant]
        names = {"hidden_size": D, "ddl_value_channels": channels, **config}
        if read_out is not None:
            names.update({"ddl_state_shortconv_kernel_size": K, "ddl_read_out": read_out})
        config = types.SimpleNamespace(**names)
        blocks = [DDLBlock(Attention(shift), MLP(), config) for _ in range(LAYERS)]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, D), "h": DDLStack(blocks)})
        self.readout = self.input_embed = None
        if read_out is not None:
            self.readout = ResidualCompressor(D, channels, read_out)
        if expanded:
            self.input_embed = InputEmbedExpander(D, channels, kernel_size=K)
        self.channels = channels
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.ln_f = RMSNorm(D)

    def forward(self, tokens):
        x = self.transformer["wte"](tokens)
        if self.input_embed is not None:
            x = self.input_embed(x)
        elif self.readout is not None:
            x = InputEmbedExpander(D, self.channels, "repeat")(x)
        _, c = self.transformer["h"](x, read_out=self.readout, norm=self.ln_f)
        return self.lm_head(c)


# The repository's mathematics, from its tensors


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def delayed(x, steps):
    """x [B, T, ...] of `steps` tokens ago, zeros before the first one."""
    return torch.cat([torch.zeros_like(x[:, :steps]), x[:, : x.shape[1] - steps]], 1)


def read_state(t, prefix, x):
    """x [B, T, D, channels] -> [B, T, D]."""
    if x.dim() == 3:
        return x
    read, channels = t[prefix + "read"], x.shape[-1]
    out = torch.zeros_like(x)
    if prefix + "weight" in t:  # along the channels, (K - 1) // 2 zeros before them
        for j in range(channels):
            for tap in range(channels):
                source = j + tap - (channels - 1) // 2
                if 0 <= source < channels:
                    out[..., j] += t[prefix + "weight"][:, tap] * x[..., source]
    else:  # over time, the last tap is the current token's
        taps = t[prefix + "shortconv.weight"].view(D, channels, K)
        for steps in range(K):
            out += taps[..., K - 1 - steps] * delayed(x, steps)
    return (out * read).sum(-1)


def key_or_value(t, prefix, c):
    if prefix + "weight" in t:
        return c @ t[prefix + "weight"].T
    o = (c @ t[prefix + "linear.weight"].T).unflatten(-1, (HEADS, HEAD_DIM))
    a = torch.sigmoid(c @ t[prefix + "shift_proj.weight"].T)[..., None]
    return (a * delayed(o, 1) + (1 - a) * o).flatten(-2)


def attention(t, prefix, c):
    q = c @ t[prefix + "c_q.weight"].T
    k, v = (key_or_value(t, prefix + name, c) for name in ("c_k.", "c_v."))
    q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
    q, k = rms(rotated(q), t[prefix + "q_rms.weight"]), rms(rotated(k), t[prefix + "k_rms.weight"])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return out.flatten(-2) @ t[prefix + "c_proj.weight"].T


def mlp(t, prefix, c):
    inner = F.silu(c @ t[prefix + "c_fc1.weight"].T) * (c @ t[prefix + "c_fc2.weight"].T)
    return inner @ t[prefix + "c_proj.weight"].T


def rewritten(t, prefix, x, k, x_in, c, constant):
    if prefix + "beta.weight" in t:
        z = c @ t[prefix + "beta.weight"].T + t[prefix + "beta.bias"]
    else:
        hidden = torch.tanh(c @ t[prefix + "beta_in.weight"].T)
        z = hidden @ t[prefix + "beta_out.weight"].T + t[prefix + "beta_out.bias"]
    v = 4 * torch.sigmoid(x_in @ t[prefix + "v_proj.weight"].T + t[prefix + "v_proj.bias"])
    v = torch.full_like(v, constant) if constant else v
    k = k / (k.square().sum(-1, keepdim=True) + 1e-10).sqrt()
    wide = x if x.dim() == 4 else x[..., None]
    error = v - (k[..., None] * wide).sum(-2)
    return x + (k[..., None] * (2 * torch.sigmoid(z) * error)[..., None, :]).reshape(x.shape)


def expected_logits(t, tokens, channels, constant=None):
    x = t["transformer.wte.weight"][tokens]
    if "input_embed.conv.weight" in t:
        taps = t["input_embed.conv.weight"].view(D, channels, K)
        x = sum(taps[..., K - 1 - s] * delayed(x, s)[..., None] for s in range(K))
    elif channels > 1:
        x = torch.stack([x] * channels, -1)
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        for norm, layer, sub in (("ln_1", attention, "attn"), ("ln_2", mlp, "mlp")):
            x_in = read_state(t, h + "compress.", x)
            c = rms(x_in, t[f"{h}{norm}.weight"])
            x = rewritten(t, f"{h}ddl_{sub}.", x, layer(t, f"{h}{sub}.", c), x_in, c, constant)
    c = rms(read_state(t, "readout.", x), t["ln_f.weight"])
    return c @ t["lm_head.weight"].T


TOKENS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_check_14_strict_load_and_logits(variant):
    channels = 1 if variant == "vdim1" else 4
    tensors = checkpoint_of(variant, channels)
    model = Model(variant, channels)
    model.load_state_dict(tensors, strict=True)
    assert_close("logits", model(TOKENS), expected_logits(tensors, TOKENS, channels), 1e-5)


@pytest.mark.parametrize(
    "variant, options, config",
    [
        ("CC", {"two_layers": True}, {"ddl_beta_single_linear": False}),
        ("vdim1", {"two_layers": True}, {"ddl_beta_single_linear": False}),
        ("CC-EC", {"shift": True}, {}),
        ("CC", {}, {"ddl_v_constant": True}),
        ("vdim1", {}, {"ddl_v_dim1_constant": True}),
    ],
)
def test_check_14_options_of_the_repository(variant, options, config):
    channels = 1 if variant == "vdim1" else 4
    tensors = checkpoint_of(variant, channels, **options)
    model = Model(variant, channels, options.get("shift", False), **config)
    model.load_state_dict(tensors, strict=True)
    constant = 2.0 if any("constant" in name for name in config) else None
    expected = expected_logits(tensors, TOKENS, channels, constant)
    assert_close("logits", model(TOKENS), expected, 1e-5)


def test_check_14_a_checkpoint_of_another_variant_does_not_load():
    with pytest.raises(RuntimeError, match="shortconv.weight"):
        Model("CC", 4).load_state_dict(checkpoint_of("TC", 4), strict=True)
    with pytest.raises(RuntimeError, match="input_embed.conv.weight"):
        Model("CC", 4).load_state_dict(checkpoint_of("CC-EC", 4), strict=True)


def test_model_saves_these_names_and_no_others():
    for variant in VARIANTS:
        channels = 1 if variant == "vdim1" else 4
        saved = {name: tuple(t.shape) for name, t in Model(variant, channels).state_dict().items()}
        assert saved == shapes_of(variant, channels)
