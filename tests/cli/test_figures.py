from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_fscreen.cli import figure_style, figures, layer_figures
from lightning_fscreen.trained.sensitivities import GroupSensitivity, Sensitivity


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def written(figure: Figure, folder: Path) -> Path:
    (path,) = figures.save_figures({"figure": figure}, folder)
    return path


def shown(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_schedule_shows_the_curve_and_what_was_applied(tmp_path: Path) -> None:
    curve = ([0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.3, 0.6, 0.9, 0.9])
    figure = figures.schedule_figure(
        [1, 2, 3, 4], [0.3, 0.6, 0.9, 0.9], [0.3, 0.6, 0.85, 0.85], curve=curve, start_epoch=0, end_epoch=3, amount=0.9
    )
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert np.asarray(lines["schedule"].get_ydata()) == pytest.approx([0, 30, 60, 90, 90])
    assert np.asarray(lines["pruned at the end of an epoch"].get_ydata()) == pytest.approx([30, 60, 85, 85])
    assert legend(figure)[:2] == ["fine-tuning", "amount: 90 %"]
    assert axes.get_ylabel() == "pruned (% of the candidates)"
    assert written(figure, tmp_path).stat().st_size > 1000


def test_schedule_without_fine_tuning_shades_nothing() -> None:
    figure = figures.schedule_figure(
        [1, 2], [0.5, 0.9], [0.5, 0.9], curve=None, start_epoch=0, end_epoch=2, amount=0.9, unit="step"
    )
    assert "fine-tuning" not in legend(figure)
    assert figure.axes[0].get_xlabel() == "steps trained"
    assert figure.axes[0].get_title() == "Annealing from step 0 to 2"


@pytest.mark.parametrize("epochs", [0, 1, 300])
def test_schedule_of_any_length(tmp_path: Path, epochs: int) -> None:
    values = [0.5] * epochs
    figure = figures.schedule_figure(
        range(1, epochs + 1), values, values, curve=None, start_epoch=0, end_epoch=1, amount=0.5
    )
    assert written(figure, tmp_path).exists()


def test_connections_counts_per_pixel_over_all_channels(tmp_path: Path) -> None:
    mask = torch.zeros(4, 3 * 2 * 5, dtype=torch.bool)
    pixel = 1 * 5 + 3
    mask[:, pixel] = True  # channel 0
    mask[0, 2 * 10 + pixel] = True  # channel 2
    figure = figures.connections_figure(mask, (3, 2, 5))
    pixels, matrix = shown(figure)
    expected = torch.zeros(2, 5)
    expected[1, 3] = 5
    counts = pixels.images[0].get_array()
    assert counts is not None and counts.tolist() == expected.tolist()
    drawn = matrix.images[0].get_array()
    assert drawn is not None and drawn.tolist() == mask.tolist()
    assert "5 of 120 connections remain (4.2 %)" in texts(figure)
    assert written(figure, tmp_path).exists()


@pytest.mark.parametrize("image_shape", [None, (1, 5, 5)])
def test_connections_without_an_image_show_the_matrix_alone(image_shape: tuple[int, int, int] | None) -> None:
    assert len(figures.connections_figure(torch.ones(3, 20, dtype=torch.bool), image_shape).axes) == 1


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (2000, 3), (7, 3072), (10, 0)])
@pytest.mark.parametrize("value", [False, True])
def test_connections_all_or_none_in_any_shape(tmp_path: Path, shape: tuple[int, int], value: bool) -> None:
    figure = figures.connections_figure(torch.full(shape, value), (3, 32, 32))
    assert written(figure, tmp_path).exists()


def test_connections_of_a_large_layer_lose_no_dot() -> None:
    mask = torch.zeros(1200, 3001, dtype=torch.bool)
    mask[1199, 3000] = mask[5, 7] = True
    (axes,) = figures.connections_figure(mask, None).axes
    drawn = axes.images[0].get_array()
    assert drawn is not None and drawn.sum() == 2
    assert axes.get_xlim() == (-0.5, 3000.5) and axes.get_ylim() == (1199.5, -0.5)


