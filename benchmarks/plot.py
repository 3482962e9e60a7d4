"""Draws the figures of a run: ``python -m benchmarks plot FILE FOLDER`` (it takes matplotlib).

By sessions and by names, what one cycle takes: the median of the rounds, and their quartiles.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median, quantiles

from benchmarks.harness import Result
from benchmarks.table import micros

DRAWN = {  # topic: what is on the axis, and for each line the names of its variants
    "sessions": (
        "idle sessions beside the active one",
        {"fdbroker": r"beside (\d+) idle", "s6-fdholderd": r"s6 beside (\d+) idle"},
    ),
    "names": (
        "names",
        {"fdbroker": r"1 of (\d+)", "s6-fdholderd": r"s6: 1 of (\d+)"},
    ),
}


def plot(result: Result, folder: Path) -> list[Path]:
    """One file for each of these topics that was run."""
    drawn = []
    for name, (axis, lines) in DRAWN.items():
        if name in result["topics"]:
            drawn.append(folder / f"{name}.svg")
            draw(result["topics"][name], axis, lines, drawn[-1])
    return drawn


def draw(topic: Result, axis: str, lines: dict[str, str], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = file.name  # the same run, the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for label, pattern in lines.items():
        found = [
            (int(match[1]), micros(variant))
            for variant in topic["variants"]
            if (match := re.fullmatch(pattern, variant["name"]))
        ]
        if not found:
            continue
        middle = [median(times) for _, times in found]
        around = [quantiles(times, n=4, method="inclusive") for _, times in found]
        spread = [
            [mid - low for mid, (low, _, _) in zip(middle, around, strict=True)],
            [high - mid for mid, (_, _, high) in zip(middle, around, strict=True)],
        ]
        counts = [count for count, _ in found]
        axes.errorbar(counts, middle, yerr=spread, label=label, marker="o", capsize=3)
    axes.set(xscale="log", xlabel=axis, ylabel="µs for one descriptor and back", ylim=(0, None))
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
