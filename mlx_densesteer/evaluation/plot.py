"""Pictures of a sweep, a heat map over layers and strengths and curves, and of an evaluation. Extra ``plot``.

Figures are made without pyplot, so that no backend or style of the caller is touched.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, install_command
from ..files import atomic_file
from ..steering.request import joined
from ..text import one_line, signed_dose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from .scoring import Estimate, Score

Row = Mapping[str, Any]
Layers = tuple[int, ...]


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

    Each row of the table is one setting (``sweep.GridRow.describe``): layers (``None`` for the unsteered
    row, of which there is one), dose, strength, problems, accuracy with accuracy_low and accuracy_high,
    steps, tokens, density, nll. A figure that is ``None`` or not finite is left out of the pictures, and
    its panel where no setting has it.
    The settings are shown by dose, with the strength below it where all layers share it; by strength
    where that takes fewer columns.

    Raises:
        InputError: matplotlib (extra ``plot``) is not installed, no unsteered row or more than
            one, no steered row, or a setting that is there twice.
        DiskError: the folder is missing or cannot be written.
    """
    check_matplotlib()
    grid = _arrange(table)
    pictures = {"heatmap.png": _heatmap(grid), "curves.png": _curves(grid)}
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / name)
        _save(figure, paths[-1])
    return paths


def plot_scores(scores: "Mapping[str, Score]", path: Path) -> None:
    """Draw accuracy against tokens of every condition (``scoring.evaluate``) into a PNG file.

    Bars are the 95 % intervals; dashed lines go through the unsteered condition, where there is one.

    Raises:
        InputError: matplotlib (extra ``plot``) is not installed, or no scores.
        DiskError: the file cannot be written.
    """
    check_matplotlib()
    if not scores:
        raise InputError("no scores to draw: expected at least one condition.")
    _save(_scatter(scores), path)


def check_matplotlib() -> None:
    """Raise ``InputError`` without matplotlib (extra ``plot``)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"pictures need matplotlib: {install_command('plot')}") from error


def _save(figure: "Figure", path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _scatter(scores: "Mapping[str, Score]") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, score) in enumerate(scores.items()):
        style = _line_style(index, len(scores))
        accuracy, tokens = score.accuracy, score.tokens
        if name == "unsteered":
            style = {**style, "color": "#555555"}
            axes.axhline(
                100 * accuracy.value, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0
            )
            axes.axvline(tokens.value, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
        axes.errorbar(
            tokens.value, 100 * accuracy.value,
            xerr=_of_estimate(tokens), yerr=100 * _of_estimate(accuracy),
            capsize=2, elinewidth=0.8, label=one_line(name, 48), **style,
        )  # fmt: skip
    axes.set(xlabel="Tokens per response", ylabel="Accuracy (%)")
    axes.set_title(f"{next(iter(scores.values())).problems} problems; bars: 95 % intervals")
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=1 if len(scores) < 3 else 2)
    return figure


def _of_estimate(one: "Estimate") -> np.ndarray:
    return _reach(*(np.array([number]) for number in (one.value, one.low, one.high)))


def _reach(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return how far intervals reach below and above their values, ``(2, values)``; 0 where there is none."""
    return np.nan_to_num(np.clip([value - low, high - value], 0, None))


@dataclass(frozen=True)
class _Grid:
    """The table by layers and column; the unsteered row is column 0 of all layers.

    A column is a dose or a strength; ``labels`` say which, in the order of ``columns``.
    """

    unsteered: Row
    steered: Mapping[tuple[Layers, float], Row]
    layers: list[Layers]
    columns: list[float]  # with 0
    labels: list[str]
    unit: str  # what the columns are

    def panels(self) -> list[_Panel]:
        """Return the panels of which a setting has a figure."""
        rows = [self.unsteered, *self.steered.values()]
        return [p for p in _PANELS if any(math.isfinite(_number(row, p.key)) for row in rows)]

    def value(self, layers: Layers, column: float, key: str) -> float:
        """Return a figure of a setting, NaN where there is none."""
        row = self.unsteered if column == 0 else self.steered.get((layers, column), {})
        return _number(row, key)


def _arrange(table: Sequence[Row]) -> _Grid:
    unsteered = [row for row in table if row["layers"] is None]
    others = [row for row in table if row["layers"] is not None]
    strengths = [float(row["strength"]) for row in others]
    doses = [float(f"{row['dose']:.6g}") for row in others]  # rounded: computed from lambda
    by_dose = len(set(doses)) <= len(set(strengths))
    keys = doses if by_dose else strengths
    steered = {(tuple(row["layers"]), key): row for row, key in zip(others, keys, strict=True)}
    if len(unsteered) != 1 or not steered or len(steered) < len(others) or 0.0 in keys:
        raise InputError(
            f"the table has {len(unsteered)} unsteered rows and {len(others)} others, "
            f"{len(steered)} of them different; expected 1 and at least 1, all different, none "
            "of them at strength 0."
        )
    layers = sorted({tuple(row["layers"]) for row in others})
    columns = sorted({0.0, *keys})
    labels, unit = _labels(columns, zip(keys, strengths, strict=True), by_dose)
    return _Grid(unsteered[0], steered, layers, columns, labels, unit)


