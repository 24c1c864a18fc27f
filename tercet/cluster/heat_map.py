"""How even the loads of ranks are, layer by layer, as a picture of characters: in a terminal, or as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tercet.cluster.run_file import reaching
from tercet.placement.experts.model import Floats

MOST_ROWS, MOST_COLUMNS = 32, 60  # of a picture; what is more shares them
# From this share of the layer's mean load on: what stands for it, and its colours (text, background).
LEVELS = (
    (0.0, " ", "white on #0b3d5c"),
    (0.5, "-", "white on #1f77b4"),
    (0.9, ".", "black on #cfe8cf"),
    (1.1, "+", "black on #ffd166"),
    (1.5, "*", "black on #f4843f"),
    (2.0, "#", "white on #c1121f"),
)
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font: {char_height}px monospace; line-height: {line_height}px; white-space: pre; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def heat_map(pictures: Mapping[str, Floats]) -> Group:
    """title -> loads [L, R]. A line is a rank, a column a layer; the colour is the load over the layer's mean."""
    signs = "  ".join(f"{sign or ' '} from {least:g}" for least, sign, _ in LEVELS[1:])
    caption = f"line: rank; column: layer; load over the layer's mean: blank below {LEVELS[1][0]:g}, {signs}"
    return Group(*(_picture(title, loads) for title, loads in pictures.items()), Text(caption))


def save_svg(path: Path, title: str, picture: Group) -> None:
    """Raises ClusterError if it cannot be written."""
    console = Console(record=True, file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(picture)
    with reaching(path):
        console.save_svg(str(path), title=title, code_format=SVG)


def _picture(title: str, loads: Floats) -> Group:
    mean = loads.mean(axis=1, keepdims=True)
    over = np.divide(loads, mean, out=np.zeros_like(loads), where=mean > 0).T  # [R, L]
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for ranks in _parts(len(over), MOST_ROWS):
        line = Text()
        for layers in _parts(over.shape[1], MOST_COLUMNS):
            _, sign, style = next(level for level in reversed(LEVELS) if over[ranks, layers].max() >= level[0])
            line.append(sign, style)
        name = f"{ranks.start}" if ranks.stop - ranks.start == 1 else f"{ranks.start}-{ranks.stop - 1}"
        table.add_row(name, line)
    return Group(Text(title, style="bold"), table)


def _parts(count: int, most: int) -> list[slice]:
    """At most so many, as even as they go; of several the highest load is shown."""
    parts = min(count, most)
    return [slice(part * count // parts, (part + 1) * count // parts) for part in range(parts)]
