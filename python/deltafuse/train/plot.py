"""The picture of a run's losses."""

import io

from .files import write_atomically


def draw_losses(path, rows, unigram_nats, title):
    """Writes a PNG with the training and validation loss over the steps and the unigram line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=0.8, label="training, a step")
    smooth = moving_average([loss for _, loss in train])
    axes.plot([s for s, _ in train], smooth, color="#2171b5", label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#d94801", label="validation")
        step, loss = validation[-1]
        axes.annotate(
            f"{loss:.3f}", (step, loss), (-4, -16), textcoords="offset points", ha="right"
        )
    axes.axhline(unigram_nats, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=title)
    axes.set_ylim(bottom=0)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda nats: nats * 1.442695, lambda b: b / 1.442695)
    )
    bits.set_ylabel("bits a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue())


def moving_average(values):
    """Exponential average over a hundredth of the values, without a pull towards zero."""
    weight = 1 - 1 / (1 + len(values) / 100)
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result
