"""Models of Hugging Face transformers on our kernels: the same numbers as on its own fallback."""

import pytest
import torch

from deltafuse.integrations import transformers as integration
from deltafuse.testing import relative_error

transformers = pytest.importorskip("transformers", minversion="5.24")
VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
MODELS = {  # name: (configuration, model, sizes)
    "Qwen3-Next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**SIZES, **EXPERTS}),
    "Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", SIZES),
    "Qwen3.5 MoE": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**SIZES, **EXPERTS}),
    "OLMo Hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {**SIZES, "pad_token_id": 0}),
}


def make(name, dtype=torch.float32):
    config, model, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    for key, parameter in model.named_parameters():
        if key.endswith("A_log"):  # decays that reach over many tokens
            torch.nn.init.constant_(parameter, -3)
    return model.to(dtype).eval()


def tokens(*size):
    return torch.randint(1, VOCABULARY, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def model(request):
    yield make(request.param)
    integration.restore()


@pytest.fixture
def qwen():
    yield make("Qwen3-Next")
    integration.restore()


def both(model, run):
    """run() on the fallback of transformers and on our kernels."""
    expected = run()
    integration.replace(model)
    return run(), expected


@torch.no_grad()
def test_logits(model):
    x = tokens(2, 150)
    ours, theirs = both(model, lambda: model(x).logits)
    assert relative_error(ours, theirs) < 1e-5
    assert not torch.equal(ours, theirs)  # another kernel ran


def test_gradients(model):
    x = tokens(2, 70)

    def run():
        model.zero_grad()
        model(x, labels=x).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours, theirs = both(model, run)
    assert ours.keys() == theirs.keys() and any("A_log" in name for name in ours)
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name


@torch.no_grad()
def test_generation_with_a_cache(model):
    x = tokens(2, 20)

    def run():
        out = model.generate(
            x, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits)

    (sequences, logits), (expected, expected_logits) = both(model, run)
    assert torch.equal(sequences, expected)
    assert relative_error(logits, expected_logits) < 1e-5


@torch.no_grad()
def test_a_prompt_in_two_parts(qwen):
    x = tokens(1, 90)
    integration.replace(qwen)
    first = qwen(x[:, :50], use_cache=True)
    second = qwen(x[:, 50:], past_key_values=first.past_key_values, use_cache=True)
    whole = qwen(x).logits
    assert relative_error(torch.cat((first.logits, second.logits), 1), whole) < 1e-5


@torch.no_grad()
def test_left_padding(qwen):
    x, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :13] = 0
    ours, theirs = both(qwen, lambda: qwen(x, attention_mask=mask).logits)
    assert relative_error(ours[mask.bool()], theirs[mask.bool()]) < 1e-5


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(qwen):
    x, lengths = tokens(1, 60), [23, 1, 36]
    integration.replace(qwen)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    longest = max(lengths)
    packed = qwen(
        x,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=longest,
        max_length_k=longest,
    ).logits
    alone = torch.cat([qwen(part).logits for part in x.split(lengths, dim=1)], 1)
    assert relative_error(packed, alone) < 1e-5


@torch.no_grad()
def test_bfloat16():
    # both round at other places: held against the same weights in float32
    x, exact = tokens(2, 150), make("Qwen3.5")
    expected = exact(x).logits
    model = make("Qwen3.5", torch.bfloat16)
    try:
        ours, theirs = both(model, lambda: model(x).logits)
    finally:
        integration.restore()
    assert relative_error(ours, expected) < 1.2 * relative_error(theirs, expected)


def test_restore(qwen):
    module = transformers.models.qwen3_next.modeling_qwen3_next
    norm = module.Qwen3NextRMSNormGated
    before = module.torch_chunk_gated_delta_rule, norm.forward
    integration.replace(qwen)
    integration.replace(qwen)
    assert module.torch_chunk_gated_delta_rule is integration.chunk_gated_delta_rule
    assert norm.forward is integration.gated_norm
    integration.restore()
    assert (module.torch_chunk_gated_delta_rule, norm.forward) == before


def test_errors(qwen):
    with pytest.raises(ValueError, match="no gated delta rule layer of transformers in Linear"):
        integration.replace(torch.nn.Linear(2, 2))
    integration.replace(qwen)
    with pytest.raises(ValueError, match="cu_seq_lens_q, got seq_idx alone"):
        qwen(tokens(1, 8), seq_idx=torch.zeros(1, 8, dtype=torch.int32))