def _labels(
    columns: Sequence[float], settings: Iterable[tuple[float, float]], by_dose: bool
) -> tuple[list[str], str]:
    """Return the columns' labels and what they are; ``settings`` are columns and strengths."""
    strengths: dict[float, set[str]] = {0.0: {"0"}}
    for column, strength in settings:
        strengths.setdefault(column, set()).add(f"{strength:.3g}")
    alike = all(len(found) == 1 for found in strengths.values())
    if not by_dose:
        labels, unit = [f"{column:.3g}" for column in columns], "strength"
    elif alike:
        labels = [f"{signed_dose(column)}\n{min(strengths[column])}" for column in columns]
        unit = "dose, strength"
    else:
        labels, unit = [signed_dose(column) for column in columns], "dose"
    return [label.replace("-", "\N{MINUS SIGN}") for label in labels], unit


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _heatmap(grid: _Grid) -> "Figure":
    from matplotlib.figure import Figure

    width = max(4.2, 1.6 + 0.62 * len(grid.columns))
    height = max(2.2, 1.3 + 0.36 * len(grid.layers))
    figure = Figure(figsize=(2 * width, 2 * height + 0.5), layout="constrained")
    for axes, panel in _place(figure, grid.panels()):
        _heat_panel(axes, grid, panel)
    figure.suptitle(
        f"Every setting on {grid.unsteered['problems']} problems; white: as the unsteered model"
    )
    return figure


def _place(figure: "Figure", panels: Sequence[_Panel]) -> "list[tuple[Axes, _Panel]]":
    """Return the panels with their axes, two in a row."""
    return [(figure.add_subplot(2, 2, 1 + at), panel) for at, panel in enumerate(panels)]


def _heat_panel(axes: "Axes", grid: _Grid, panel: _Panel) -> None:
    values = np.array([
        [grid.value(layers, column, panel.key) for column in grid.columns]
        for layers in grid.layers
    ])  # fmt: skip
    axes.set_facecolor("#dddddd")  # settings without a figure
    image = axes.imshow(
        values, cmap="PuOr_r", norm=_norm(values, _number(grid.unsteered, panel.key)),
        aspect="auto", origin="lower",
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            dark = np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11)) < 0.5
            axes.text(
                column, row, panel.write(value),
                ha="center", va="center", size=8, color="white" if dark else "black",
            )  # fmt: skip
    _label_columns(axes, grid)
    axes.set_yticks(range(len(grid.layers)), [joined(layers) for layers in grid.layers])
    axes.set(title=panel.title, ylabel="layer")
    zero = grid.columns.index(0.0)
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


def _label_columns(axes: "Axes", grid: _Grid) -> None:
    axes.set_xticks(range(len(grid.labels)), grid.labels)
    axes.set_xlim(-0.5, len(grid.labels) - 0.5)
    axes.set_xlabel(grid.unit)


def _curves(grid: _Grid) -> "Figure":
    from matplotlib.figure import Figure

    width = max(4.4, 1.4 + 0.45 * len(grid.columns))
    figure = Figure(figsize=(2 * width, 7.6), layout="constrained")
    for axes, panel in _place(figure, grid.panels()):
        _curve_panel(axes, grid, panel)
    handles, labels = axes.get_legend_handles_labels()
    lines = math.ceil(len(labels) / int(1.6 * width))
    columns = math.ceil(len(labels) / lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.suptitle(
        f"Every setting on {grid.unsteered['problems']} problems; bars and band: interval of the "
        "accuracy"
    )
    return figure


def _curve_panel(axes: "Axes", grid: _Grid, panel: _Panel) -> None:
    accuracy = panel.key == "accuracy"
    unsteered = {"color": "#555555", "label": "unsteered"}
    base = panel.scale * _number(grid.unsteered, panel.key)
    if math.isfinite(base):
        axes.axhline(base, linestyle=(0, (5, 3)), linewidth=1, **unsteered)
    if accuracy:
        low, high = (_number(grid.unsteered, f"accuracy_{end}") for end in ("low", "high"))
        axes.axhspan(panel.scale * low, panel.scale * high, color="#000000", alpha=0.06, zorder=0)
    for index, layers in enumerate(grid.layers):
        y = np.array([panel.scale * grid.value(layers, s, panel.key) for s in grid.columns])
        known, style = np.isfinite(y), _line_style(index, len(grid.layers))
        x = np.arange(len(y), dtype=float)
        if accuracy:  # shifted a little, so that bars do not cover each other; all meet at 0
            away = np.array(grid.columns) != 0
            x += 0.5 * ((index + 0.5) / len(grid.layers) - 0.5) * away
            bars = _bars(grid, layers, panel)
            drawn = known & away
            axes.errorbar(
                x[drawn], y[drawn], bars[:, drawn],
                fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=2, alpha=0.7,
            )  # fmt: skip
        axes.plot(x[known], y[known], label=f"layer {joined(layers)}", **style)
    _label_columns(axes, grid)
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


def _bars(grid: _Grid, layers: Layers, panel: _Panel) -> np.ndarray:
    """Return ``_reach`` of a layer's intervals, ``(2, columns)``."""
    return _reach(*(
        np.array([panel.scale * grid.value(layers, s, key) for s in grid.columns])
        for key in (panel.key, f"{panel.key}_low", f"{panel.key}_high")
    ))  # fmt: skip
