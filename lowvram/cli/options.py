"""Options that several commands share, and the kinds of value that argparse does not know."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from lowvram.units import parse_bytes, parse_count, parse_memory, parse_share, show_bytes

# Ten times the context that home-made models are trained on; for more, it takes minutes to find that it does not fit.
MOST_CONTEXT = 2**20
MOST_PROCESSES = 256
MOST_SLOTS = 1024
TEXTS = (
    ".txt, .jsonl, .ndjson, .parquet, .csv or .tsv, plain, .gz or .zst; folders of them, patterns such as 'data/*.txt' "
    "or - for standard input; named themselves also .json lines, .pdf, .docx and hf:owner/name"
)
SOURCES = "a folder whose files and folders are the sources, or several; a file that is named is a source too"
_MOST_BYTES = 2**42  # more than any computer here has: a bare number of bytes was meant in another unit


def count(text: str) -> int:
    """Read a whole number of at least one, as run files write it: 128, 16k, 500M; an error becomes a usage message."""
    plain = text.strip()
    try:
        number = parse_count(plain.removeprefix("-"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if number < 1 or plain.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def share(text: str) -> float:
    """Read a share as a percentage; an error becomes a usage message."""
    try:
        return parse_share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count_up_to(most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from 1 to `most`, beyond which no machine could do what is asked."""

    def read(text: str) -> int:
        number = count(text)
        if number > most:
            raise argparse.ArgumentTypeError(f"{number} is more than {most}, the most that can be asked for")
        return number

    read.__name__ = count.__name__  # argparse's error shows this name
    return read


context_length = count_up_to(MOST_CONTEXT)
process_count = count_up_to(MOST_PROCESSES)
slot_count = count_up_to(MOST_SLOTS)


def days(text: str) -> float:
    """Read a number of days above zero."""
    number = float(text)
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days above 0")
    return number


def memory(text: str) -> int:
    """Read a size of memory, in the units in which it is sold: 8GB is 8 GiB."""
    try:
        size = parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size > _MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is {show_bytes(size)}; write MiB with their unit: 6144MiB")
    return size


def size_of_file(text: str) -> int:
    """Read a size that is not of memory: a bare number is bytes, KiB and MiB are powers of two, kB and MB of ten."""
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a byte")
    return size


def add_device(parser: argparse.ArgumentParser, default: str = "the best one here") -> None:
    """Add --device.  default: what is chosen where it is left out, in words."""
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help=f"where to compute (default: {default})",
    )


def device_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words with which another command computes where this one did."""
    return [] if arguments.device == "auto" else ["--device", arguments.device]


def add_precision(parser: argparse.ArgumentParser, default: str = "by the card") -> None:
    """Add --precision.  default: the default, in words."""
    parser.add_argument(
        "--precision", choices=("fp8", "int8", "bf16", "fp32"), help=f"format of the weights (default: {default})"
    )


def add_texts(parser: argparse.ArgumentParser, what: str = TEXTS) -> None:
    """Add the texts to read, and --field.  what: what they may be."""
    parser.add_argument("text", nargs="+", type=Path, help=what)
    add_field(parser)


def add_field(parser: argparse.ArgumentParser) -> None:
    """Add --field: where a row has its text."""
    parser.add_argument(
        "--field",
        default="text",
        help="field or column that holds the text, as text, meta.text or messages[].content (default: %(default)s)",
    )


def add_holdout(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --holdout.  what: what is done with that share of the documents."""
    parser.add_argument("--holdout", type=share, metavar="SHARE", help=what)


def named_value(text: str) -> tuple[str, str]:
    """Read NAME=VALUE, where NAME may be that of a source; an error becomes a usage message."""
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip() or not value.strip():
        raise argparse.ArgumentTypeError(f"{text} is not written as NAME=VALUE")
    return name.strip().strip("/"), value.strip()


def add_shares(parser: argparse.ArgumentParser, of: str, temperature: float | None) -> None:
    """Add how much is read of each source: --levels, --temperature and --weight.

    of: what shares are proportional to, in words.  temperature: the default, None where sources are then not told
    apart.
    """
    parser.add_argument(
        "--levels",
        type=int,
        default=1,
        choices=(1, 2),
        help="2: the sources are in the folders of the folder, and are called as tr/law (default: %(default)s)",
    )
    default = "all text is one source" if temperature is None else f"{temperature:g}"
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"shares are proportional to {of} to the power of T: 1 reads every source equally often, 0 gives each "
        f"the same share, 0.3 is usual for languages (default: {default})",
    )
    parser.add_argument(
        "--weight",
        type=named_value,
        action="append",
        default=[],
        metavar="NAME=W",
        help="law=2: read that source twice as often as it would be; law=20%%: a fifth of what is read. NAME may be a "
        "folder of sources (tr stands for tr/law, tr/news, …)",
    )


def share_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words with which another command reads as much of each source as this one did."""
    words = [] if arguments.levels == 1 else ["--levels", str(arguments.levels)]
    words += [] if arguments.temperature is None else ["--temperature", f"{arguments.temperature:g}"]
    return words + [word for name, value in arguments.weight for word in ("--weight", f"{name}={value}")]


def add_packing(parser: argparse.ArgumentParser) -> None:
    """Add what commands that pack text share: --exclude, --replace and --processes."""
    what = "leave out the documents that a list names: an excluded.json, or part of what `lowvram data look` wrote"
    parser.add_argument("--exclude", type=Path, metavar="FILE", help=what)
    parser.add_argument("--replace", action="store_true", help="replace shards of another text that DIR holds")
    parser.add_argument(
        "--processes", type=process_count, metavar="N", help="encoding processes (default: one per core)"
    )
