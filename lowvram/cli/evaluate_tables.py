"""Shows what was measured on files as tables, each with what its columns mean; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text as Cell

from lowvram.cli.console import clean, lay_out, result, tabulate, written
from lowvram.units import count_of, show_count

if TYPE_CHECKING:
    from lowvram.api.evaluation import Evaluation
    from lowvram.evaluate.harness import HarnessRow
    from lowvram.evaluate.intervals import Interval
    from lowvram.evaluate.minimal_pairs import PairsReport, PairsRow
    from lowvram.evaluate.multiple_choice import ChoicesReport
    from lowvram.evaluate.suffix_loss import SuffixReport
    from lowvram.evaluate.text_score import TextScore


def show_measured(found: Evaluation) -> None:
    """Print a table for each kind of file, and the samples."""
    measured = found.measured
    is_first = found.data is None
    if measured.as_dict():
        result(f"{'' if is_first else chr(10)}{found.checkpoint}, weights in {found.precision}")
    if measured.text:
        _show_text(measured.text, found.seq_len)
    for pairs in measured.pairs:
        _show_pairs(pairs)
    if measured.choices:
        _show_choices(measured.choices)
    for suffixes in measured.suffixes:
        _show_suffixes(suffixes)
    if measured.harness:
        _show_harness(measured.harness)
    for sample in measured.samples:
        result()
        result(f"{sample.prompt} …", "bold")
        written(sample.text.strip("\n"))


def _show_text(rows: Sequence[TextScore], seq_len: int) -> None:
    result()
    names = ("text", "bits per byte", "nats per token", "tokens", "bytes")
    cells = [
        (str(row.name), f"{row.bits_per_byte:.4f}", f"{row.loss:.4f}", f"{row.tokens:,}", f"{row.text_bytes:,}")
        for row in rows
    ]
    lay_out(tabulate(names, cells), is_folded=True)
    result(
        f"In windows of {seq_len} tokens, as shards are read; BOS is read and not counted. Bits per byte compare "
        "models of any tokenizer."
    )


def _show_pairs(report: PairsReport) -> None:
    result()
    names = ("minimal pairs, in %", "pairs", "right", "95 %", "/byte", "before", "/byte", "shorter")
    means = {"mean of all": report.mean, "mean, length-controlled": report.controlled_mean}
    # A narrow window breaks names between words.
    rows = [_pairs_cells(row.name.replace("_", " "), row, "") for row in report.rows]
    rows += [_pairs_cells(name, row, "bold") for name, row in means.items() if row is not None]
    lay_out(tabulate(names, rows), is_folded=True)
    same = f"; {count_of(report.identical, 'pair')} of identical sentences left out" if report.identical else ""
    result(f"{report.file}{same}.")
    result(
        "right: the sum of the better sentence's log-probabilities is greater; /byte: their mean.  before: the same "
        "model untrained, by the sum and /byte.  shorter: the rule that takes the shorter sentence. Where that rule "
        "or the untrained model are as good as the model, the phenomenon says nothing."
    )
    if report.controlled_mean is not None:
        result("The mean of the nine phenomena in which length gives little away is the figure to compare.")


def _pairs_cells(name: str, row: PairsRow, style: str) -> list[str | Cell]:
    given = (row.per_byte, row.untrained, row.untrained_per_byte, row.shorter)
    shares = ["–" if share is None else _percent(share) for share in given]
    cells = (name, f"{row.count:,}", _percent(row.by_sum), _show_interval(row.interval), *shares)
    return [Cell(clean(cell), style) for cell in cells]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _show_interval(interval: Interval) -> str:
    return f"{100 * interval.low:.0f}–{100 * interval.high:.0f}"


def _show_choices(reports: Sequence[ChoicesReport]) -> None:
    result()
    names = ("multiple choice, in %", "questions", "right", "95 %", "by sum", "chance", "longest")
    rows = [
        (
            report.file.name,
            f"{report.count:,}",
            _percent(report.per_byte),
            _show_interval(report.interval),
            _percent(report.by_sum),
            _percent(report.chance),
            _percent(report.longest),
        )
        for report in reports
    ]
    lay_out(tabulate(names, rows), is_folded=True)
    result(
        "right: the choice with the greatest log-probability per byte; by sum: with the greatest sum.  chance: what "
        "guessing gets.  longest: what the rule gets that takes the longest choice."
    )
    for report in reports:
        if report.is_chance:
            result(f"{report.file.name}: chance lies within the interval, so the model cannot be told from guessing.")


def _show_harness(rows: Sequence[HarnessRow]) -> None:
    result()
    cells = [(row.task, row.metric, f"{row.value:.4f}", _show_error(row)) for row in rows]
    lay_out(tabulate(("harness", "figure", "value", "standard error"), cells), is_folded=True)


def _show_error(row: HarnessRow) -> str:
    return "–" if row.error is None else f"{row.error:.4f}"


def _show_suffixes(report: SuffixReport) -> None:
    result()
    names = ("class", "bits per byte", "bits each", "count", "bytes")
    rows = [
        (
            row.name,
            "–" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}",
            "–" if row.bits_each is None else f"{row.bits_each:.2f}",
            f"{row.count:,}" if row.count else "–",
            f"{row.text_bytes:,}",
        )
        for row in report.rows
    ]
    lay_out(tabulate(names, rows), is_folded=True)
    sentences = count_of(report.sentences, "sentence")
    result(f"{report.file}: {sentences}, {show_count(report.words)} words, {report.bits_per_byte:.4f} bits per byte.")
    share = report.unexplained / max(1, report.words)
    result(
        f'"other" is punctuation, and the {share:.1%} of the words that their analysis does not explain. The blank '
        "before a word belongs to its stem; a token's cost is spread evenly over its bytes."
    )
