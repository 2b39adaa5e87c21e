"""Pictures of a sweep: a heat map over layers and strengths, and curves. Extra ``plot``.

Figures are made without pyplot, so that no backend or style of the caller is touched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, install_command
from ..files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Row = Mapping[str, float | int | None]


@dataclass(frozen=True)
class _Panel:
    key: str
    title: str
    digits: int
    scale: float = 1.0

    def write(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"


_PANELS = (
    _Panel("accuracy", "Accuracy (%)", 1, scale=100.0),
    _Panel("steps", "Steps per response", 1),
    _Panel("tokens", "Tokens per response", 0),
    _Panel("nll", "NLL, unsteered (nats per token)", 3),
)
# Okabe and Ito's colours, which the colour-blind tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX<>*"
_DPI = 150


def plot_sweep(table: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``heatmap.png`` and ``curves.png`` into ``folder`` and return their paths.

    Each row of the table is one setting: layer (``None`` for the unsteered row, of which there
    is one), strength, problems, accuracy with accuracy_low and accuracy_high, steps, tokens,
    density, nll, and perhaps relative (the strength as a fraction of the residual norm). A figure
    that is ``None`` or not finite is left out of the pictures.

    Raises:
        InputError: matplotlib (extra ``plot``) is not installed, no unsteered row or more than
            one, no steered row, or a setting that is there twice.
        DiskError: the folder is missing or cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"pictures need matplotlib: {install_command('plot')}") from error
    sweep = _arrange(table)
    pictures = {"heatmap.png": _heatmap(sweep), "curves.png": _curves(sweep)}
    paths = []
    for name, figure in pictures.items():
        with atomic_file(folder / name) as file:
            figure.savefig(file, format="png", dpi=_DPI)
        paths.append(folder / name)
    return paths


@dataclass(frozen=True)
class _Sweep:
    """The table by layer and strength; the unsteered row is every layer's strength 0."""

    unsteered: Row
    steered: Mapping[tuple[int, float], Row]
    layers: list[int]
    strengths: list[float]  # with 0
    unit: str  # what they are

    def value(self, layer: int, strength: float, key: str) -> float:
        """Return a figure of a setting, NaN where there is none."""
        row = self.unsteered if strength == 0 else self.steered.get((layer, strength), {})
        return _number(row, key)


def _arrange(table: Sequence[Row]) -> _Sweep:
    unsteered = [row for row in table if row["layer"] is None]
    others = [row for row in table if row["layer"] is not None]
    unit, strengths = _strengths(others)
    steered = {(r["layer"], s): r for r, s in zip(others, strengths, strict=True)}
    if len(unsteered) != 1 or not steered or len(steered) < len(others) or 0.0 in strengths:
        raise InputError(
            f"the table has {len(unsteered)} unsteered rows and {len(others)} others, "
            f"{len(steered)} of them different; expected 1 and at least 1, all different, none "
            "of them at strength 0."
        )
    layers = sorted({row["layer"] for row in others})
    return _Sweep(unsteered[0], steered, layers, sorted({0.0, *strengths}), unit)


