"""Draws what was measured of tokenizers as bars, by language, into a PNG file; measures nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import ConfigError, MachineError, argument

if TYPE_CHECKING:
    from lowvram.evaluate.tokenizer_figures import Figures

# The figures of each tokenizer by its name, and of each language.
FiguresByName = Mapping[str, Mapping[str, "Figures"]]
_WIDTH_INCHES, _ROW_INCHES = 10.0, 3.2
_DPI = 120
# Numbers stand above the bars where there are no more in a panel.
_MOST_LABELLED = 12


def check_chart(path: Path) -> None:
    """Raise ConfigError where a chart is not to be a PNG file, MachineError where matplotlib is not installed."""
    if path.suffix.lower() != ".png":
        why = f"A chart is written as PNG, and {path.name or path} ends otherwise."
        named = path.parent / f"{path.stem or 'chart'}.png"  # "." has no name
        raise ConfigError(f"{argument('chart')} is {path}.", why, f"Write {argument('chart', named)}.")
    _import_figure()


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "Install it in the folder of lowvram: pip install -e '.[chart]'"
        raise MachineError("A chart needs the package matplotlib.", "It is not installed.", fix) from error
    return Figure


def _boundary_f1(figures: Figures) -> float | None:
    return figures.boundaries.by_type.f1 if figures.boundaries else None


_PANELS: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
    ("bytes per token (more text in a token)", lambda figures: figures.bytes_per_token),
    ("tokens per word (fewer is shorter)", lambda figures: figures.tokens_per_word),
    ("words of more than one token, %", lambda figures: 100 * figures.continued),
    ("lines that come back unchanged, %", lambda figures: 100 * figures.exact_lines),
    ("encoded, MB per CPU second", lambda figures: figures.speed.mb_per_s),
    ("boundaries of morphemes, F1", _boundary_f1),
)


def draw_chart(found: FiguresByName, path: Path) -> None:
    """Write the chart: a panel for each figure, a group of bars for each language."""
    from lowvram.storage.disk import DISK

    check_chart(path)
    languages = list(next(iter(found.values())))
    panels = [(title, read, _languages_with(found, languages, read)) for title, read in _PANELS]
    panels = [panel for panel in panels if panel[2]]
    rows = (len(panels) + 1) // 2
    figure = _import_figure()(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows + 0.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (title, read, measured) in zip(axes, panels, strict=False):
        _draw_panel(axis, found, measured, title, read)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    DISK.write(path, image.getvalue())


def _languages_with(
    found: FiguresByName, languages: Sequence[str], read: Callable[[Figures], float | None]
) -> list[str]:
    """Return the languages of which some tokenizer has this figure."""
    return [name for name in languages if any(read(figures[name]) is not None for figures in found.values())]


def _draw_panel(
    axis: Any, found: FiguresByName, languages: Sequence[str], title: str, read: Callable[[Figures], float | None]
) -> None:
    width = 0.8 / len(found)
    for number, (name, figures) in enumerate(found.items()):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(languages))]
        heights = [read(figures[language]) or 0.0 for language in languages]
        bars = axis.bar(places, heights, width * 0.92, label=name)
        if len(found) * len(languages) <= _MOST_LABELLED:
            axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(languages)), languages)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
