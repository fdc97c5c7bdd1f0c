"""A picture of thinkmid's folders: level over level, as wide as their code, an arrow for each import.

python -m benchmarks.rooms docs/rooms.svg
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.house import LEVELS, PACKAGE, imported, read

WIDTH, GAP, HEIGHT = 9.4, 0.2, 0.62  # of the picture; between boxes; of a box, in inches
LEAST, LINES = 0.95, 0.0007  # width of a box that holds its name; of a line of code
COLOURS = ("#e8eef7", "#dcebdd", "#fbeed3", "#f6ddd9", "#e9e0f2")


def sizes_and_imports(package: Path = PACKAGE) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """(code lines by folder or file of the first level, number of imports by (importing, imported))."""
    sizes, arrows = Counter[str](), Counter[tuple[str, str]]()
    for path in sorted(package.rglob("*.py")):
        module = read(path, package)
        room = module.name.split("/")[0].removesuffix(".py")
        sizes[room] += len(module.code)
        arrows.update((room, name) for name in imported(module) if name != room)
    return sizes, arrows


def places(sizes: Counter[str]) -> dict[str, tuple[float, float, float]]:
    """(left, bottom, width) of each room, in inches: a level is a row, the lowest at the bottom."""
    found = {}
    for number, level in enumerate(LEVELS):
        rooms = sorted(level, key=sizes.__getitem__, reverse=True)
        widths = [LEAST + LINES * sizes[room] for room in rooms]
        left = (WIDTH - sum(widths) - GAP * (len(rooms) - 1)) / 2
        for room, width in zip(rooms, widths, strict=True):
            found[room] = left, number * 2 * HEIGHT, width
            left += width + GAP
    return found


def draw(out: Path) -> None:
    sizes, arrows = sizes_and_imports()
    boxes, height = places(sizes), 2 * HEIGHT * len(LEVELS)
    colours = {room: colour for level, colour in zip(LEVELS, COLOURS, strict=True) for room in level}
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, WIDTH), ylim=(-GAP, height - HEIGHT + GAP))
    axes.set_axis_off()
    for (above, below), count in arrows.items():
        if above in boxes and below in boxes and boxes[above][1] > boxes[below][1]:
            (left, bottom, width), (to_left, to_bottom, to_width) = boxes[above], boxes[below]
            style = {"arrowstyle": "-|>", "color": "#8894a4", "lw": 0.4 + 0.04 * count, "alpha": 0.55}
            ends = (to_left + to_width / 2, to_bottom + HEIGHT), (left + width / 2, bottom)
            axes.annotate("", *ends, arrowprops=style)
    for room, (left, bottom, width) in boxes.items():
        box = {"facecolor": colours[room], "edgecolor": "#5b6776", "linewidth": 0.8, "zorder": 3}
        axes.add_patch(Rectangle((left, bottom), width, HEIGHT, **box))
        for text, at, size in ((room, 0.62, 10), (f"{sizes[room]:,}", 0.25, 7.5)):
            middle = left + width / 2, bottom + HEIGHT * at
            axes.text(*middle, text, ha="center", va="center", fontsize=size, zorder=4)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rooms", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
