"""Validation loss of `deltafuse train` with MARS and AdamW over learning rates and seeds.

    python bench/convergence.py             # runs what is missing, 50 s each on two cores
    python bench/convergence.py --collect   # trains nothing

Every run is `deltafuse train --preset tiny` and stays in runs/convergence/. Writes
bench/results/convergence/<hardware>.json and docs/ops/mars_convergence.png.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from deltafuse.bench import environment

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "convergence"
PICTURE = ROOT / "docs" / "ops" / "mars_convergence.png"
OPTIMIZERS = {  # and beta1: learning rates
    ("mars-m", "0.95"): ("3e-3", "6e-3", "1.2e-2"),
    ("mars", "0.9"): ("3e-3", "6e-3", "1.2e-2"),
    ("mars", "0.95"): ("3e-3", "6e-3", "1.2e-2", "2.4e-2"),
    ("adamw", "0.9"): ("1.5e-3", "3e-3", "6e-3", "1.2e-2"),
    ("adamw", "0.95"): ("3e-3",),
}
SEEDS = (0, 1, 2)
COLORS = {"mars-m": "#238b45", "mars": "#d94801", "adamw": "#2171b5"}


def folder(optimizer, beta1, rate, seed):
    return RUNS / f"{optimizer}-{beta1}-{rate}-{seed}"


def combinations():
    for (optimizer, beta1), rates in OPTIMIZERS.items():
        for rate, seed in itertools.product(rates, SEEDS):
            yield optimizer, beta1, rate, seed


def train(optimizer, beta1, rate, seed):
    out = folder(optimizer, beta1, rate, seed)
    flags = dict(optimizer=optimizer, beta1=beta1, lr=rate, seed=seed, out=out)
    arguments = [x for name, value in flags.items() for x in ("--" + name, str(value))]
    command = [sys.executable, "-m", "deltafuse.cli", "train", "--preset", "tiny", *arguments]
    subprocess.run(command, check=True)


def validations(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]


def collect():
    """A row a run: its settings and its validation losses by step."""
    return [
        dict(
            optimizer=optimizer,
            beta1=float(beta1),
            lr=float(rate),
            seed=seed,
            validation=validations(folder(optimizer, beta1, rate, seed)),
        )
        for optimizer, beta1, rate, seed in combinations()
    ]


def final_losses(rows):
    """{(optimizer, beta1): {lr: [loss of each seed]}}."""
    table = {}
    for row in rows:
        rates = table.setdefault((row["optimizer"], row["beta1"]), {})
        rates.setdefault(row["lr"], []).append(row["validation"][-1][1])
    return table


def draw(rows):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (optimizer, beta1), rates in final_losses(rows).items():
        style = "s--" if beta1 == 0.95 and optimizer != "mars-m" else "o-"
        means = [sum(losses) / len(losses) for losses in rates.values()]
        label = f"{optimizer}, beta1 = {beta1:g}"
        axes.plot(list(rates), means, style, color=COLORS[optimizer], label=label)
        for rate, losses in rates.items():
            axes.plot([rate] * len(losses), losses, ".", color=COLORS[optimizer], alpha=0.5)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats a byte)")
    axes.set_title("deltafuse train --preset tiny, 500 steps: means and single seeds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    FigureCanvasAgg(figure).print_png(PICTURE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true", help="train nothing")
    if not parser.parse_args().collect:
        for run in combinations():
            if not (folder(*run) / "loss.png").exists():
                train(*run)
    rows = collect()
    path = ROOT / "bench" / "results" / "convergence" / f"{environment.file_name('cpu')}.json"
    path.parent.mkdir(exist_ok=True)
    where = environment.describe("cpu")  # runs may be older than the commit that collects them
    record = {name: where[name] for name in ("device", "isa", "versions", "date")} | {"runs": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows)
    for (optimizer, beta1), rates in final_losses(rows).items():
        for rate, losses in rates.items():
            shown = " | ".join(f"{x:.3f}" for x in losses)
            print(f"| {optimizer} | {beta1:g} | {rate:g} | {shown} | {sum(losses) / 3:.3f} |")


if __name__ == "__main__":
    main()
