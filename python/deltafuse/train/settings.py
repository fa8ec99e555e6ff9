"""Everything that decides the result of a run; imports no torch, so that flags fail fast."""

import dataclasses
import math

from ..models.config import LATER, MAX_CHANNELS, MIXERS, POSITIONS, PRESETS, RESIDUALS, positions_of
from .errors import UserError

DDL_CHANNELS = 4  # as in the paper's models
OPTIMIZERS = ("mars", "mars-m", "adamw")
# lr for MARS, AdamW takes half of it: measured for `tiny` on the standard library's text; larger
# models want smaller rates
PRESET_SETTINGS = {
    "tiny": {"steps": 500, "batch": 8, "context": 256, "lr": 6e-3},
    "small": {"steps": 5000, "batch": 16, "context": 512, "lr": 2e-3},
    "medium": {"steps": 20000, "batch": 32, "context": 1024, "lr": 1e-3},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of, besides the model's sizes; recorded in config.json.

    Attributes:
        data: absolute paths, or None for the running Python's standard library.
        preset: name of the model's sizes.
        steps, batch, context: optimizer steps, sequences a step, bytes a sequence.
        lr: peak learning rate, after `warmup` steps; falls to a tenth along a cosine.
        optimizer: "mars" (MARS-AdamW), "mars-m" or "adamw"; beta1: of its first moment, with MARS
            that of matrices.
        clip: bound of the gradient's norm over all parameters.
        seed: of the initial weights, the order of the data and the sample.
        eval_every, checkpoint_every: steps between validations and between checkpoints.
        compile: run the model through torch.compile.
        residual, value_channels, mixer, position: as in `ModelConfig`.

    Raises:
        UserError: a value out of range, named as the flag.
    """

    data: tuple | None
    preset: str
    steps: int
    batch: int
    context: int
    lr: float
    optimizer: str = "mars"
    beta1: float = 0.9
    weight_decay: float = 0.01
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 100
    compile: bool = False
    residual: str = "plain"
    value_channels: int = 1
    mixer: str = "gated_delta"
    position: str = "none"

    def __post_init__(self):
        for name in ("steps", "batch", "context", "eval_every", "checkpoint_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("seed", 0 <= self.seed < 2**32, "in 0 .. 2^32 - 1")
        self._check("lr", 0 < self.lr < math.inf, "a positive number")
        self._check("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self._check("optimizer", self.optimizer in OPTIMIZERS, "one of " + ", ".join(OPTIMIZERS))
        self._check("preset", self.preset in PRESETS, "one of " + ", ".join(PRESETS))
        self._check("residual", self.residual in RESIDUALS, "one of " + ", ".join(RESIDUALS))
        plain = self.residual == "plain"
        most, meaning = (1, "1 without --residual ddl") if plain else (MAX_CHANNELS, "in 1 .. 16")
        self._check("value_channels", 1 <= self.value_channels <= most, meaning)
        self._check("mixer", self.mixer in MIXERS, "one of " + ", ".join(MIXERS))
        positions = positions_of(self.mixer)
        meaning = "one of " + ", ".join(positions)
        if self.mixer != "attention":
            meaning = "left out without --mixer attention"
        self._check("position", self.position in positions, meaning)

    def model_config(self):
        """The sizes of the preset's model with these residual connections and mixers."""
        names = ("residual", "value_channels", "mixer", "position")
        chosen = {name: getattr(self, name) for name in names}
        return dataclasses.replace(PRESETS[self.preset], **chosen)

    def _check(self, name, good, meaning):
        if not good:
            raise UserError(f"{flag(name)} must be {meaning}, got {getattr(self, name)}")

    @classmethod
    def from_given(cls, given):
        """Settings of a new run: the flags that were given, then those of the preset."""
        preset = given.get("preset", "tiny")
        if preset not in PRESET_SETTINGS:
            raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset}")
        settings = {"data": None, "preset": preset, **PRESET_SETTINGS[preset]}
        if given.get("residual") == "ddl":
            settings["value_channels"] = DDL_CHANNELS
        if given.get("mixer") == "attention":
            settings["position"] = POSITIONS[0]
        if given.get("optimizer") == "adamw":
            settings["lr"] /= 2
        return cls(**settings | given)

    @classmethod
    def from_record(cls, record, where):
        """Settings of a recorded run; UserError if the record is not one."""
        names = {field.name for field in dataclasses.fields(cls)}
        record = {**LATER, **record} if isinstance(record, dict) else record
        if not isinstance(record, dict) or set(record) != names:
            raise UserError(f"{where} does not hold the settings of a run")
        data = record["data"]
        try:
            return cls(**{**record, "data": None if data is None else tuple(data)})
        except TypeError:
            raise UserError(f"{where} does not hold the settings of a run") from None

    def refuse_changes(self, given, where):
        """UserError naming the first given flag that differs from this recorded run."""
        for name, value in given.items():
            recorded = getattr(self, name)
            if value != recorded:
                raise UserError(
                    f"{flag(name)} {_shown(value)} differs from the run in {where}, "
                    f"which has {_shown(recorded)}: resume without it, or choose another --out"
                )


def flag(name):
    return "--" + name.replace("_", "-")


def _shown(value):
    return " ".join(value) if isinstance(value, tuple) else str(value)
