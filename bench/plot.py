# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/performance.md, from the figures that a run has written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS: Final = {"limit": "#9aa5b1", "build": "#1f6feb", "containerd": "#d1772d"}
# Text stays text, and equal figures give equal files.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tardev", "font.size": 9})


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    """`figures`: what `--json` writes. The files that were drawn."""
    directory.mkdir(parents=True, exist_ok=True)
    return [_builds(figures, directory / "builds.svg"), _stages(figures, directory / "stages.svg")]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return path


def _bars(axes: Axes, names: list[str], values: list[float], colours: list[str], unit: str) -> None:
    places = range(len(names))
    bars = axes.barh(places, values, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def _builds(figures: dict[str, Any], path: Path) -> Path:
    """Each build beside the limit of the machine and containerd's own unpack."""
    rows: list[tuple[str, float, str]] = []
    for name, limit in figures["limits"].items():
        rows += [(f"limit, {name}", limit, "limit"), (f"build, {name}", _wall(figures, f"build {name}"), "build")]
    rows += [
        (name, _wall(figures, name), "containerd") for name in figures["figures"] if name.startswith("containerd, ")
    ]
    figure = Figure(figsize=(7, 0.3 * len(rows) + 0.6))
    names, values, kinds = zip(*rows, strict=True)
    _bars(figure.subplots(), list(names), list(values), [_COLOURS[kind] for kind in kinds], "seconds, 1.1 GB layer")
    return _save(figure, path)


def _stages(figures: dict[str, Any], path: Path) -> Path:
    """What the limit is made of."""
    names = [name for name in figures["figures"] if not name.startswith(("build", "containerd", "stages"))]
    figure = Figure(figsize=(7, 0.3 * len(names) + 0.6))
    values = [_wall(figures, name) for name in names]
    _bars(figure.subplots(), names, values, [_COLOURS["limit"]] * len(names), "seconds, each stage alone")
    return _save(figure, path)


def _wall(figures: dict[str, Any], name: str) -> float:
    return float(figures["figures"][name]["wall_seconds"])
