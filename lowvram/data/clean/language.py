"""Says in which language a document is written, by the package lingua; knows no rule."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from lowvram.errors import ConfigError, MachineError, argument

# So many characters are judged: enough for languages as near to each other as Turkish and Azerbaijani.
JUDGED_CHARACTERS = 400
# Against these a text is judged.  All 75 of lingua's would take three times the time and the memory.
LANGUAGES = (
    "ar az bg bs cs da de el en es fa fi fr hi hr hu hy id it ja ka kk ko mn nl pl pt ro ru sq sr sv sw tr uk ur vi zh"
)


def find_language(text: str, keep: tuple[str, ...]) -> str:
    """Return the ISO 639-1 code of the likeliest language of a document's beginning, "" where lingua finds none.

    keep: languages that are judged beside `LANGUAGES`.  Raises MachineError where lingua is not installed, ConfigError
    for a code that it does not know.
    """
    found = _load(keep).detect_language_of(text[:JUDGED_CHARACTERS])
    return found.iso_code_639_1.name.lower() if found is not None else ""


@functools.lru_cache(1)
def _load(keep: tuple[str, ...]) -> Any:
    try:
        lingua = importlib.import_module("lingua")
    except ImportError as error:
        why = "It is not installed."
        fix = "Type: pip install lingua-language-detector"
        raise MachineError("To tell languages apart needs the package lingua.", why, fix) from error
    by_code = {each.iso_code_639_1.name.lower(): each for each in lingua.Language.all()}
    unknown = [code for code in keep if code not in by_code]
    if unknown:
        what = f"{argument('overrides', ['language.keep=' + unknown[0]])} names no language."
        raise ConfigError(what, "Languages are named by codes of two letters.", f"Known: {', '.join(sorted(by_code))}.")
    judged = sorted({*LANGUAGES.split(), *keep} & by_code.keys())
    builder = lingua.LanguageDetectorBuilder.from_languages(*(by_code[code] for code in judged))
    return builder.with_low_accuracy_mode().build()


def check_languages(keep: tuple[str, ...]) -> None:
    """Raise what `find_language` would raise, before any text is read."""
    _load(keep)
