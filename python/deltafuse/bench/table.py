"""Measurements as text: a table for the terminal, and the page docs/benchmarks.md."""


def duration(seconds):
    for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}" if seconds < 1e3 * scale else f"{seconds:.0f} s"


def shape_text(row):
    return " ".join(f"{name}{size}" for name, size in row["shape"].items())


def rate(count, seconds):
    return "-" if count is None else f"{count / seconds * 1e-9:.1f}"


def cells(row):
    """A list of strings an implementation: name, median, minimum, spread, rates, ratio."""
    for name, sample in row["seconds"].items():
        ratios = row.get("ratios", {}).get(name, {})
        yield [
            name,
            duration(sample["median"]),
            duration(sample["minimum"]),
            f"{100 * sample['spread']:.0f} %",
            f"{sample['cores']:.1f}",
            rate(row["flops"], sample["median"]),
            rate(row["bytes"], sample["median"]),
            *(f"{ratios[kind]:.2f}x" if ratios else "-" for kind in ("median", "minimum")),
        ]


HEADER = ["", "median", "minimum", "spread", "cores", "GFLOP/s", "GB/s"]
HEADER += ["median / ours", "minimum / ours"]


def verdict(row):
    """Why there are no ratios, or how the target compares; None if there is nothing to say."""
    correct = row["correct"]
    if not correct["ok"]:
        return (
            f"no ratios: {correct['what']} differs from the reference by {correct['error']:.1e}, "
            f"allowed is {correct['limit']:.0e}"
        )
    if row["backend"] == "reference":
        return "no ratios: no compiled kernel in use, ours is the reference itself"
    if row["threads"] in (2, None):
        notes = [compared(row, *target) for target in row["targets"]]
        return "; ".join(notes + reached(row)) or None
    return None


def reached(row):
    if "goal" not in row:
        return []
    met = "met" if row["seconds"]["ours"]["median"] <= row["goal"] else "missed"
    return [f"goal: {duration(row['goal'])}, {met}"]


def compared(row, name, factor):
    if name not in row["ratios"]:
        return f"target: {name} / ours >= {factor:g}, not measured: {name} is not installed"
    # a busy machine lifts medians of multithreaded PyTorch most: both ratios have to hold
    met = "met" if min(row["ratios"][name].values()) >= factor else "missed"
    return f"target: {name} / ours >= {factor:g}, {met}"


def heading(row):
    threads = "" if row["threads"] is None else f", {row['threads']} thread(s)"
    return f"{row['op']} {shape_text(row)} {row['dtype']}{threads}"


def conditions(row):
    return f"load {row['load']}, waiting threads: {row['omp_wait_policy']}"


def text(row):
    """One row of measurements for the terminal."""
    lines = [HEADER, *cells(row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    formatted = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    place = f"{row['device']}, {row['isa'] or row['backend']}, {conditions(row)}"
    return "\n".join(filter(None, [heading(row), place, *formatted, verdict(row)]))


def markdown(row):
    """One row of measurements for the page."""
    lines = [HEADER, [":--", *["--:"] * (len(HEADER) - 1)], *cells(row)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = verdict(row)
    facts = f"{row['date']}, commit {row['git'] or 'unknown'}, {conditions(row)}"
    return f"**{heading(row)}** ({facts})\n\n{table}\n" + (f"\n{note}\n" if note else "")
