import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, disk_of

from mlx_densesteer.errors import DiskError, InputError, install_command
from mlx_densesteer.evaluation.plot import plot_scores, plot_sweep
from mlx_densesteer.evaluation.scoring import Estimate, Score


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="needs the extra plot")


def row(layers, strength, **figures):
    layers = (layers,) if isinstance(layers, int) else layers
    layer = layers and layers[0]
    accuracy = 0.8 - 0.01 * abs(strength) - 0.01 * (layer or 0)
    return {
        "layers": layers and list(layers), "strength": strength, "dose": strength / (20 + (layer or 0)), "problems": 50, "accuracy": accuracy,
        "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, "steps": 5 - strength / 4,
        "tokens": 80 - strength, "density": 15.0 + strength, "nll": 0.1 + strength**2 / 100,
    } | figures  # fmt: skip


TABLE = [row(None, 0.0)] + [row(i, s) for i in (4, 12) for s in (-2.0, 0.5, 8.0)]


def pixels(path: Path) -> np.ndarray:
    """Decode a PNG of 8-bit RGBA: ``(height, width, 4)``."""
    data, position, body, size = path.read_bytes(), 8, b"", None
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while position < len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4], "big"),
            data[position + 4 :][:4],
        )
        chunk = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            size = (int.from_bytes(chunk[4:8], "big"), int.from_bytes(chunk[:4], "big"))
            assert chunk[8:10] == b"\x08\x06"
        body += chunk if kind == b"IDAT" else b""
        position += 12 + length
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape == (*size, 4)
    assert len(zlib.decompress(body)) == size[0] * (4 * size[1] + 1)  # complete
    return image


