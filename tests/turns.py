"""Which part of a sweep too long for one test run is checked now: the sources decide, and neither day nor machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def turn_of(turns: int, *folders: str, root: Path = ROOT) -> int:
    """Return a number below `turns` that follows from every Python and TOML file below these folders of the tree.

    A commit is thus judged alike on every day and machine, and a change of the sources moves on to another part.
    """
    digest = hashlib.sha256()
    files = {path for folder in folders for form in ("*.py", "*.toml") for path in (root / folder).rglob(form)}
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        # Git may check text out with the system's own line ends.
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return int.from_bytes(digest.digest()[:8]) % turns
