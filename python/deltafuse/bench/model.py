"""Benchmark of a whole training step of the smallest language model."""

import torch
import torch.nn.functional as F

from .. import _library
from ..models import GatedDeltaLM, ModelConfig
from ..optim import MARS
from .case import Benchmark, Case


def make_step(shape, device):
    """A function that takes one training step and returns the loss; always the same start."""
    torch.manual_seed(0)
    model = GatedDeltaLM(ModelConfig(num_layers=shape["layers"])).to(device)
    tokens = torch.randint(256, (shape["B"], shape["T"] + 1), device=device)
    optimizer = MARS(model.parameters(), lr=1e-3, weight_decay=0.01)

    def step():
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def on_reference(step):
    def run():
        with _library.use("reference"):
            return step()

    return run


def model_case(shape, device):
    def check():
        ours, reference = make_step(shape, device), on_reference(make_step(shape, device))
        losses = [torch.stack([step() for _ in range(3)]) for step in (ours, reference)]
        return [("losses of three steps", *losses, 1e-4)]

    return Case(
        ours=make_step(shape, device),
        reference=on_reference(make_step(shape, device)),
        check=check,
    )


def weights(shape):
    """Parameters of the matrices that a token meets: layers and tied output embedding."""
    with torch.device("meta"):
        model = GatedDeltaLM(ModelConfig(num_layers=shape["layers"]))
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


ENTRIES = {
    "model_step": Benchmark(
        title="training step of the tiny language model with MARS-AdamW",
        reference="the same model on the reference backend",
        kernel="gated_delta_bwd",
        shapes=({"B": 8, "T": 256, "layers": 4},),
        tiny={"B": 1, "T": 20, "layers": 1},
        make=model_case,
        flops=lambda s: 6 * weights(s) * s["B"] * s["T"],  # the matrices alone
        bytes=lambda s: None,
    ),
}