def _strengths(rows: Sequence[Row]) -> tuple[str, list[float]]:
    """Return the rows' strengths; relative ones where a grid of these has fewer columns."""
    raw = [float(row["strength"]) for row in rows]
    doses = [row.get("relative") for row in rows]
    if None not in doses:
        relative = [float(f"{dose:.6g}") for dose in doses]  # rounded: computed from lambda
        if len(set(relative)) < len(set(raw)):
            return "relative strength", relative
    return "strength", raw


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _heatmap(sweep: _Sweep) -> "Figure":
    from matplotlib.figure import Figure

    width = max(4.2, 1.6 + 0.62 * len(sweep.strengths))
    height = max(2.2, 1.3 + 0.36 * len(sweep.layers))
    figure = Figure(figsize=(2 * width, 2 * height + 0.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _heat_panel(axes, sweep, panel)
    figure.suptitle(
        f"Every setting on {sweep.unsteered['problems']} problems; white: as the unsteered model"
    )
    return figure


def _heat_panel(axes: "Axes", sweep: _Sweep, panel: _Panel) -> None:
    values = np.array([
        [sweep.value(layer, strength, panel.key) for strength in sweep.strengths]
        for layer in sweep.layers
    ])  # fmt: skip
    axes.set_facecolor("#dddddd")  # settings without a figure
    image = axes.imshow(
        values, cmap="PuOr_r", norm=_norm(values, _number(sweep.unsteered, panel.key)),
        aspect="auto", origin="lower",
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            dark = np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11)) < 0.5
            axes.text(
                column, row, panel.write(value),
                ha="center", va="center", size=8, color="white" if dark else "black",
            )  # fmt: skip
    _label_strengths(axes, sweep)
    axes.set_yticks(range(len(sweep.layers)), [str(layer) for layer in sweep.layers])
    axes.set(title=panel.title, ylabel="layer")
    zero = sweep.strengths.index(0.0)
    for edge in (zero - 0.5, zero + 0.5):
        axes.axvline(edge, color="black", linewidth=1)
    _scale(axes, image, values, panel)


def _scale(axes: "Axes", image: "AxesImage", values: np.ndarray, panel: _Panel) -> None:
    """Draw the colour scale from the least value to the greatest; the norm covers more."""
    scale = axes.figure.colorbar(image, ax=axes)
    known = values[np.isfinite(values)]
    if not known.size or known.min() == known.max():
        scale.ax.set_visible(False)  # it keeps its place
        return
    middle = (image.norm.vmin + image.norm.vmax) / 2  # the unsteered value
    ticks = {panel.write(tick): tick for tick in (middle, known.min(), known.max())}
    scale.set_ticks(list(ticks.values()), labels=list(ticks))
    scale.ax.set_ylim(known.min(), known.max())


def _norm(values: np.ndarray, centre: float) -> "FuncNorm":
    """Centre the colours at the unsteered value and spread them by the root of the distance.

    One overdose does not make all the other settings look alike.
    """
    from matplotlib.colors import FuncNorm

    centre = centre if math.isfinite(centre) else 0.0
    distances = np.abs(values[np.isfinite(values)] - centre)
    # a twentieth at least, so that one problem more or less is not a deep colour
    reach = max(float(distances.max(initial=0.0)), abs(centre) / 20) or 1.0

    def forward(x: np.ndarray) -> np.ndarray:
        return np.sign(x - centre) * np.sqrt(np.abs(x - centre))

    def inverse(y: np.ndarray) -> np.ndarray:
        return centre + np.sign(y) * np.square(y)

    return FuncNorm((forward, inverse), vmin=centre - reach, vmax=centre + reach)


def _label_strengths(axes: "Axes", sweep: _Sweep) -> None:
    labels = [f"{strength:g}".replace("-", "\N{MINUS SIGN}") for strength in sweep.strengths]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel(sweep.unit)


def _curves(sweep: _Sweep) -> "Figure":
    from matplotlib.figure import Figure

    width = max(4.4, 1.4 + 0.45 * len(sweep.strengths))
    figure = Figure(figsize=(2 * width, 7.6), layout="constrained")
    all_axes = list(figure.subplots(2, 2).flat)
    for axes, panel in zip(all_axes, _PANELS, strict=True):
        _curve_panel(axes, sweep, panel)
    handles, labels = all_axes[-1].get_legend_handles_labels()
    lines = math.ceil(len(labels) / int(1.6 * width))
    columns = math.ceil(len(labels) / lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.suptitle(
        f"Every setting on {sweep.unsteered['problems']} problems; bars and band: interval of the "
        "accuracy"
    )
    return figure


def _curve_panel(axes: "Axes", sweep: _Sweep, panel: _Panel) -> None:
    accuracy = panel.key == "accuracy"
    unsteered = {"color": "#555555", "label": "unsteered"}
    base = panel.scale * _number(sweep.unsteered, panel.key)
    if math.isfinite(base):
        axes.axhline(base, linestyle=(0, (5, 3)), linewidth=1, **unsteered)
    if accuracy:
        low, high = (_number(sweep.unsteered, f"accuracy_{end}") for end in ("low", "high"))
        axes.axhspan(panel.scale * low, panel.scale * high, color="#000000", alpha=0.06, zorder=0)
    for index, layer in enumerate(sweep.layers):
        y = np.array([panel.scale * sweep.value(layer, s, panel.key) for s in sweep.strengths])
        known, style = np.isfinite(y), _line_style(index, len(sweep.layers))
        x = np.arange(len(y), dtype=float)
        if accuracy:  # shifted a little, so that bars do not cover each other; all meet at 0
            away = np.array(sweep.strengths) != 0
            x += 0.5 * ((index + 0.5) / len(sweep.layers) - 0.5) * away
            bars = _bars(sweep, layer, panel)
            drawn = known & away
            axes.errorbar(
                x[drawn], y[drawn], bars[:, drawn],
                fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=2, alpha=0.7,
            )  # fmt: skip
        axes.plot(x[known], y[known], label=f"layer {layer}", **style)
    _label_strengths(axes, sweep)
    axes.set_title(panel.title)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _line_style(index: int, count: int) -> dict[str, object]:
    """Return how one of ``count`` layers is drawn: colour and marker tell it from the others."""
    from matplotlib import colormaps

    many = count > len(_COLOURS)  # then dark to light with depth
    colour = colormaps["viridis"](0.95 * index / (count - 1)) if many else _COLOURS[index]
    return {
        "color": colour, "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4.5,
        "linewidth": 1.3,
    }  # fmt: skip


def _bars(sweep: _Sweep, layer: int, panel: _Panel) -> np.ndarray:
    """Return how far each interval reaches below and above its value, ``(2, strengths)``."""
    value, low, high = (
        np.array([panel.scale * sweep.value(layer, s, key) for s in sweep.strengths])
        for key in (panel.key, f"{panel.key}_low", f"{panel.key}_high")
    )
    return np.nan_to_num(np.clip([value - low, high - value], 0, None))
