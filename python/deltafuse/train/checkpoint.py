"""One safetensors file with the model, the optimizer, the position in the data and the RNG.

Tensors are named model.*, optimizer.<parameter>.* and rng.*; the rest is JSON in the file's
metadata, together with a SHA-256 of everything, so that a damaged file is noticed.
"""

import dataclasses
import hashlib
import json

import torch

from .errors import UserError, describe
from .files import write_atomically

FORMAT = 1


@dataclasses.dataclass
class Checkpoint:
    """What was read: `tensors` by name, `meta` with step, seconds, batches, model, settings."""

    tensors: dict
    meta: dict

    def part(self, prefix):
        """The tensors below "prefix.", without it."""
        start = prefix + "."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}


def save(path, model, optimizer, meta):
    """Replaces the checkpoint atomically; UserError if the disk is full, the old one stays."""
    from safetensors.torch import save as serialize

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    scalars = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            else:
                scalars[key] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps({**meta, "format": FORMAT, "scalars": scalars}, sort_keys=True)
    data = serialize(tensors, metadata={"deltafuse": text, "sha256": digest(tensors, text)})
    write_atomically(path, data)


def load(path):
    """Reads and verifies a checkpoint.

    Raises:
        UserError: no such file, not a checkpoint, truncated, or its checksum does not match.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no checkpoint: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read checkpoint {describe(error)}") from None
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"corrupt or truncated checkpoint {path}: {reason}") from None
    text = metadata.get("deltafuse")
    if text is None:
        raise UserError(f"not a checkpoint of deltafuse train: {path}")
    if metadata.get("sha256") != digest(tensors, text):
        raise UserError(f"corrupt checkpoint {path}: its checksum does not match")
    meta = json.loads(text)
    if meta["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {meta['format']}, this is {FORMAT}")
    return Checkpoint(tensors, meta)


def digest(tensors, text):
    """SHA-256 over the metadata and every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        total.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def restore_model(checkpoint, model, path):
    """Copies the weights; UserError naming the first tensor that does not fit."""
    given, expected = checkpoint.part("model"), model.state_dict()
    for name in sorted(given.keys() | expected.keys()):
        shapes = [tuple(d[name].shape) if name in d else "absent" for d in (given, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"checkpoint of another config: {name} is {shapes[0]} in {path}, "
                f"{shapes[1]} in the model"
            )
    model.load_state_dict(given)


def restore_optimizer(checkpoint, optimizer):
    """The state of every parameter; groups and their settings stay those of the new optimizer."""
    values = {**checkpoint.part("optimizer")}
    for key, scalar in checkpoint.meta["scalars"].items():
        values[key.removeprefix("optimizer.")] = scalar
    state = {}
    for key, value in values.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def restore_rng(checkpoint):
    rng = checkpoint.part("rng")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
