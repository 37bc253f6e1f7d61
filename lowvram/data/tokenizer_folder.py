"""Keeps a folder's tokenizer from being overwritten by another one; knows nothing of how one is trained.

Shards and runs fit only the tokenizer that they were made with, so replacing it makes weeks of work unreadable.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path

from lowvram.data.shard_set import INDEX, read_json
from lowvram.errors import TokenizerError
from lowvram.storage.json_files import JsonError, read_object

# At most this many folders are named in the error; more would fill the screen.
_MOST_NAMED = 5


def refuse_fewer_ids(out: Path, vocabulary: int) -> None:
    """Raise TokenizerError where `out` has a tokenizer of more ids than `vocabulary`: training cannot give the same."""
    try:
        existing = len(read_object(out / "tokenizer.json")["model"]["vocab"])
    except (OSError, JsonError, KeyError, TypeError):
        return  # a file that cannot be read is compared byte by byte later
    if existing > vocabulary:
        raise _another(out, f"It has {existing} ids, and {vocabulary} were asked for.")


def refuse_another(out: Path, files: Mapping[str, bytes]) -> None:
    """Raise TokenizerError where `out` has files with the names of `files` but other contents."""
    differing = [name for name, data in files.items() if (out / name).is_file() and (out / name).read_bytes() != data]
    if differing:
        raise _another(out, f"Its {' and '.join(differing)} would be overwritten with other contents.")


def _another(out: Path, why: str) -> TokenizerError:
    packed = find_shards_of(out)
    if packed:
        folders = ", ".join(map(str, packed[:_MOST_NAMED])) + (" and others" if len(packed) > _MOST_NAMED else "")
        why += f" {folders} can be read with it alone, and so can runs that were started with it."
    return TokenizerError(
        f"{out} holds another tokenizer.",
        why,
        "Name another `out`, or add `replace=True` to overwrite it all the same.",
    )


def find_shards_of(tokenizer: Path) -> list[Path]:
    """Return the folders of shards that were packed with a tokenizer, beside it or one level deeper, sorted."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        return []
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    parent = tokenizer.parent
    indexes = itertools.chain(parent.glob(f"*/{INDEX}"), parent.glob(f"*/*/{INDEX}"))
    return sorted(index.parent for index in indexes if read_json(index).get("tokenizer") == digest)
