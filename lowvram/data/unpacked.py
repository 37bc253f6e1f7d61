"""Says that text was named where shards are read, with the commands that pack it; reads no file."""

from __future__ import annotations

import os
from pathlib import Path

from lowvram.data.text_files import ENDINGS
from lowvram.errors import DataError
from lowvram.shell import quote_command

_SHOWN = 3


def explain_unpacked(path: Path, index: str) -> DataError | None:
    """Return the error for a text file or a folder of text files that was named as shards; None for anything else.

    index: the file that a folder of shards has.
    """
    names = _list_text(path, index)
    if not names:
        return None
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    what = f"{path} is text, not shards." if path.is_file() else f"{path} holds text ({shown}), not shards."
    return DataError(what, "Training reads shards of tokens, which are packed from text.", _name_commands(path))


def _list_text(path: Path, index: str) -> list[str]:
    """Return the names of text files: the file itself, or those in a folder and its folders; none beside shards."""
    if path.is_file():
        return [path.name] if path.name.lower().endswith(ENDINGS) else []
    found = []
    for parent, folders, names in os.walk(path):
        if index in names:
            return []
        if Path(parent) != path:
            folders.clear()
        texts = [name for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
        found += [str(Path(parent, name).relative_to(path)) for name in sorted(texts)]
    return found


def _name_commands(path: Path) -> str:
    """Return the sentence with what to type: to train a tokenizer, where none is near, and to pack."""
    # Text is never packed over shards of another one.
    out = Path("shards") if not Path("shards").exists() else Path(f"{path.stem}-shards")
    # A part that is named as held out, or beside one, is packed as a whole.
    split = () if path.name in ("train", "valid") else ("--holdout", "0.5%")
    near = (path / "tok", path.parent / "tok", Path("tok"))
    tok = next((folder for folder in near if (folder / "tokenizer.json").is_file()), None)
    train = quote_command("lowvram", "tokenizer", "train", path, "--out", Path("tok"), *split)
    pack = quote_command("lowvram", "data", "pack", path, "--tokenizer", tok or Path("tok"), "--out", out, *split)
    return f"Pack it: {pack}" if tok else f"Type: {train}, then: {pack}"
