"""The rules of `data clean`: which are on and their thresholds, from TOML and `--set`; opens no text."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from lowvram.config.allowed import describe_allowed
from lowvram.config.base import FrozenConfig, as_list
from lowvram.errors import ConfigError, argument, name_nearest

# The most characters of a document that is cleaned: about three times Tolstoy's War and Peace.  A longer one is no
# document, and its arrays would take gigabytes.
MOST_CHARACTERS = 10_000_000
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Words = Annotated[tuple[str, ...], BeforeValidator(as_list)]


class Rule(FrozenConfig):
    """A rule that can be switched off and has no threshold."""

    on: bool = Field(True, description="whether the rule is applied")


class LengthRule(Rule):
    """How long a document must be, and may be."""

    least_characters: NonNegativeInt = Field(20, description="shorter documents are removed")
    least_words: NonNegativeInt = Field(3, description="documents of fewer words are removed")
    most_characters: PositiveInt = Field(
        5_000_000, le=MOST_CHARACTERS, description="longer documents are removed, also where the rule is off"
    )
    most_word_characters: float = Field(
        14.0, gt=0, description="documents whose words have more letters and digits on average are removed"
    )


class LanguageRule(Rule):
    """Languages to keep, as ISO 639-1 codes; none: no document is removed.  Shorter documents are not judged."""

    keep: Words = Field((), description="languages to keep, as ISO 639-1 codes (`tr`); none: the rule removes nothing")
    least_characters: PositiveInt = Field(60, description="shorter documents are not judged")


class SymbolsRule(Rule):
    """The greatest share of characters, without white space, that are neither letters nor digits, or are digits."""

    most_symbols: Fraction = Field(
        0.3, description="the greatest share of characters, blanks apart, that are neither letters nor digits"
    )
    most_digits: Fraction = Field(0.4, description="the greatest share of characters, blanks apart, that are digits")


class RepetitionRule(Rule):
    """How much of a document may repeat itself."""

    most_runs: Fraction = Field(
        0.2, description="the greatest share of characters that are the third or a later one of a run: `!!!!`, `aaaa`"
    )
    most_lines: Fraction = Field(
        0.3, description="the greatest share of words in lines that stood in the document before"
    )
    most_fragments: Fraction = Field(
        0.5, description="the greatest share of its sequences of five words that stood in the document before"
    )
    least_words: PositiveInt = Field(50, description="documents of fewer words are judged by `most_runs` alone")


class BoilerplateRule(Rule):
    """Lines of web pages that are left out."""

    lines: Words = Field(
        (), description="lines to leave out beside those that lowvram knows, such as `Ana sayfa`; case does not matter"
    )


class ToxicityRule(Rule):
    """The greatest share of words that may be listed."""

    most_share: Fraction = Field(0.02, description="the greatest share of words that may be listed ones")
    least_words: PositiveInt = Field(2, description="documents with fewer listed words stay, whatever their share")
    words: Path | None = Field(None, description="a file of further words, one a line; `#` begins a comment")


class PrivateRule(Rule):
    """Which private data are replaced."""

    email: bool = Field(True, description="whether e-mail addresses are replaced")
    phone: bool = Field(
        True, description="whether telephone numbers are: an area code behind 0 or +90, or a country's behind +"
    )
    iban: bool = Field(True, description="whether IBANs are whose check digits are right")
    national_number: bool = Field(True, description="whether Turkish national numbers are whose check digits are right")


class ContaminationRule(Rule):
    """A document that shares so many words in a row with an evaluation set is removed."""

    against: Words = Field((), description="files or folders of evaluation sets, beside those that the command names")
    words: PositiveInt = Field(13, le=50, description="a document that shares so many words in a row is removed")
    least_words: PositiveInt = Field(
        8, le=50, description="items of fewer words than `words`, but at least as many, are compared whole"
    )
    passages: Words = Field(
        ("context", "passage", "paragraph"), description="fields of evaluation sets that are not compared"
    )


class DuplicateLinesRule(Rule):
    """A line of so many words that stands more often than `most` in all texts is kept the first time only."""

    least_words: PositiveInt = Field(6, description="lines of fewer words stay")
    most: PositiveInt = Field(
        5, description="a line that stands more often in all texts stays where it stands the first time"
    )


class NearDuplicatesRule(Rule):
    """A document is removed if an earlier one resembles it: by the Jaccard similarity, estimated by MinHash."""

    similarity: Fraction = Field(
        0.28,
        description="a document is removed if an earlier one shares as great a part of the different sequences of "
        "three words that the two have; where one word in ten differs it is about 0.6, in five 0.35",
    )
    least_words: PositiveInt = Field(20, description="documents of fewer words are not compared")


class CleaningRules(FrozenConfig):
    """All rules, in the order in which they are applied."""

    mojibake: Rule = Rule()
    composed: Rule = Rule()
    invisible: Rule = Rule()
    spaces: Rule = Rule()
    private: PrivateRule = PrivateRule()
    boilerplate: BoilerplateRule = BoilerplateRule()
    length: LengthRule = LengthRule()
    symbols: SymbolsRule = SymbolsRule()
    repetition: RepetitionRule = RepetitionRule()
    language: LanguageRule = LanguageRule()
    toxicity: ToxicityRule = ToxicityRule()
    contamination: ContaminationRule = ContaminationRule()
    duplicate_documents: Rule = Rule()
    near_duplicates: NearDuplicatesRule = NearDuplicatesRule()
    duplicate_lines: DuplicateLinesRule = DuplicateLinesRule()


def load_rules(file: Path | None = None, sets: Sequence[str] = ()) -> CleaningRules:
    """Return the default rules with what a TOML file and assignments such as `length.least_words=5` change.

    Paths in the file are relative to it.  Raises ConfigError that names the file or the assignment, the key and value.
    """
    tables = _read(file) if file is not None else {}
    rules = _validate(tables, str(file)) if tables else CleaningRules()
    for assignment in sets:
        name, equals, text = assignment.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or len(keys) != 2 or not all(keys):
            fix = "Write length.least_words=5."
            raise ConfigError(f"{argument('overrides', [assignment])} is not an assignment.", fix=fix)
        tables.setdefault(keys[0], {})[keys[1]] = _read_value(text.strip())
        rules = _validate(tables, argument("overrides", [assignment]))
    return rules


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(file: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file of rules {file}.", fix="Check the name.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{file} is a directory.", "Rules stand in a TOML file.", "Name that file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML:", f"{error}.", "Correct that line.") from error
    home = file.resolve().parent
    for rule, key in (("toxicity", "words"), ("contamination", "against")):
        table = tables.get(rule)
        if isinstance(table, dict) and isinstance(table.get(key), str | list):
            value = table[key]
            table[key] = str(home / value) if isinstance(value, str) else [str(home / str(each)) for each in value]
    return tables


def _validate(tables: dict[str, Any], where: str) -> CleaningRules:
    try:
        return CleaningRules.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{where}: {' '.join(_explain(problem) for problem in error.errors())}") from error


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        if len(path) == 1:
            return f"there is no rule {path[0]}. {name_nearest(path[0], CleaningRules.model_fields)}"
        rule: Any = CleaningRules.model_fields[path[0]].annotation
        return f"{path[0]} has no key {path[1]}. {name_nearest(path[1], rule.model_fields)}"
    if problem["type"] == "model_type":
        return f"{path[0]} is {problem['input']!r}, not a table; to switch the rule off, write {path[0]}.on = false."
    return f"{'.'.join(path)} is {problem['input']!r}; {describe_allowed(problem)}."
