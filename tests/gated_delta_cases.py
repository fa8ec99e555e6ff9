"""What the gated delta tests share: inputs, limits, comparison with the float64 recurrence."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from deltafuse import _library
from deltafuse.gated_delta import chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from deltafuse.testing import assert_close


class Case(NamedTuple):
    """B, T, H, HV, K, V; lengths of packed sequences (B = 1); whether S_0 and dS_T are given."""

    B: int = 1
    T: int = 130
    H: int = 1
    HV: int = 2
    K: int = 16
    V: int = 20
    lengths: tuple = ()
    h0: bool = True
    dht: bool = True

    @property
    def N(self):
        return len(self.lengths) or self.B


# T around multiples of 16 and 64, K and V each below, at and above vector and tile widths, with
# every group size; what else differs between cases is the presence of S_0 and of dS_T
CASES = {
    "one_token": Case(B=3, T=1, HV=1, K=16, V=1, dht=False),
    "two_tokens_group3": Case(T=2, H=2, HV=6, K=1, V=16),
    "T15": Case(B=2, T=15, H=2, HV=2, K=60, V=60, h0=False),
    "T16_group8": Case(T=16, HV=8, K=64, V=16),
    "T17": Case(T=17, H=2, HV=2, K=100, V=60, dht=False),
    "T63_group4": Case(B=2, T=63, HV=4, K=16, V=64, h0=False, dht=False),
    "T64": Case(T=64, H=2, HV=2, K=128, V=128),
    "T65_group2": Case(T=65, H=2, HV=4, K=60, V=192),
    "T127_wide_K": Case(T=127, HV=1, K=256, V=100, h0=False),
    "T128_wide_V": Case(T=128, HV=2, K=64, V=256, dht=False),
    "T500": Case(B=2, T=500, HV=2, K=16, V=20),
    "packed": Case(T=150, HV=2, K=20, V=24, lengths=(0, 1, 63, 64, 0, 17)),  # 5 tokens of tail
}
LONG_CASES = {
    "T2048": Case(T=2048, H=2, HV=4, K=60, V=60),
    "K256_V256": Case(T=300, H=1, HV=3, K=256, V=256),
    "K1_V1_group8": Case(B=2, T=500, HV=8, K=1, V=1),
    "packed_long": Case(T=1300, HV=2, K=64, V=128, lengths=(0, 1, 63, 64, 65, 1000, 0)),
}
# relative error of o and S_T, of dq, dk, dv, dS_0, and of dg, dbeta (the published limits)
LIMITS = {
    torch.float64: (1e-11, 1e-11, 1e-11),
    torch.float32: (5e-6, 2e-5, 2e-5),
    torch.float16: (2e-3, 4e-3, 4e-3),
    torch.bfloat16: (6e-3, 8e-3, 1e-2),
}
SMALLEST = 1e-36  # float32 keeps no relative precision much below
FUSED = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
}


def require_kernel(device):
    """Skips where the operator would run on the reference, which is tested by itself."""
    if _library.kernel("gated_delta_fwd", torch.empty(0, device=device)) is None:
        pytest.skip("no chunk kernel for this device in this build")


def offsets(lengths, dtype=torch.int64, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def make(case, dtype=torch.float32, device="cpu", seed=0, fused=False):
    """Tensors by name: unit keys, g in (-2, 0), beta in (0, 1); or raw ones for fused options."""
    B, T, H, HV, K, V = case[:6]
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {
        "q": F.normalize(normal(B, T, H, K), dim=-1).to(dtype),
        "k": F.normalize(normal(B, T, H, K), dim=-1).to(dtype),
        "v": normal(B, T, HV, V).to(dtype),
        "g": -2 * normal(B, T, HV).sigmoid().to(wide),
        "beta": normal(B, T, HV).sigmoid().to(wide),
    }
    if fused:
        x["q"], x["k"] = (normal(B, T, H, K).to(dtype) for _ in "qk")
        x["g"], x["beta"] = (normal(B, T, HV).to(dtype) for _ in "gb")
        x["A_log"], x["dt_bias"] = (normal(HV).to(wide) for _ in "Ad")
    if case.h0:
        x["initial_state"] = normal(case.N, HV, K, V).to(wide)
    x = {name: t.to(device).requires_grad_() for name, t in x.items()}
    if case.lengths:
        x["cu_seqlens"] = offsets(case.lengths, device=device)
    return x


def exactly(x):
    """The same values in float64, on the CPU, as new leaves."""
    return {
        name: t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.cpu()
        for name, t in x.items()
    }


def outputs_and_gradients(function, x, dht=True, seed=7, **options):
    """{"o", "ht", "dq", ...} of function(**x) for fixed random gradients of o and of S_T."""
    o, ht = function(**x, output_final_state=True, **options)
    random = torch.Generator().manual_seed(seed)
    outputs = (o, ht) if dht else (o,)
    # bfloat16 values, which every dtype holds exactly: all dtypes get the same gradients
    ds = [torch.randn(t.shape, generator=random).bfloat16() for t in outputs]
    leaves = {name: t for name, t in x.items() if t.is_floating_point()}
    grads = torch.autograd.grad(
        outputs, tuple(leaves.values()), [d.to(t) for d, t in zip(ds, outputs, strict=True)]
    )
    return {"o": o, "ht": ht, **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def limit_of(name, dtype):
    limits = LIMITS[dtype]
    if name in ("o", "ht"):
        return limits[0]
    return limits[1] if name in ("dq", "dk", "dv", "dinitial_state") else limits[2]


def compare(
    x,
    factor=1,
    function=chunk_gated_delta_rule,
    dht=True,
    reference=naive_recurrent_gated_delta_rule,
    **options,
):
    """function against reference in float64: o, S_T and every gradient within the limits."""
    dtype = x["q"].dtype
    actual = outputs_and_gradients(function, x, dht, **options)
    for name in ("chunk_size", "auto_cp", "save_states"):  # without effect on the values
        options.pop(name, None)
    expected = outputs_and_gradients(reference, exactly(x), dht, **options)
    for name, value in expected.items():
        assert actual[name].dtype == (
            dtype if name == "o" else x[name[1:]].dtype if name != "ht" else wide_dtype(dtype)
        )
        if dtype != torch.float64 and value.abs().amax() < SMALLEST:
            assert actual[name].abs().amax() < SMALLEST, name
            continue
        assert_close(name, actual[name].cpu(), value, factor * limit_of(name, dtype))
    return actual, expected


def wide_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
