"""How figures look: an estimator's colour and marker are the same in all of them; files are the same from run to run.

Colours are told apart by readers who are colour-blind (tested), and no two estimators share a marker. Matplotlib is
imported inside functions, and its global state (pyplot) is not used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P = ParamSpec("P")
R = TypeVar("R")

INK, FAINT, BAND = "#222222", "#8a8a8a", "#d9d9d9"
HELPFUL, HARMFUL = "#0072B2", "#D55E00"
SIZE = (5.2, 3.6)
"""Inches of a figure: as wide as a column of a paper, and as a telephone at its own size."""

_LOOKS = {
    "grad_dot": ("#0072B2", "o"),
    "grad_cos": ("#56B4E9", "s"),
    "cg": ("#D55E00", "P"),
    "lissa": ("#EE99AA", "X"),
    "lissa_h": ("#882255", "h"),
    "lissa_matched": ("#CC79A7", "8"),
    "trak": ("#7F7F7F", "v"),
    "ekfac": ("#E69F00", "D"),
    "ekfac_matched": ("#8C510A", "d"),
    "datainf": ("#009E73", "^"),
    "unrolled": ("#000000", "*"),
    "mirrored": ("#332288", "p"),
}
_OTHERS = (("#997700", "<"), ("#004488", ">"), ("#BB5566", "H"), ("#44AA99", "1"), ("#661100", "2"), ("#DDCC77", "3"))
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)), (0, (1, 3)), (0, (8, 2)))

Named = tuple[str, str]
"""An estimator and its params, as in tables."""


@dataclass(frozen=True)
class Look:
    """How one entry is drawn; ``line`` tells hyper-parameters of one estimator apart."""

    colour: str
    marker: str
    line: Any

    def plot(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, "markersize": 4, "linewidth": 1.3}


def looks(entries: Iterable[Named]) -> dict[Named, Look]:
    """Each entry's look: colour and marker of its estimator, a line for each of its hyper-parameters in turn."""
    kept = list(dict.fromkeys(entries))
    strangers = sorted({name for name, _ in kept if name not in _LOOKS})
    known = {**_LOOKS, **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(strangers)}}
    met: dict[str, int] = {}
    found = {}
    for named in kept:
        place = met[named[0]] = met.get(named[0], -1) + 1
        found[named] = Look(*known[named[0]], _LINES[place % len(_LINES)])
    return found


def palette() -> dict[str, tuple[str, str]]:
    """Colour and marker of every estimator that is known by name."""
    return dict(_LOOKS)


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's settings for one figure, drawing and writing included."""
    import matplotlib as mpl

    settings: Any = {
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#ececec",
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fimo",
        "pdf.fonttype": 42,
        "figure.dpi": 100,
    }
    with mpl.rc_context(settings):
        yield


def axes(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def legend(ax: Axes, columns: int = 3, handles: Sequence[Any] | None = None) -> None:
    """A legend under the axes, which hides no data."""
    drawn, names = ax.get_legend_handles_labels()
    if handles is None and not drawn:
        return
    chosen = {} if handles is None else {"handles": list(handles)}
    if handles is None and max(map(len, names)) > 24:
        columns = 2
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.19), ncol=columns, handlelength=2.6, columnspacing=1.2, **chosen
    )


def by_step(ax: Axes, steps: Sequence[int]) -> None:
    """A horizontal axis of steps: on a log scale where they span more than a decade."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ax.set_xlabel("steps of further training")
    if len(steps) > 1 and steps[-1] >= 8 * max(steps[0], 1):
        log_scale(ax, steps)
    else:
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_scale(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis with plain numbers at 1, 2, 5 × 10ⁿ."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    wide = max(values) > 200 * max(min(values), 1e-300)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def shades(count: int) -> list[tuple[float, ...]]:
    """Light to dark, for what has an order: steps."""
    from matplotlib import colormaps

    return [colormaps["cividis_r"](0.15 + 0.8 * place / max(1, count - 1)) for place in range(count)]


def nothing(ax: Axes, why: str) -> Axes:
    """Axes that say why there is nothing to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color=FAINT, wrap=True)
    return ax


def encode(figure: Any, kind: str) -> bytes:
    """A figure as ``svg``, ``pdf`` or ``png`` bytes, without a date, so that equal figures are equal files."""
    sink = io.BytesIO()
    about: dict[str, Any] = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    figure.savefig(sink, format=kind, dpi=200, metadata=about)
    return sink.getvalue()


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """A figure function that draws in fimo's style, whoever calls it."""

    @wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> R:
        with styled():
            return function(*args, **kwargs)

    return draw
