"""`lowvram tokenizer compare`: a table for each language, JSON, or a chart."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.tokenizer_comparing import DEFAULT_SIZE, ONLY
from lowvram.cli.next_step import next_step
from lowvram.cli.options import TEXTS, add_field, size_of_file

if TYPE_CHECKING:
    from lowvram.api.tokenizer_comparing import (
        ComparedSentences,
        ComparedTexts,
        ComparedTokenizer,
        TokenizerComparison,
    )
    from lowvram.evaluate.parity import ParityFigures
    from lowvram.evaluate.tokenizer_figures import Figures

# A word that shows where a Turkish tokenizer cuts.
_EXAMPLE = "Evlerimizdekilerden misiniz?"
_NAMED = re.compile(r"([A-Za-z][A-Za-z_-]{0,15})=(.*)", re.DOTALL)
_HEADS = ("tokenizer", "chars/\ntoken", "bytes/\ntoken", "tokens/\nword", ">1\ntoken", "exact", "same\nids", "MB/s")
# As many languages fit beside each other into 80 columns.
_MOST_ABREAST = 6
_PARITY_ROWS: tuple[tuple[str, Callable[[ParityFigures], str]], ...] = (
    ("tokens", lambda found: f"{found.tokens:,}"),
    ("parity", lambda found: f"{found.parity:.3f}"),
    ("bytes/token", lambda found: f"{found.bytes_per_token:.2f}"),
)


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = actions.add_parser(
        "compare",
        help="measure tokenizers of any kind on the same text",
        description="Measure tokenizers on the same text, language by language: how much text a token holds, how many "
        "tokens a word takes, which text does not come back, which strings get the same ids, and how fast it is. With "
        "--parallel: how many tokens the same sentences take in several languages.",
    )
    what = (
        "folders or files: a tokenizer.json of any kind, a SentencePiece .model, a .tiktoken file; or turkish-tokenizer"
    )
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER", help=what)
    what = f"text of each language, as tr=a.txt b.txt kk=kk.txt; a language may be left out. Text is {TEXTS}"
    parser.add_argument("--text", nargs="+", metavar="[LANGUAGE=]FILE", action="extend", default=[], help=what)
    what = (
        "words with their morphemes, for F1 of boundaries: a table with the columns form, segmentation and perhaps "
        "count; of the first language where none is named"
    )
    parser.add_argument("--gold", nargs="+", metavar="[LANGUAGE=]FILE", action="extend", default=[], help=what)
    what = (
        "the same sentences in several languages: a .tsv, .csv, .parquet or JSON lines, plain, .gz or .zst, with a "
        "column or field for each language. Shows the parity of each language: its tokens over those of the first one. "
        "--text may then be left out"
    )
    parser.add_argument("--parallel", type=Path, metavar="FILE", help=what)
    what = "columns of --parallel, as tr kk ru; the others are compared with the first (default: languages of --text)"
    parser.add_argument("--languages", nargs="+", metavar="LANGUAGE", action="extend", help=what)
    what = f"read at most so much of each language (default: {DEFAULT_SIZE >> 20}MiB)"
    parser.add_argument("--size", type=size_of_file, default=DEFAULT_SIZE, metavar="SIZE", help=what)
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the figures (pip install -e '.[chart]')")
    add_field(parser)
    what = "rows that are not text: stop at the first (default), or skip a few"
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help=what)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from lowvram.api.parallel_sentences import choose_sentences
    from lowvram.api.texts import TextOptions
    from lowvram.api.tokenizer_chart import check_chart
    from lowvram.api.tokenizer_comparing import compare_tokenizers_task
    from lowvram.cli.console import literal, notice
    from lowvram.cli.tasks import run_task

    texts = group_by_language(arguments.text, "--text")
    options = {
        language: TextOptions(tuple(paths), arguments.field, arguments.on_bad_row) for language, paths in texts.items()
    }
    gold = _read_gold_paths(arguments.gold, next(iter(texts), ONLY))
    parallel = choose_sentences(arguments.parallel, arguments.languages, texts, arguments.on_bad_row)
    if arguments.chart:
        check_chart(arguments.chart)
    found = run_task(compare_tokenizers_task(arguments.tokenizers, options, gold, arguments.size, parallel))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
    else:
        _show(found)
    if arguments.chart:
        found.save_chart(arguments.chart)
        notice(f"{arguments.chart}: the chart")
    if not arguments.json:
        first = arguments.tokenizers[0]
        literal(next_step("tokenizer", "show", _EXAMPLE, "--tokenizer", first, why="see where it cuts"))


def group_by_language(words: Sequence[str], option: str) -> dict[str, list[Path]]:
    """Return the paths of each language; a path without a language belongs to the one before it.

    Raises ConfigError for a language that is named twice, or has no path.
    """
    from lowvram.errors import ConfigError

    groups: dict[str, list[Path]] = {}
    language = ONLY
    for word in words:
        named = _NAMED.fullmatch(word)
        # A file whose name looks like LANGUAGE=FILE is meant where there is one.
        if named and not Path(word).exists():
            language, word = named[1], named[2]
            if language in groups:
                fix = f"Write {option} {language}={groups[language][0]} {word}."
                raise ConfigError(
                    f"{option} names {language} twice.", "A language is named once, before its files.", fix
                )
        if not word:
            raise ConfigError(f"{option} {language}= names no file.", "", f"Write {option} {language}=FILE.")
        groups.setdefault(language, []).append(Path(word))
    return groups


def _read_gold_paths(words: Sequence[str], first: str) -> dict[str, Path]:
    from lowvram.errors import ConfigError

    groups = group_by_language(words, "--gold")
    for language, paths in groups.items():
        if len(paths) > 1:
            raise ConfigError(f"--gold names {len(paths)} files of one language.", "One is compared with.", "Name one.")
        if language == ONLY and first in groups and first != ONLY:
            raise ConfigError(f"--gold names {first} twice.", "", "Name the other one's language, as kk=FILE.")
    return {first if language == ONLY else language: paths[0] for language, paths in groups.items()}


def _show(found: TokenizerComparison) -> None:
    from lowvram.cli.console import result

    for number, text in enumerate(found.texts):
        if number:
            result()
        _show_language(found, text)
    if found.texts:
        _explain_figures(found)
    if found.texts and found.parallel:
        result()
    if found.parallel:
        _show_parity(found, found.parallel)


def _explain_figures(found: TokenizerComparison) -> None:
    from lowvram.cli.console import result
    from lowvram.evaluate.tokenizer_figures import REPEATS, SPEED_BYTES
    from lowvram.units import show_bytes

    result()
    result(
        ">1 token: share of words of several tokens.  exact: share of lines that come back as they were.  same ids: "
        "distinct words whose ids another word has too."
    )
    has_ratio = any(each.speed.ratio for one in found.tokenizers for each in one.figures.values())
    ratio = ", and in brackets over that of the package tokenizers with the same file" if has_ratio else ""
    sample = f"the first {show_bytes(SPEED_BYTES)}, median of {REPEATS} alternating runs"
    result(f"MB/s: of one thread's CPU time ({sample}){ratio}.")
    if any(each.boundaries for one in found.tokenizers for each in one.figures.values()):
        result("F1: where tokens end against where morphemes end, each gold word once.")


def _show_language(found: TokenizerComparison, text: ComparedTexts) -> None:
    from lowvram.cli.console import lay_out, result, tabulate
    from lowvram.units import show_bytes

    cut = "" if text.is_whole else ", cut there"
    result(f"{text.language}: {show_bytes(text.text_bytes)}{cut}, {text.lines:,} lines, {text.words:,} words", "bold")
    has_gold = any(each.figures[text.language].boundaries for each in found.tokenizers)
    names = (*_HEADS, *(["F1"] if has_gold else []))
    rows = ((_name_with_size(each), *_cells(each.figures[text.language], has_gold)) for each in found.tokenizers)
    lay_out(tabulate(names, rows, gap=1), is_folded=True)


def _show_parity(found: TokenizerComparison, same: ComparedSentences) -> None:
    from rich.text import Text as Cell

    from lowvram.cli.console import lay_out, result, tabulate
    from lowvram.units import count_of

    cut = "" if same.is_whole else ", cut there"
    result(f"{Path(same.path).name}: {count_of(same.sentences, 'sentence')} in each language{cut}", "bold")
    for start in range(0, len(same.languages), _MOST_ABREAST):
        languages = same.languages[start : start + _MOST_ABREAST]
        rows: list[list[str | Cell]] = []
        for title, show in _PARITY_ROWS:
            rows.append([Cell(title, "bold"), *[""] * len(languages)])
            for each in found.tokenizers:
                figures = each.parity or {}
                rows.append([f"  {_name_with_size(each)}", *(show(figures[language]) for language in languages)])
        lay_out(tabulate(("", *languages), rows), is_folded=True)
    result()
    result(f"parity: tokens over those of the same sentences in {same.languages[0]}.")


def _name_with_size(tokenizer: ComparedTokenizer) -> str:
    """Return a tokenizer's name and its size."""
    return f"{tokenizer.name} ({tokenizer.size:,})"


def _cells(figures: Figures, has_gold: bool) -> list[str]:
    """Return what stands in a row behind the tokenizer's name."""
    ratio = f" ({figures.speed.ratio:.1f}×)" if figures.speed.ratio else ""
    found = figures.boundaries
    f1 = "–" if found is None or found.by_type.f1 is None else f"{found.by_type.f1:.3f}"
    return [
        f"{figures.characters_per_token:.2f}",
        f"{figures.bytes_per_token:.2f}",
        f"{figures.tokens_per_word:.3f}",
        f"{100 * figures.continued:.1f}%",
        show_share(figures.exact_lines),
        f"{figures.equal_words:,}",
        f"{figures.speed.mb_per_s:.1f}{ratio}",
        *([f1] if has_gold else []),
    ]


def show_share(share: float) -> str:
    """Return a percentage that is 100% only where nothing is missing."""
    return "100%" if share == 1.0 else f"{min(99.9, 100 * share):.1f}%"
