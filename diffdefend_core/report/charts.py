"""Curves as SVG text: the network's response over the timesteps, losses over the steps, attack success."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffdefend_core.artifacts import AttackRow, Metric, TriggerCandidate
from diffdefend_core.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#3d4650"
PANELS = 4  # in a row, at most
QUIET = "#b4bcc4"
_STYLE: Any = {
    "font.size": 8.5,
    "text.parse_math": False,  # names come from outside: `$` is a character, not a formula
    "svg.hashsalt": "diffdefend",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


def response_svg(timesteps: Sequence[int], candidates: Sequence[TriggerCandidate], best: str, accent: str) -> str:
    """Return lambda_t and c_t of every candidate over the timesteps; the one named `best` in the accent colour."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, (left, right) = _axes(2)
        for item in sorted(candidates, key=lambda item: item.name == best):
            strong = item.name == best
            color, width = (accent, 1.8) if strong else (QUIET, 1.0)
            for axes, values in ((left, item.response), (right, item.x0_response)):
                label = printable(item.name)[:24]
                axes.plot(timesteps[: len(values)], values, "o-", ms=3, color=color, linewidth=width, label=label)
        left.set_title("λₜ  shift that the network reads as noise")
        right.set_title("cₜ  shift that it paints, beyond its clean reference")
        _scale_around_zero(right, [value for item in candidates for value in item.x0_response])
        right.axhline(0.0, color=INK, linewidth=0.8)
        for axes in (left, right):
            axes.set_xlabel("timestep t")
        if 1 < len(candidates) <= 8:
            left.legend()
        return _svg(figure)


def losses_svg(curves: Mapping[str, Sequence[float]], accent: str) -> str:
    """Return each curve in a panel of its own, over its steps; logarithmic where it spans more than a decade."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, panels = _axes(max(2, len(curves)))
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes, (title, values) in zip(panels, curves.items(), strict=False):
            axes.plot(range(1, len(values) + 1), values, color=accent, linewidth=1.4)
            axes.set_title(printable(title))
            axes.set_xlabel("step")
            if min(values) > 0.0 and max(values) > 10.0 * min(values):
                axes.set_yscale("log")
                _plain_ticks(axes)
        return _svg(figure)


def success_svg(rows: Sequence[AttackRow], thresholds: Sequence[float], chosen: float, accent: str) -> str:
    """Return the success rate over the threshold, a panel for each row: before in grey, after in the accent colour.

    The rows of one trigger stand side by side; there is at least one row.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        triggers = [row.trigger for row in rows]
        figure, panels = _grid(len(rows), max(2, min(PANELS, triggers.count(triggers[0]))))
        for axes, row in zip(panels, rows, strict=True):
            for curve, color in ((row.curve_before, QUIET), (row.curve_after, accent)):
                _plot_curve(axes, thresholds, curve, color)
            axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(printable(f"{row.sampler}, {'true' if row.trigger == 'known' else row.trigger} trigger"))
            axes.set_ylim(-0.04, 1.04)
            axes.set_xlabel("threshold of the squared error")
        return _svg(figure)


def _plot_curve(axes: Axes, thresholds: Sequence[float], curve: Sequence[Metric], color: str) -> None:
    """Draw a curve of as many points as there are thresholds, with the band of its intervals."""
    if len(curve) != len(thresholds):
        return
    axes.fill_between(thresholds, [m.low for m in curve], [m.high for m in curve], color=color, alpha=0.18, linewidth=0)
    axes.plot(thresholds, [m.value for m in curve], "o-", ms=3, color=color, linewidth=1.6)


def _grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Return `count` panels in rows of `columns`, all of one size."""
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    figure = Figure(figsize=(9.4, 2.5 * lines))
    figure.subplots_adjust(
        left=0.05, right=0.995, top=1 - 0.25 / (2.5 * lines), bottom=0.45 / (2.5 * lines), wspace=0.2, hspace=0.5
    )
    return figure, [figure.add_subplot(lines, columns, index + 1) for index in range(count)]


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 2.5))
    figure.subplots_adjust(left=0.05, right=0.995, top=0.9, bottom=0.18, wspace=0.22)
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _scale_around_zero(axes: Axes, values: Sequence[float]) -> None:
    """Show at least -1 to 1, so that what is near zero looks near zero; beyond it, logarithmically."""
    if max((abs(value) for value in values), default=0.0) <= 1.0:
        axes.set_ylim(-1.0, 1.0)
        return
    axes.set_yscale("symlog", linthresh=1.0)
    _plain_ticks(axes)


def _plain_ticks(axes: Axes) -> None:
    """Label the decades as plain numbers: the default is a formula, and formulas are off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()
