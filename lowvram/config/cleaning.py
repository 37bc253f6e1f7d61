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

    on: bool = True


class LengthRule(Rule):
    """How long a document must be, and may be."""

    least_characters: NonNegativeInt = 20
    least_words: NonNegativeInt = 3
    most_characters: Annotated[PositiveInt, Field(le=MOST_CHARACTERS)] = 5_000_000
    most_word_characters: Annotated[float, Field(gt=0)] = 14.0


class LanguageRule(Rule):
    """Languages to keep, as ISO 639-1 codes; none: no document is removed.  Shorter documents are not judged."""

    keep: Words = ()
    least_characters: PositiveInt = 60


class SymbolsRule(Rule):
    """The greatest share of characters, without white space, that are neither letters nor digits, or are digits."""

    most_symbols: Fraction = 0.3
    most_digits: Fraction = 0.4


class RepetitionRule(Rule):
    """How much of a document may repeat itself.

    most_runs: characters that are the third or later of a run of one character.  most_lines: of the words, those in
    lines that the document has before.  most_fragments: of the sequences of five words, those that it has before.
    least_words: shorter documents are not judged by lines and fragments.
    """

    most_runs: Fraction = 0.2
    most_lines: Fraction = 0.3
    most_fragments: Fraction = 0.5
    least_words: PositiveInt = 50


class BoilerplateRule(Rule):
    """Lines of web pages that are left out; `lines` adds some to those that lowvram knows."""

    lines: Words = ()


class ToxicityRule(Rule):
    """The greatest share of words that may be listed.  words: a file of further words, one a line."""

    most_share: Fraction = 0.02
    least_words: PositiveInt = 2
    words: Path | None = None


class PrivateRule(Rule):
    """Which private data are replaced."""

    email: bool = True
    phone: bool = True
    iban: bool = True
    national_number: bool = True


class ContaminationRule(Rule):
    """A document that shares so many words in a row with an evaluation set is removed.

    against: files or folders of evaluation sets.  words: the length of a shared sequence.  least_words: an item that is
    shorter than `words` and has as many words counts whole.  passages: fields that are not compared, since extractive
    questions quote an encyclopedia there.
    """

    against: Words = ()
    words: Annotated[PositiveInt, Field(le=50)] = 13
    least_words: Annotated[PositiveInt, Field(le=50)] = 8
    passages: Words = ("context", "passage", "paragraph")


class DuplicateLinesRule(Rule):
    """A line of so many words that stands more often than `most` in all texts is kept the first time only."""

    least_words: PositiveInt = 6
    most: PositiveInt = 5


class NearDuplicatesRule(Rule):
    """A document is removed if an earlier one shares this fraction of their different sequences of three words.

    The fraction is the Jaccard similarity, estimated by MinHash.  least_words: shorter documents are not compared.
    """

    similarity: Fraction = 0.28
    least_words: PositiveInt = 20


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
