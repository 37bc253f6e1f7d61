"""Draws what was measured of tokenizers as bars, by language, into a PNG file; measures nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import ConfigError, MachineError, argument

if TYPE_CHECKING:
    from lowvram.evaluate.parity import ParityFigures
    from lowvram.evaluate.tokenizer_figures import Figures

# The figures of each tokenizer by its name, and of each language.
FiguresByName = Mapping[str, Mapping[str, "Figures"]]
ParityByName = Mapping[str, Mapping[str, "ParityFigures"]]
# A title, and the heights of the bars by tokenizer and language.
_Panel = tuple[str, Mapping[str, Mapping[str, float]]]
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


def draw_chart(found: FiguresByName, path: Path, parity: ParityByName | None = None) -> None:
    """Write the chart: a panel for each figure, a group of bars for each language."""
    from lowvram.storage.disk import DISK

    check_chart(path)
    panels = [(title, _heights(found, read)) for title, read in _PANELS] + _parity_panels(parity or {})
    panels = [panel for panel in panels if any(panel[1].values())]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _import_figure()(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows + 0.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    DISK.write(path, image.getvalue())


def _heights(found: FiguresByName, read: Callable[[Figures], float | None]) -> dict[str, dict[str, float]]:
    """Return one figure of each tokenizer and language; languages of which no tokenizer has it are left out."""
    read_all = {name: {language: read(each) for language, each in figures.items()} for name, figures in found.items()}
    known = {language for each in read_all.values() for language, height in each.items() if height is not None}
    return {
        name: {language: height or 0.0 for language, height in each.items() if language in known}
        for name, each in read_all.items()
    }


def _parity_panels(parity: ParityByName) -> list[_Panel]:
    """Return the panel of parity, or none where it was not measured."""
    if not parity:
        return []
    first = next(iter(next(iter(parity.values()))))
    heights = {name: {language: figures.parity for language, figures in each.items()} for name, each in parity.items()}
    return [(f"parity: tokens over those of {first}, same sentences", heights)]


def _draw_panel(axis: Any, panel: _Panel) -> None:
    title, found = panel
    languages = list(next(iter(found.values())))
    width = 0.8 / len(found)
    for number, (name, heights) in enumerate(found.items()):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(languages))]
        bars = axis.bar(places, list(heights.values()), width * 0.92, label=name)
        if len(found) * len(languages) <= _MOST_LABELLED:
            axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(languages)), languages)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
