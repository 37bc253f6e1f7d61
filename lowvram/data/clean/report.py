"""What a cleaning did, rule by rule, as JSON and as a page to read; knows no text but the examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram.config.cleaning import CleaningRules
from lowvram.data.clean.private import KINDS
from lowvram.units import count_of, show_bytes

_EXAMPLES = 5
_LINE_CHARACTERS = 160
# Signs that mean something in Markdown or HTML; a low line inside a word means nothing.
_SIGNS = re.compile(r"[\\`*\[\]<>|&#]|(?<!\w)_|_(?!\w)")
# What each rule does, for the page.
DESCRIPTIONS = {
    "mojibake": "letters repaired that were read in another encoding",
    "composed": "Unicode's composed form (NFC)",
    "invisible": "control and zero-width characters removed",
    "spaces": "blanks at line ends, empty lines, special blanks",
    "private": "e-mail addresses, telephone numbers, IBANs and national numbers replaced",
    "boilerplate": "lines of web pages left out",
    "length": "too short, too long, or words that are too long",
    "symbols": "too many symbols or digits",
    "repetition": "repeats itself",
    "language": "another language",
    "toxicity": "too many offensive words",
    "contamination": "holds items of an evaluation set",
    "duplicate_documents": "the same words as an earlier document",
    "near_duplicates": "similar to an earlier document",
    "duplicate_lines": "lines that stand in many documents",
}


@dataclass
class Totals:
    """Counts over all parts."""

    documents: int = 0
    characters: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    characters_removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, sidecar: dict[str, Any]) -> None:
        """Add the counts of a part; parts come in order."""
        self.documents += sidecar["documents"]
        self.characters += sidecar["characters"]
        self.removed.update(sidecar["removed"])
        self.changed.update(sidecar["changed"])
        self.parts.update(sidecar["parts"])
        self.characters_removed.update(sidecar["characters_removed"])
        for example in sidecar["examples"]:
            known = self.examples.setdefault(example["rule"], [])
            if len(known) < _EXAMPLES:
                known.append(example)


def describe_rules(totals: Totals, rules: CleaningRules) -> list[dict[str, Any]]:
    """Return for each rule, in order, whether it is on, its thresholds, what it did, and examples."""
    rows = []
    for name in CleaningRules.model_fields:
        rule = getattr(rules, name)
        settings = rule.model_dump(mode="json")
        is_on = settings.pop("on") and not (name == "language" and not rule.keep)
        is_on = is_on and not (name == "contamination" and not rule.against)
        row: dict[str, Any] = {
            "rule": name,
            "on": is_on,
            "settings": settings,
            "documents_removed": totals.removed[name],
            "documents_changed": totals.changed[name],
            "characters_removed": totals.characters_removed[name],
        }
        if name == "private":
            row["replaced"] = {kind: totals.parts[kind] for kind in KINDS if totals.parts[kind]}
        if name in ("boilerplate", "duplicate_lines"):
            row["lines_removed"] = totals.parts[name]
        row["examples"] = totals.examples.get(name, [])
        rows.append(row)
    return rows


def find_eaters(totals: Totals) -> list[tuple[str, int]]:
    """Return the rules that removed documents and how many, the greediest first."""
    return (+totals.removed).most_common()


def write_page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    removed = report["documents_read"] - report["documents"]
    share = removed / max(1, report["documents_read"])
    files = sum(not row["left_out"] for row in report["files"])
    lines = [
        "# Cleaned text",
        "",
        f"{count_of(report['documents_read'], 'document')} of {count_of(files, 'file')} were read, "
        f"{report['documents']:,} are left ({share:.2%} removed): {show_bytes(report['bytes'])}.",
        "",
    ]
    lines += [*report["notes"], ""] if report["notes"] else []
    lines += ["| rule | removed | changed | what |", "| --- | ---: | ---: | --- |"]
    for row in report["rules"]:
        counts = f"{row['documents_removed']:,} | {row['documents_changed']:,}" if row["on"] else "off | off"
        what = DESCRIPTIONS[row["rule"]]
        if row.get("lines_removed"):
            what += f" ({count_of(row['lines_removed'], 'line')})"
        if row.get("replaced"):
            what += f" ({', '.join(f'{count:,} {kind}' for kind, count in row['replaced'].items())})"
        lines.append(f"| `{row['rule']}` | {counts} | {what} |")
    lines += ["", "Each document is removed by the first rule that it breaks.", ""]
    for row in report["rules"]:
        if row["examples"]:
            lines += [f"## {row['rule']}", ""]
            stated = {key: value for key, value in row["settings"].items() if value not in ([], None)}
            # As they are written in a file of rules.
            settings = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in stated.items())
            lines += [f"`{settings}`", ""] if settings else []
            for example in row["examples"]:
                lines += _show_example(example)
            lines.append("")
    lines += ["## Files", "", "| read | documents | left | written |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| {_name(row['file'])} | {row['documents_read']:,} | {row['documents']:,} | {_name(row['output'] or '–')} |"
        for row in report["files"]
    ]
    return "\n".join(lines) + "\n"


def _show_example(example: dict[str, Any]) -> list[str]:
    where = f"{_name(example['file'])}, document {example['document']}"
    why = f" ({_plain(example['why'])})" if example.get("why") else ""
    shown = [f"- {where}{why}", f"  - {_quote(example['before'])}"]
    if "after" in example:
        shown.append(f"  - became {_quote(example['after'])}")
    if "like" in example:
        like = example["like"]
        shown.append(f"  - as {_name(like['file'])}, document {like['document']}: {_quote(like['before'])}")
    return shown


def _quote(text: str) -> str:
    shown = " ".join(text.split())
    return f"“{_plain(shown[:_LINE_CHARACTERS])}{'…' if len(shown) > _LINE_CHARACTERS else ''}”"


def _name(file: str) -> str:
    """Return the name of a file as code, in which no sign but a backquote and, in a table, a bar means anything."""
    is_plain = file.isprintable() and not set("`|") & set(file) and file != "–"
    return f"`{file}`" if is_plain else _plain(file)


def _plain(text: str | Path) -> str:
    """Return text whose signs mean nothing in Markdown or HTML."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
    return _SIGNS.sub(r"\\\g<0>", shown)
