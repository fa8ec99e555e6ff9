"""Sizes of a language model; imports no torch, so that flags are checked fast."""

import dataclasses
import json

RESIDUALS = ("plain", "ddl")
MIXERS = ("gated_delta", "attention")
POSITIONS = ("rope", "grape-m", "grape-m-ctx", "grape-mixture")
MAX_CHANNELS = 16
# names that configurations from before them lack, with what they were
LATER = {"residual": "plain", "value_channels": 1, "mixer": "gated_delta", "position": "none"}


def positions_of(mixer):
    """What `position` may be with a mixer."""
    return POSITIONS if mixer == "attention" else ("none",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `GatedDeltaLM`.

    Attributes:
        vocab_size: number of tokens; 256 for bytes.
        hidden_size: width of the residual stream.
        num_layers: blocks, each a sequence mixer and a SwiGLU MLP.
        num_heads: q/k heads H; num_v_heads: v heads HV, a multiple of H.
        head_dim: K, channels of a q/k head; V = K * expand_v.
        mlp_size: inner channels of the MLP.
        conv_size: width of the causal short convolution.
        norm_eps: added inside the root of each RMSNorm.
        residual: "plain" (x + f(x)), or "ddl", the rewrite of Deep Delta Learning.
        value_channels: with "ddl" the residual stream is [hidden_size, value_channels] a token.
        mixer: "gated_delta", the GatedDeltaNet layer, or "attention", with the same heads and
            without convolution.
        position: what attention knows positions by: "rope", "grape-m" (learned frequencies),
            "grape-m-ctx" (contextual phase) or "grape-mixture" (learned planes); "none" with
            gated_delta.

    Raises:
        ValueError: a size is not a positive whole number, or sizes do not fit together.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    num_v_heads: int = 2
    head_dim: int = 32
    expand_v: int = 2
    mlp_size: int = 384
    conv_size: int = 4
    norm_eps: float = 1e-5
    residual: str = "plain"
    value_channels: int = 1
    mixer: str = "gated_delta"
    position: str = "none"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"ModelConfig: {field.name} must be a whole number >= 1: {value}")
        if not (isinstance(self.norm_eps, float) and self.norm_eps > 0):
            raise ValueError(f"ModelConfig: norm_eps must be > 0: {self.norm_eps}")
        if self.num_v_heads % self.num_heads:
            raise ValueError(
                f"ModelConfig: num_v_heads ({self.num_v_heads}) must be a multiple of "
                f"num_heads ({self.num_heads})"
            )
        if max(self.head_dim, self.head_dim * self.expand_v) > 256:
            raise ValueError(
                f"ModelConfig: head_dim ({self.head_dim}) and head_dim * expand_v "
                f"({self.head_dim * self.expand_v}) must be at most 256"
            )
        self._check_residual()
        self._check_mixer()

    def _check_residual(self):
        if self.residual not in RESIDUALS:
            raise ValueError(f"ModelConfig: residual must be plain or ddl: {self.residual!r}")
        if self.value_channels > (1 if self.residual == "plain" else MAX_CHANNELS):
            raise ValueError(
                f"ModelConfig: value_channels must be 1 with residual plain and at most "
                f"{MAX_CHANNELS} with ddl: {self.value_channels} with {self.residual}"
            )

    def _check_mixer(self):
        if self.mixer not in MIXERS:
            raise ValueError(f"ModelConfig: mixer must be gated_delta or attention: {self.mixer!r}")
        positions = positions_of(self.mixer)
        if self.position not in positions:
            raise ValueError(
                f"ModelConfig: position must be {' or '.join(positions)} with mixer {self.mixer}: "
                f"{self.position!r}"
            )
        if self.mixer == "attention" and self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim must be even for attention: {self.head_dim}")

    def to_json(self):
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `dataclasses.asdict`; ValueError for unknown or missing names."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {**LATER, **values} if isinstance(values, dict) else values
        if not isinstance(values, dict) or set(values) != names:
            given = set(values) if isinstance(values, dict) else set()
            wrong = ", ".join(sorted(given ^ names))
            raise ValueError(f"ModelConfig: unknown or missing: {wrong}")
        return cls(**values)

    @classmethod
    def from_json(cls, text):
        return cls.from_dict(json.loads(text))


PRESETS = {
    "tiny": ModelConfig(),
    "small": ModelConfig(
        hidden_size=384,
        num_layers=8,
        num_heads=4,
        num_v_heads=4,
        head_dim=64,
        mlp_size=1024,
    ),
    "medium": ModelConfig(
        hidden_size=768,
        num_layers=16,
        num_heads=6,
        num_v_heads=6,
        head_dim=128,
        mlp_size=2048,
    ),
}
