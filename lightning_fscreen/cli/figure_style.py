"""The look of all pictures: colours, axes, and numbers as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, _GREEN, RED, _SKY, _PINK, _YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#B8A800",  # darkened: the original is too faint for lines on white
)
_DARK, GREY, LIGHT = "#333333", "#8C8C8C", "#E6E6E6"
LAYER_COLOURS = (BLUE, ORANGE, _GREEN, RED, _SKY, _PINK, _YELLOW, _DARK)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with: pip install lightning-fscreen[cli]") from error
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def finish(axes: Axes) -> None:
    """Leave axes with two spines and horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def integer_ticks(axes: Axes, which: Literal["x", "y", "both"]) -> None:
    """Ticks at whole numbers only."""
    if which in ("x", "both"):
        axes.xaxis.set_major_locator(integer_locator())
    if which in ("y", "both"):
        axes.yaxis.set_major_locator(integer_locator())


def integer_locator() -> MaxNLocator:
    """Places ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True, min_n_ticks=1)


def ratio(part: float, whole: float) -> float:
    """Part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def percent(fraction: float) -> str:
    """Rounded to one digit; only nothing is 0 %, only all is 100 %."""
    digits = 1
    while digits < 6 and 0 < fraction < 1 and float(f"{100 * fraction:.{digits}f}") in (0.0, 100.0):
        digits += 1
    text = f"{100 * fraction:.{digits}f}"
    return f"{text.removesuffix('.0')} %"


def short(name: str, limit: int = 32) -> str:
    """Long names lose their middle: both ends tell layers apart."""
    if len(name) <= limit:
        return name
    half = (limit - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