def test_a_full_disk_leaves_no_picture(matplotlib, tmp_path):
    with disk_of(4096), pytest.raises(DiskError, match=r"heatmap\.png.*Make room"):
        plot_sweep(TABLE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_are_steered_together_are_a_row(matplotlib, tmp_path, monkeypatch):
    table = [row(None, 0.0), row((4, 12), 0.5), row((4,), 0.5), row((12,), 0.5)]
    heat, curves = figures(monkeypatch, plot_sweep, table, tmp_path)
    assert [t.get_text() for t in heat.axes[0].get_yticklabels()] == ["4", "4+12", "12"]
    texts = [t.get_text() for t in curves.legends[0].get_texts()]
    assert texts == ["unsteered", "layer 4", "layer 4+12", "layer 12"]


def test_two_pictures(matplotlib, tmp_path):
    paths = plot_sweep(TABLE, tmp_path)
    assert paths == [tmp_path / "heatmap.png", tmp_path / "curves.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        image = pixels(path)
        assert min(image.shape[:2]) > 500
        assert len({tuple(colour) for colour in image[::7, ::7].reshape(-1, 4).tolist()}) > 20
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in plot_sweep(TABLE, tmp_path)] == before


def figures(monkeypatch, draw, *arguments):
    """Return the figures as they are when they are written."""
    from matplotlib.figure import Figure

    kept, real = [], Figure.savefig

    def savefig(self, *where, **options):
        kept.append(self)
        real(self, *where, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw(*arguments)
    return kept


def test_every_value_is_written_into_its_cell(matplotlib, monkeypatch, tmp_path):
    heatmap, _ = figures(monkeypatch, plot_sweep, TABLE, tmp_path)
    accuracy, steps, tokens, nll = heatmap.axes[:4]
    cells = {t.get_position(): t.get_text() for t in accuracy.texts}
    assert cells == {  # layer 12 above layer 4, strengths -2, 0, 0.5, 8
        (0, 0): "74.0", (1, 0): "80.0", (2, 0): "75.5", (3, 0): "68.0",
        (0, 1): "66.0", (1, 1): "80.0", (2, 1): "67.5", (3, 1): "60.0",
    }  # fmt: skip
    assert [t.get_text() for t in accuracy.get_xticklabels()] == ["−2", "0", "0.5", "8"]
    assert [t.get_text() for t in accuracy.get_yticklabels()] == ["4", "12"]
    assert {t.get_text() for t in steps.texts} == {"5.5", "5.0", "4.9", "3.0"}
    assert {t.get_text() for t in tokens.texts} == {"82", "80", "72"}
    assert {t.get_text() for t in nll.texts} == {"0.140", "0.100", "0.103", "0.740"}


def test_the_unsteered_value_has_the_neutral_colour(matplotlib, monkeypatch, tmp_path):
    heatmap, _ = figures(monkeypatch, plot_sweep, TABLE, tmp_path)
    for axes, value in zip(heatmap.axes[:4], (0.8, 5.0, 80.0, 0.1), strict=True):
        [image] = axes.images
        assert image.norm(value) == pytest.approx(0.5)
        assert min(image.to_rgba(value)[:3]) > 0.9
        ends = image.norm(np.array([image.get_array().min(), image.get_array().max()]))
        assert ends[0] == pytest.approx(0) or ends[1] == pytest.approx(1)


def test_curves(matplotlib, monkeypatch, tmp_path):
    _, curves = figures(monkeypatch, plot_sweep, TABLE, tmp_path)
    accuracy, _, tokens, _ = curves.axes
    lines = {line.get_label(): line for line in tokens.lines}
    assert set(lines) == {"unsteered", "layer 4", "layer 12"}
    assert list(lines["layer 4"].get_xdata()) == [0, 1, 2, 3]  # categories, not distances
    assert list(lines["layer 4"].get_ydata()) == [82, 80, 79.5, 72]
    assert set(lines["unsteered"].get_ydata()) == {80}
    [legend] = curves.legends
    assert [t.get_text() for t in legend.get_texts()] == ["unsteered", "layer 4", "layer 12"]
    bars = [c for c in accuracy.collections if type(c).__name__ == "LineCollection"]
    spans = [[(a[1], b[1]) for a, b in c.get_segments()] for c in bars]
    assert spans[0] == [pytest.approx(s) for s in [(64, 84), (65.5, 85.5), (58, 78)]]


def test_figures_that_are_missing(matplotlib, monkeypatch, tmp_path):
    table = [
        row(None, 0.0, nll=None),
        row(4, 1.0, nll=None, tokens=math.nan),
        row(5, 2.0, nll=None),
    ]
    heatmap, curves = figures(monkeypatch, plot_sweep, table, tmp_path)
    titles = ["Accuracy (%)", "Steps per response", "Tokens per response"]
    assert [axes.get_title() for axes in curves.axes] == titles  # no panel for an NLL
    assert [axes.get_title() for axes in heatmap.axes if axes.get_title()] == titles
    assert {t.get_position() for t in heatmap.axes[0].texts} == {
        (0, 0), (1, 0), (0, 1), (2, 1)
    }  # no run at layer 4, strength 2  # fmt: skip
    assert [len(line.get_xdata()) for line in curves.axes[2].lines] == [2, 1, 2]


@pytest.mark.parametrize(
    ("norms", "labels", "unit"),
    [
        ({4: 7.3, 5: 11.1}, ["−10%", "0%", "+30%"], "dose"),
        ({4: 10.0}, ["−10%\n−1", "0%\n0", "+30%\n3"], "dose, strength"),
    ],
)
def test_doses_share_their_columns(matplotlib, monkeypatch, tmp_path, norms, labels, unit):
    table = [row(None, 0.0, dose=0.0)] + [
        row(layer, dose * norm, dose=dose * norm / norm)
        for layer, norm in norms.items()
        for dose in (-0.1, 0.3)
    ]
    heatmap, _ = figures(monkeypatch, plot_sweep, table, tmp_path)
    assert [t.get_text() for t in heatmap.axes[0].get_xticklabels()] == labels
    assert heatmap.axes[0].get_xlabel() == unit
    assert len(heatmap.axes[0].texts) == 3 * len(norms)


@pytest.mark.parametrize(
    "table",
    [
        [],
        TABLE[1:],
        TABLE[:1],
        [*TABLE, TABLE[0]],
        [*TABLE, TABLE[3]],
        [*TABLE, row(4, 0.0)],
    ],
)
def test_tables_that_are_no_sweep(matplotlib, tmp_path, table):
    with pytest.raises(InputError, match="expected 1 and at least 1, all different"):
        plot_sweep(table, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder(matplotlib, tmp_path):
    with pytest.raises(DiskError, match="there is no folder"):
        plot_sweep(TABLE, tmp_path / "none")


def scored(accuracy, tokens):
    """A score of 40 problems; ``accuracy`` and ``tokens`` are value, low, high."""
    return Score(
        problems=40, correct=20, accuracy=Estimate(*accuracy), steps=Estimate(5, 4, 6), tokens=Estimate(*tokens), density=20.0,
        nll=None, nll_count=0, truncated=0, disagreements=0, seconds=1.0,
    )  # fmt: skip


def test_scores_are_drawn_with_both_intervals(matplotlib, monkeypatch, tmp_path):
    scores = {
        "unsteered": scored((0.5, 0.35, 0.65), (300, 280, 325)),
        "steered": scored((0.6, 0.45, 0.73), (230, 210, 250)),
        "instruction:" + 60 * "a": scored((0.4, 0.27, 0.55), (120, 110, 130)),
    }
    [figure] = figures(monkeypatch, plot_scores, scores, tmp_path / "scores.png")
    assert pixels(tmp_path / "scores.png").shape[2] == 4
    [axes] = figure.axes
    points = [c for c in axes.containers if type(c).__name__ == "ErrorbarContainer"]
    assert [(c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in points] == [
        (300, 50), (230, 60), (120, 40),
    ]  # fmt: skip
    across, up = points[0][2]
    assert across.get_segments()[0].tolist() == [[280, 50], [325, 50]]
    assert up.get_segments()[0].tolist() == [[300, 35], [300, 65]]
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:2] == ["unsteered", "steered"] and len(names[2]) <= 48


def test_no_scores(matplotlib, tmp_path):
    with pytest.raises(InputError, match="no scores"):
        plot_scores({}, tmp_path / "scores.png")


@pytest.mark.parametrize("draw", [plot_sweep, plot_scores])
def test_without_matplotlib(monkeypatch, tmp_path, draw):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=re.escape(install_command("plot"))):
        draw(TABLE, tmp_path)


def test_no_global_state_is_touched(matplotlib, tmp_path):
    """Neither pyplot nor a backend; no display is needed."""
    code = f"""
import sys
from pathlib import Path
from mlx_densesteer.evaluation.plot import plot_sweep
assert "matplotlib" not in sys.modules
plot_sweep({TABLE!r}, Path("."))
assert "matplotlib.pyplot" not in sys.modules
"""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "tkagg"}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heatmap.png").is_file()
