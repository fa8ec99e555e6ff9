"""The folder of a run: config.json, metrics.jsonl, loss.png, checkpoint/."""

import contextlib
import json
import os
from pathlib import Path

from ..models.config import LATER, ModelConfig
from .errors import UserError, describe
from .files import write_atomically


class RunFolder:
    """Paths of a run, its recorded config, and rows of its metrics."""

    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"
        self.checkpoint = self.path / "checkpoint" / "state.safetensors"

    def refuse_existing(self):
        """UserError if a run is there already, or something that is no folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file")
        for existing in (self.config, self.metrics, self.checkpoint):
            if existing.exists():
                raise UserError(
                    f"{self.path} already holds a run ({existing.relative_to(self.path)}): "
                    "continue it with --resume, or choose another --out"
                )

    def create(self, config):
        """Makes the folder and writes config.json."""
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {describe(error)}") from None
        write_atomically(self.config, json.dumps(config, indent=2).encode() + b"\n")

    def read_config(self):
        """config.json as a dict, with the model's sizes checked; UserError if it is not there."""
        if not self.path.is_dir():
            raise UserError(f"no such run folder: {self.path}")
        try:
            config = json.loads(self.config.read_text())
            config["model"] = ModelConfig.from_dict(config["model"])
            config["settings"], config["corpus"]["sha256"]
        except OSError as error:
            raise UserError(f"no run to continue or to read: {describe(error)}") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.config} is not the config of a run: {reason}") from None
        return config

    def check_same_model(self, checkpoint, model):
        """UserError naming the first size in which the checkpoint and config.json differ."""
        other = {**LATER, **checkpoint.meta["model"]}
        for name, value in vars(model).items():
            if other.get(name) != value:
                raise UserError(
                    f"checkpoint of another config: {name} is {other.get(name)} in "
                    f"{self.checkpoint}, {value} in {self.config}"
                )


class MetricsLog:
    """Appends rows to metrics.jsonl; a resumed run first drops what its checkpoint has not seen."""

    def __init__(self, path, last_step):
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= last_step]
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(path, kept.encode())
        self._file = open(path, "a")  # noqa: SIM115

    def append(self, row):
        self.rows.append(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None

    def sync(self):
        """Before a checkpoint: its rows must not be lost with a power cut."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None

    def close(self):
        with contextlib.suppress(OSError):  # a full disk has been reported by append
            self._file.close()


def read_rows(path):
    """Rows of metrics.jsonl up to the first incomplete one, which a killed run may leave."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
