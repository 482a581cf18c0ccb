"""The look that the pictures share: colours, type, the page and its heading. matplotlib is imported only to draw."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sera_jax import whole

# Okabe and Ito's palette, told apart by every common kind of colour vision; markers differ as well.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, YELLOW, BROWN = "#000000", "#F0E442", "#7A5230"
OTHERS = [(SKY, "P"), (BLACK, "X"), (YELLOW, "*"), (PURPLE, "p"), (ORANGE, "8"), (BROWN, ">"), (GREEN, "H")]
GREY = "#6E6E6E"
INK = "#222222"
PANEL_INCHES = (4.3, 3.5)  # width, height


@dataclasses.dataclass(frozen=True)
class ArmLook:
    """An arm in a picture.

    Attributes:
        label: its name there; "" for the arm's own.
        marker: of a line with points.
        dashes: of an arm that has no course, which is then a level line.
    """

    label: str
    colour: str
    marker: str = "o"
    dashes: Any = (0, (2, 1))


Looks = Mapping[str, ArmLook]


def looks_of(arms: Sequence[str], looks: Looks) -> dict[str, ArmLook]:
    """How each of the arms looks; those without a look of their own share out what is left."""
    taken = {(looks[arm].colour, looks[arm].marker) for arm in arms if arm in looks}
    colours = {colour for colour, _ in taken}
    others = itertools.cycle(sorted(set(OTHERS) - taken, key=lambda other: (other[0] in colours, OTHERS.index(other))))
    return {arm: looks[arm] if arm in looks else ArmLook(arm, *next(others)) for arm in arms}


_SETTINGS = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlepad": 10,
    "text.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 1.4,
}


@contextlib.contextmanager
def page(path: str | os.PathLike[str], *, columns: int, lines: int) -> Iterator[Any]:
    """A figure with room for columns x lines panels and a heading; written to `path`, whole or not at all, at the end.

    What is drawn within the block has the shared look. An error in the block leaves no file.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = PANEL_INCHES
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(
            figsize=(width * columns, height * lines + 0.9),
            dpi=140,
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14),
        )
        FigureCanvasAgg(figure)
        yield figure
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.with_name(path.name + ".tmp")
        figure.savefig(torn, format="png", dpi="figure")
        whole.appear(torn, path)


def head(figure: Any, text: str, handles: Sequence[Any], *, wide: bool) -> None:
    """The heading, and the legend of the arms beside it, or below the panels where the page is not `wide`."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=13, fontweight="bold")
    place = "outside upper right" if wide else "outside lower left"
    figure.legend(handles=handles, loc=place, ncols=len(handles), fontsize=10)


def line(colour: str, marker: str, label: str) -> Any:
    """What a legend shows of an arm."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, label=label)


def patch(**settings: Any) -> Any:
    """What a legend shows of a bar."""
    from matplotlib.patches import Patch

    return Patch(**{"linewidth": 1.0, **settings})
