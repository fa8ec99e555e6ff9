"""Bytes of text files, split by file; batches whose order depends on the seed alone."""

import dataclasses
import hashlib
import os
from pathlib import Path

import torch

from .errors import UserError, describe

SEPARATOR = b"\0"  # before each file; text never has it, so that it can also start a sample
VALIDATION_PART = 0.05
# of the standard library: tables and documentation that programs wrote
GENERATED = ("encodings/", "pydoc_data/")
# tests of the standard library are not prose about anything, and some are not UTF-8 on purpose
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors, and what describes them.

    Attributes:
        train, validation: uint8 [bytes].
        train_files, validation_files: how many files each came from.
        unigram_nats: cross entropy of the validation bytes under the training histogram, a byte.
        sha256: of both parts; a resumed run must find the same.
    """

    train: torch.Tensor
    validation: torch.Tensor
    train_files: int
    validation_files: int
    unigram_nats: float
    sha256: str

    def describe(self):
        """The numbers for config.json."""
        return {
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
            "train_files": self.train_files,
            "validation_files": self.validation_files,
            "unigram_nats": self.unigram_nats,
            "sha256": self.sha256,
        }


def load_corpus(paths, context):
    """The corpus of text files and folders, or of the standard library's sources (paths None).

    A twentieth of the files, chosen by the hash of their names, is for validation; of a single
    file it is the last tenth. Raises UserError for what cannot be trained on, naming the path.
    """
    found = find_files(paths)
    texts = {name: _read_text(path) for name, path in found.items()}
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise UserError(f"empty corpus: no text in {_shown(paths)}")
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // 10
        parts, counts = (SEPARATOR + text[:cut], text[cut:]), (1, 1)
    else:
        chosen = validation_names(texts)
        files = [[t for n, t in texts.items() if (n in chosen) == held] for held in (False, True)]
        parts = [b"".join(SEPARATOR + text for text in group) for group in files]
        counts = [len(group) for group in files]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) <= context:
            raise UserError(
                f"corpus shorter than one context: {len(part)} bytes for {name} "
                f"in {_shown(paths)}, a context of {context} needs {context + 1}"
            )
    digest = hashlib.sha256(parts[0] + b"\0\0" + parts[1]).hexdigest()
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus(train, validation, *counts, unigram_entropy(train, validation), digest)


def find_files(paths):
    """{name: path} in a fixed order; names are relative to the folder that was given."""
    if paths is None:
        root = Path(os.__file__).parent
        return {
            name: path
            for name, path in _walk(root)
            if path.suffix == ".py" and not name.startswith(GENERATED)
        }
    found = {}
    for given in map(Path, paths):
        if given.is_dir():
            found.update((f"{given.name}/{name}", path) for name, path in _walk(given))
        elif given.exists():
            found[str(given)] = given
        else:
            raise UserError(f"no such file or folder: {given}")
    return found


def _walk(root):
    """(name, path) of the files below root without hidden and skipped folders, sorted by name."""
    result = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and f[0] != "."]
        result += [Path(folder, f) for f in files if f[0] != "."]
    return sorted((path.relative_to(root).as_posix(), path) for path in result)


def _read_text(path):
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {describe(error)}") from None
    if b"\0" in data:
        raise UserError(f"binary file (it has zero bytes): {path}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {path}, at byte {error.start}") from None
    return data


def validation_names(names):
    """The twentieth of the names (at least one) whose hashes are smallest."""
    hashed = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(hashed[: max(1, round(VALIDATION_PART * len(hashed)))])


def unigram_entropy(train, validation):
    """Nats a byte of `validation` under the histogram of `train`, one added to each count."""
    histogram = torch.bincount(train.long(), minlength=256).double() + 1
    counts = torch.bincount(validation.long(), minlength=256).double()
    return -(counts * (histogram / histogram.sum()).log()).sum().item() / counts.sum().item()


def _shown(paths):
    return "the standard library" if paths is None else ", ".join(map(str, paths))


def windows(text, starts, context):
    """int64 [len(starts), context + 1]: the context and, one further, its targets."""
    return torch.stack([text[i : i + context + 1] for i in starts]).long()


def validation_batches(text, context, batch, count):
    """Up to `count` windows, spread evenly over the text, in batches; always the same ones."""
    last = text.numel() - context - 1
    count = min(count, last // context + 1)
    starts = [last * i // max(1, count - 1) for i in range(count)]
    for i in range(0, count, batch):
        yield windows(text, starts[i : i + batch], context)


class Batches:
    """Endless batches: each epoch visits every window of the text once, in random order.

    An epoch's windows start at a random shift. Position and order follow from `seed`, `epoch` and
    `cursor` alone, which `state` returns and `restore` takes.
    """

    def __init__(self, text, context, batch, seed):
        self.text, self.context, self.batch, self.seed = text, context, batch, seed
        self.restore({"epoch": 0, "cursor": 0})

    def state(self):
        return {"epoch": self.epoch, "cursor": self.cursor}

    def restore(self, state):
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._shuffle()

    def _shuffle(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        free = self.text.numel() - 1
        shifts = min(self.context, free - self.context + 1)
        shift = torch.randint(shifts, (), generator=generator).item()
        count = (free - shift) // self.context
        self.starts = shift + self.context * torch.randperm(count, generator=generator)

    def next(self):
        """int64 [batch, context + 1]."""
        starts = []
        while len(starts) < self.batch:
            if self.cursor == len(self.starts):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._shuffle()
            wanted = self.batch - len(starts)
            starts += self.starts[self.cursor : self.cursor + wanted].tolist()
            self.cursor += min(wanted, len(self.starts) - self.cursor)
        return windows(self.text, starts, self.context)