def test_weights_leaves_out_zeros_and_draws_every_layer(tmp_path: Path) -> None:
    weights = {"fc1": torch.tensor([[0.0, 0.5], [-0.5, 0.25]]), "fc2": torch.tensor([1.0, 0.0])}
    figure = figures.weights_figure(weights, {name: weight + 1 for name, weight in weights.items()})
    assert legend(figure) == ["before pruning (6)", "all layers (4)", "fc1 (3)", "fc2 (1)"]
    assert figure.axes[0].get_title() == "4 weights remain"
    assert written(figure, tmp_path).exists()


@pytest.mark.parametrize(("layers", "outlines"), [(0, 0), (1, 0), (2, 2), (8, 8), (9, 0), (60, 0)])
def test_weights_outlines_up_to_eight_layers(tmp_path: Path, layers: int, outlines: int) -> None:
    figure = figures.weights_figure({f"layer{i}": torch.randn(3, 4) for i in range(layers)})
    assert len(legend(figure)) == 1 + outlines
    assert written(figure, tmp_path).exists()


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.tensor([math.nan, math.inf, 1.0]), torch.ones(3).bfloat16()])
def test_weights_takes_any_values(tmp_path: Path, weight: torch.Tensor) -> None:
    assert written(figures.weights_figure({"fc": weight}), tmp_path).exists()


def test_layers_are_labelled_with_their_numbers(tmp_path: Path) -> None:
    figure = layer_figures.layers_figure(["fc1", "fc2"], [235200, 1000], [4704, 224])
    assert {"fc1", "4,704 of 235,200 (2 %)", "224 of 1,000 (22.4 %)", "4,928 of 236,200 (2.1 %)"} <= set(texts(figure))
    assert written(figure, tmp_path).exists()


@pytest.mark.parametrize("layers", [0, 1, 40, 41, 170])
@pytest.mark.parametrize("kept", [0, 64])
def test_layers_of_any_depth_do_not_overlap(tmp_path: Path, layers: int, kept: int) -> None:
    names = [f"features.denseblock{i}.denselayer{i}.norm.with.a.long.name" for i in range(layers)]
    figure = layer_figures.layers_figure(names, [64] * layers, [kept] * layers)
    assert written(figure, tmp_path).exists()
    (axes,) = figure.axes
    deep = layers > 40
    labels = [label.get_window_extent() for label in (axes.get_xticklabels() if deep else axes.get_yticklabels())]
    for one, next_one in pairwise(labels):
        if deep:  # rotated: their ends are one line height apart
            assert next_one.x1 - one.x1 > 12
        else:
            assert not one.overlaps(next_one)


def test_sensitivities_are_fields_of_groups_and_fractions(tmp_path: Path) -> None:
    groups = GroupSensitivity(("a", "b"), 8, (2, 4), (0.9, 0.8)), GroupSensitivity(("c",), 4, (1, 2), (0.95, 0.1))
    figure = layer_figures.sensitivity_figure(Sensitivity((0.25, 0.5), 0.97, groups))
    (axes,) = shown(figure)
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.9, 0.8], [0.95, 0.1]]
    assert {"a, b", "c", "25 %", "50 %"} <= set(texts(figure)) and "0.97" in axes.get_title()
    assert written(figure, tmp_path).stat().st_size > 1000


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0 %"), (1, "100 %"), (0.98, "98 %"), (0.957, "95.7 %"), (0.9999, "99.99 %"), (0.00001, "0.001 %")],
)
def test_percent_never_rounds_to_none_or_all(fraction: float, text: str) -> None:
    assert figure_style.percent(fraction) == text


def test_save_figures_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "figures"
    some = {
        "layers": layer_figures.layers_figure(["a"], [2], [1]),
        "weights": figures.weights_figure({"a": torch.ones(2)}),
    }
    figures.save_figures(some, folder)
    paths = figures.save_figures(some, folder)
    assert paths == [folder / "layers.png", folder / "weights.png"]
    assert sorted(folder.iterdir()) == paths
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_save_figures_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = layer_figures.layers_figure(["a"], [2], [1])
    before = written(figure, tmp_path).read_bytes()

    def fail(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        written(figure, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_figures_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(rcParams)
    written(layer_figures.layers_figure(["a"], [2], [1]), tmp_path)
    assert dict(rcParams) == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed
    with pytest.raises(ImportError, match=r"pip install lightning-fscreen\[cli\]"):
        layer_figures.layers_figure(["a"], [2], [1])
