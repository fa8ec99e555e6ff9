"""The training run: model, optimizer and data as one thing that can be saved and continued."""

import contextlib
import dataclasses
import math
import time

import torch
from torch.nn import functional as F

from .. import __version__
from ..models import GatedDeltaLM
from . import checkpoint
from .data import Batches, load_corpus, validation_batches
from .errors import UserError
from .run_folder import MetricsLog, RunFolder
from .schedule import learning_rate
from .settings import Settings

VALIDATION_WINDOWS = 128


def make_optimizer(settings, model):
    """MARS-AdamW, MARS-M or AdamW; matrices decay, the others do not."""
    from ..optim import MARS, split_decay_groups

    groups = split_decay_groups(model, settings.weight_decay)
    options = dict(lr=settings.lr, betas=(settings.beta1, 0.99))
    if settings.optimizer != "adamw":
        kind = "mars-m" if settings.optimizer == "mars-m" else "mars-adamw"
        return MARS(groups, lr_1d=settings.lr, mars_type=kind, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


class Run:
    """One training run in memory.

    Args:
        settings, corpus, folder: `Settings`, `Corpus`, `RunFolder`.
        model_config: `ModelConfig`.
        device: torch.device; bfloat16 autocast on CUDA, else float32.
    """

    def __init__(self, settings, model_config, corpus, folder, device):
        self.settings, self.corpus, self.folder, self.device = settings, corpus, folder, device
        torch.manual_seed(settings.seed)
        self.model = GatedDeltaLM(model_config).to(device)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.optimizer = make_optimizer(settings, self.model)
        self.batches = Batches(corpus.train, settings.context, settings.batch, settings.seed)
        self.step, self.seconds, self.log = 0, 0.0, None

    def loss(self, batch):
        """Mean nats a byte of windows [B, context + 1]."""
        batch = batch.to(self.device)
        autocast = contextlib.nullcontext()
        if self.device.type == "cuda":
            autocast = torch.autocast("cuda", dtype=torch.bfloat16)
        with autocast:
            logits = self.forward(batch[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def update(self, batch, step):
        """One optimizer step; returns (loss, learning rate)."""
        s = self.settings
        lr = learning_rate(step, s.steps, s.warmup, s.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        return loss.item(), lr

    def advance(self):
        """The next step and its row in the log; returns the row."""
        start = time.perf_counter()
        loss, lr = self.update(self.batches.next(), self.step + 1)
        taken = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step + 1}: try a smaller --lr "
                f"(the checkpoint in {self.folder.path} is from before)"
            )
        self.step += 1
        self.seconds += taken
        row = {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "tokens_per_second": self.settings.batch * self.settings.context / taken,
            "seconds": self.seconds,
        }
        self.log.append(row)
        return row

    def validate(self):
        """Mean loss over fixed windows of the validation text, as a row in the log."""
        s = self.settings
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in validation_batches(
                self.corpus.validation, s.context, s.batch, VALIDATION_WINDOWS
            ):
                total += self.loss(batch).item() * len(batch)
                count += len(batch)
        loss = total / count
        row = {"step": self.step, "val_loss": loss, "bits_per_byte": loss / math.log(2)}
        self.log.append(row)
        return row

    def save(self):
        self.log.sync()
        meta = {
            "version": __version__,
            "step": self.step,
            "seconds": self.seconds,
            "batches": self.batches.state(),
            "model": dataclasses.asdict(self.model.config),
            "settings": dataclasses.asdict(self.settings),
        }
        checkpoint.save(self.folder.checkpoint, self.model, self.optimizer, meta)

    def restore(self):
        """Continues from the folder's checkpoint; UserError if it is not this run's."""
        path = self.folder.checkpoint
        saved = checkpoint.load(path)
        self.folder.check_same_model(saved, self.model.config)
        recorded = Settings.from_record(saved.meta["settings"], path)
        if recorded != self.settings:
            recorded.refuse_changes(dataclasses.asdict(self.settings), path)
        checkpoint.restore_model(saved, self.model, path)
        checkpoint.restore_optimizer(saved, self.optimizer)
        checkpoint.restore_rng(saved)
        self.batches.restore(saved.meta["batches"])
        self.step, self.seconds = saved.meta["step"], saved.meta["seconds"]

    def train(self, progress, stop):
        """Steps until the last one or until `stop`; saves every interval and at the end."""
        s = self.settings
        while self.step < s.steps and not stop.name:
            row = self.advance()
            progress.update(self.step, row["loss"], row["tokens_per_second"])
            last = self.step == s.steps
            if self.step % s.eval_every == 0 or last:
                row = self.validate()
                progress.line(
                    f"step {self.step}  validation {row['val_loss']:.3f} nats, "
                    f"{row['bits_per_byte']:.3f} bits a byte"
                )
            if self.step % s.checkpoint_every == 0 or last or stop.name:
                self.save()


def open_run(given, out, resume, device):
    """The run of these flags, new or continued from the folder; UserError if it cannot be.

    Args:
        given: {name: value} of the settings that were given as flags.
        out: folder; resume: whether it must hold a run already.
    """
    folder = RunFolder(out)
    if resume:
        config = folder.read_config()
        settings = Settings.from_record(config["settings"], folder.config)
        settings.refuse_changes(given, folder.config)
        model_config = config["model"]
    else:
        folder.refuse_existing()
        settings = Settings.from_given(given)
        model_config = settings.model_config()
    corpus = load_corpus(settings.data, settings.context)
    if resume and corpus.sha256 != config["corpus"]["sha256"]:
        raise UserError(f"the data is not what the run in {folder.path} was started with")
    run = Run(settings, model_config, corpus, folder, device)
    if not resume:
        folder.create(
            {
                "version": __version__,
                "model": dataclasses.asdict(model_config),
                "settings": dataclasses.asdict(settings),
                "corpus": corpus.describe(),
            }
        )
    elif folder.checkpoint.exists():  # else killed before the first one: from the start
        run.restore()
    run.log = MetricsLog(folder.metrics, run.step)
    return run


def load_model(path, device):
    """The model of a run folder, ready for sampling; UserError if it cannot be read."""
    folder = RunFolder(path)
    config = folder.read_config()["model"]
    saved = checkpoint.load(folder.checkpoint)
    folder.check_same_model(saved, config)
    model = GatedDeltaLM(config)
    checkpoint.restore_model(saved, model, folder.checkpoint)
    return model.to(device).eval()
