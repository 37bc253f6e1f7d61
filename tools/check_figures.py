"""Says which figures in docs/measured.md are older than the code that they measure.

python tools/check_figures.py                 list every figure; exit code 1 where one is older than its sources
python tools/check_figures.py --stamp NAME    after measuring again: note today's date and the sources as they are now

A stamp stands above the figures that it is about:
<!-- figures NAME: measured DATE, sources DIGEST of PATH PATH … -->
The digest is over what the sources compute: comments, docstrings, imports and names of files do not count, so a file
that only moved makes nothing older.  "unknown" stands where the sources of that day were not noted.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/measured.md"
_STAMP = re.compile(
    r"<!-- figures (?P<name>[\w-]+): measured (?P<date>\d{4}-\d\d-\d\d), sources (?P<digest>[0-9a-f]{12}|unknown) "
    r"of (?P<sources>[^>]+?) -->"
)


class Stamp(NamedTuple):
    """What stands above some figures.  digest: of the sources on that day, "unknown" where nobody noted it."""

    name: str
    date: str
    digest: str
    sources: tuple[str, ...]


def read_stamps(text: str) -> list[Stamp]:
    """Return the stamps of a page, in order."""
    return [
        Stamp(found["name"], found["date"], found["digest"], tuple(found["sources"].split()))
        for found in _STAMP.finditer(text)
    ]


def digest_of(sources: tuple[str, ...], root: Path = ROOT) -> str:
    """Return twelve digits that change when a source computes something else.

    sources: files and folders below `root`.  Raises FileNotFoundError where one is missing.
    """
    files: set[Path] = set()
    for source in sources:
        path = root / source
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist; mend the stamp in {PAGE.name}")
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    parts = sorted(hashlib.sha256(content_of(path)).hexdigest() for path in files)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def content_of(path: Path) -> bytes:
    """Return what a file computes: a Python file without comments, docstrings and imports, any other as it is."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, block, None), list):
                setattr(node, block, [line for line in statements if not _is_silent(line)])
    return ast.unparse(tree).encode()


def _is_silent(line: ast.stmt) -> bool:
    """Say whether a statement computes nothing: an import, or a text that stands alone."""
    is_text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    return is_text or isinstance(line, ast.Import | ast.ImportFrom)


def describe(stamps: list[Stamp], root: Path = ROOT) -> Iterator[tuple[bool, str]]:
    """Yield for each stamp whether its figures are current, and a line about them."""
    for stamp in stamps:
        is_current = stamp.digest == digest_of(stamp.sources, root)
        since = "its sources are unchanged" if is_current else "its sources have changed since, or may have"
        yield is_current, f"{'current' if is_current else 'OLDER  '}  {stamp.date}  {stamp.name}: {since}"


def stamp_again(text: str, name: str, root: Path = ROOT) -> str:
    """Return a page with today's date and digest in one stamp; raises KeyError where there is none of that name."""
    stamp = next((stamp for stamp in read_stamps(text) if stamp.name == name), None)
    if stamp is None:
        raise KeyError(name)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = f"measured {today}, sources {digest_of(stamp.sources, root)} of"
    return text.replace(f"figures {name}: measured {stamp.date}, sources {stamp.digest} of", f"figures {name}: {new}")


def main() -> None:
    """List, or stamp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamp", metavar="NAME", help="these figures were measured again just now")
    name = parser.parse_args().stamp
    text = PAGE.read_text(encoding="utf-8")
    if name is not None:
        try:
            PAGE.write_text(stamp_again(text, name), encoding="utf-8")
        except KeyError:
            sys.exit(f"{PAGE.name} has no stamp {name}; it has {', '.join(stamp.name for stamp in read_stamps(text))}")
        return
    found = list(describe(read_stamps(text)))
    print("\n".join(line for _, line in found))
    sys.exit(0 if all(is_current for is_current, _ in found) else 1)


if __name__ == "__main__":
    main()
