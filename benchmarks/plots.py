"""The comparison of methods as two figures: ROC curves, and AUC against cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sklearn.metrics import roc_curve  # type: ignore[import-untyped]

from benchmarks.scores import Row, rank
from diffdefend_core.report.charts import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours that differ for the colour-blind too, with line styles and markers, since good methods lie on each other
LOOKS = {
    "diffdefend": ("#0072b2", "-", "o"),
    "terd": ("#d55e00", "--", "s"),
    "terd-full": ("#e69f00", "--", "v"),
    "elijah": ("#009e73", "-.", "D"),
    "purediffusion": ("#cc79a7", ":", "^"),
}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def roc_figure(document: Row, path: Path) -> None:
    """Write the ROC curve of every method with an AUC, over the scored models of the first seed, as PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.8, 4.6)
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
        for method, row in _with_auc(document).items():
            judged = [
                item
                for item in document["models"]
                if item["method"] == method and item["scored"] and item["seed"] == document["seeds"][0]
            ]
            scores = [rank(item, document["limit"]) for item in judged]
            false, true, _ = roc_curve([item["backdoored"] for item in judged], scores)
            color, line, _ = LOOKS[method]
            low, high = row["auc_interval"]
            label = f"{method}  {row['auc']:.2f} ({low:.2f} to {high:.2f})"
            # a curve on the frame would be cut in half
            axes.plot(false, true, line, color=color, linewidth=2, label=label, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel("false-positive rate (clean models flagged)")
        axes.set_ylabel("true-positive rate (backdoored models flagged)")
        if _with_auc(document):
            axes.legend(loc="lower right", title="AUC (95 % interval)", title_fontsize=8.5, alignment="left")
        _save(figure, path)


def cost_figure(document: Row, path: Path) -> None:
    """Write AUC against median evaluations (logarithmic) as PNG; a method without an AUC is a line at its cost."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = _with_auc(document)
    spent = {name: row["median_forward_equivalents"] for name, row in document["methods"].items()}
    spent = {name: cost for name, cost in spent.items() if cost}
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 3.6)
        axes.set_xscale("log")
        for method, cost in spent.items():
            color, line, marker = LOOKS[method]
            label = f"{method}\n{_spaced(cost)}"
            if method in known:
                value, (low, high) = known[method]["auc"], known[method]["auc_interval"]
                axes.plot([cost, cost], [low, high], color=color, linewidth=1.4)
                axes.plot(cost, value, marker, color=color, ms=8, mec="white", clip_on=False, zorder=3, label=label)
            else:
                axes.axvline(cost, color=color, linewidth=1.4, linestyle=line, label=f"{label}, cost alone")
        if spent:
            axes.set_xlim(min(spent.values()) / 2, max(spent.values()) * 2)
            figure.legend(loc="outside right upper", labelspacing=0.8)
        axes.set_ylim(min([0.45, *(row["auc_interval"][0] - 0.05 for row in known.values())]), 1.03)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: _spaced(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("network evaluations for one model, median")
        axes.set_ylabel("AUC, with 95 % interval")
        _save(figure, path)


def _spaced(value: float) -> str:
    """Return a whole number with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u2009")


def _with_auc(document: Row) -> dict[str, Row]:
    return {name: row for name, row in document["methods"].items() if row.get("auc") is not None}


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160, metadata={"Software": None})
