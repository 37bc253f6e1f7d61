"""Turns conversations into token ids with a tokenizer's chat template; knows no model and no terminal.

While the template is rendered, placeholders stand for what people and models wrote, which is encoded as plain text
afterwards: whatever they write, it never becomes a special token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import PromptError, TokenizerError
from lowvram.generate.template_budget import MOST_SOURCE_CHARACTERS, Budget, BudgetError
from lowvram.storage.json_files import name_kind

ROLES = ("system", "user", "assistant")
# Stands before and after each placeholder: white space that nobody types; where it is missing, the template trimmed.
_PAD = "\u2003"
# Stands at both ends of a placeholder: an editorial coronis, which no template's own text has.
_MARK = "\u2e0e"
# Errors besides jinja2's that a template's expressions can raise.
_RAISED_BY_EXPRESSIONS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


_FIX = "Correct chat_template in tokenizer_config.json, or let the model continue texts (`generate`), which needs none."
_LONGEST_REASON = 300


class Message(NamedTuple):
    """One message.  ids: the tokens in which a model wrote it, which are then used instead of encoding the content."""

    role: str
    content: str
    ids: tuple[int, ...] | None = None


class _TemplateText(str):
    """Text of the template itself, not of a message."""

    __slots__ = ()


class ChatTemplate:
    """A chat template in Jinja, as transformers renders it, in a sandbox.

    names: special tokens by their names in the template, such as bos_token.
    Raises TokenizerError where the source does not compile.
    """

    def __init__(self, source: str, names: dict[str, str]) -> None:
        import jinja2

        from lowvram.generate.template_sandbox import BudgetedEnvironment

        self._names = names
        if len(source) > MOST_SOURCE_CHARACTERS:
            raise TokenizerError(
                f"The chat template has {len(source):,} characters.",
                f"lowvram runs templates of up to {MOST_SOURCE_CHARACTERS:,}; those of published models are shorter.",
                _FIX,
            )
        self._environment = BudgetedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            why = f"Line {error.lineno} of chat_template: {_shorten(error.message)}"
            raise TokenizerError("The chat template does not compile.", why, _FIX) from error
        except (SyntaxError, *_RAISED_BY_EXPRESSIONS) as error:
            why = f"It is nested too deeply, or a number in it is too long ({type(error).__name__}: {_shorten(error)})"
            raise TokenizerError("The chat template does not compile.", why, _FIX) from error

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation; with add_generation_prompt followed by the ids that open the answer.

        Special tokens come from the template alone.  Raises PromptError where the template refuses the conversation or
        changes its words in a way that cannot be followed.
        """
        ids: list[int] = []
        text = ""
        specials = tokenizer.specials
        special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "$^")
        for part in self._parts(messages, add_generation_prompt):
            if isinstance(part, _TemplateText):
                end = 0
                for match in special.finditer(part):
                    ids += [*tokenizer.encode(text + part[end : match.start()]), specials[match[0]]]
                    text, end = "", match.end()
                text += part[end:]
            elif isinstance(part, str):
                text += part
            else:
                ids += [*tokenizer.encode(text), *part]
                text = ""
        return [*ids, *tokenizer.encode(text)]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the text that `encode` encodes; special tokens in it may be the template's or part of a message."""
        plain = [message._replace(ids=None) for message in messages]
        return "".join(map(str, self._parts(plain, add_generation_prompt)))

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[str | tuple[int, ...]]:
        """Yield the parts in order: the template's own text, messages' texts, and the ids that models wrote."""
        key = secrets.token_hex(8)
        # A template may test whether there is content at all, so empty messages get no placeholder.
        hidden = {number for number, message in enumerate(messages) if message.content or message.ids}
        contents = [
            f"{_PAD}{_MARK}{key}-{number}{_MARK}{_PAD}" if number in hidden else message.content
            for number, message in enumerate(messages)
        ]
        rendered = self._render(messages, contents, add_generation_prompt)
        # Every fourth piece is the template's text; between are a placeholder's left space, number and right space.
        pieces = re.split(f"({_PAD}?){_MARK}{key}-([0-9]+){_MARK}({_PAD}?)", rendered)
        if any(_MARK in piece for piece in pieces[::4]):
            raise PromptError(
                "The chat template changes the words of a message.",
                "It may trim them and put them where it likes; more than that cannot be followed safely.",
                "Use a template that leaves message.content as it is.",
            )
        lost = hidden - {int(number) for number in pieces[2::4]}
        if lost:
            raise PromptError(
                f"The chat template leaves out what the {messages[min(lost)].role} said.",
                f"It has no place for message {min(lost) + 1} of {len(messages)}, and the model would never see it.",
                "Leave that message out, or use a template that has a place for its role.",
            )
        yield _TemplateText(pieces[0])
        for left, number, right, between in zip(*(pieces[start::4] for start in (1, 2, 3, 4)), strict=True):
            _, content, ids = messages[int(number)]
            content = content if left else content.lstrip()
            yield (content if right else content.rstrip()) if ids is None else ids
            yield _TemplateText(between)

    def _render(self, messages: Sequence[Message], contents: list[str], add_generation_prompt: bool) -> str:
        import jinja2

        entries = [
            {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        for message in messages:
            if not isinstance(message.content, str):
                kind = name_kind(message.content)
                raise PromptError(f"A message's content is {kind}.", "It must be text.", "Give it as a string.")
            if message.role not in ROLES:  # a role becomes a part of the template's own text
                raise PromptError(f"Unknown role: {message.role}.", "", f"The roles are {', '.join(ROLES)}.")
        values = {"messages": entries, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._environment.render(self._template, values | self._names, Budget(len(entries)))
        except BudgetError as error:
            raise PromptError("The chat template does more than a template may.", str(error), _FIX) from error
        except (jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
            why = f"{type(error).__name__}: {_shorten(error)}"
            raise PromptError("The chat template does more than a template may.", why, _FIX) from error
        except (jinja2.TemplateError, *_RAISED_BY_EXPRESSIONS) as error:
            raise PromptError(
                "The chat template refuses this conversation.",
                f"{type(error).__name__}: {_shorten(error)}",
                "Most templates want user and assistant by turns, behind at most one system.",
            ) from error


def _shorten(reason: object) -> str:
    """Return the message of a template's or Jinja's error, cut to _LONGEST_REASON: it can have any length."""
    text = str(reason)
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template of a tokenizer, None where it has none."""
    settings = tokenizer.settings
    source = settings.get("chat_template")
    if isinstance(source, list):  # several templates with names, in older files
        source = _choose_default(tokenizer, source)
    if source is None:
        return None
    if not isinstance(source, str):
        raise TokenizerError(
            f"chat_template in {tokenizer.directory} is {name_kind(source)}.",
            "It must be text, a template in Jinja.",
            _FIX,
        )
    return ChatTemplate(source, name_specials(settings))


def _choose_default(tokenizer: Tokenizer, templates: list[Any]) -> Any:
    """Return the template named default; None where there are none at all."""
    if not templates:
        return None
    named = {str(entry.get("name")): entry.get("template") for entry in templates if isinstance(entry, dict)}
    if "default" not in named:
        names = ", ".join(named) or "none"
        raise TokenizerError(
            f'chat_template in {tokenizer.directory} is a list without a template named "default".',
            f"It names {_shorten(names)}",
            _FIX,
        )
    return named["default"]


def name_specials(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens of tokenizer_config.json by their names, such as bos_token.

    settings: the file's object, in which a token is a text or an object with content.
    """
    named = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in named.items() if isinstance(token, str)}


def choose_template(tokenizer: Tokenizer, form: str | None = None) -> ChatTemplate | None:
    """Return the template of a dialogue model, None for a base model, which continues texts.

    form: "dialogue" or "base", as the user wants it; None: as the model was trained.
    Raises TokenizerError where a model is to be used in dialogue and has no template.
    """
    if not (is_dialogue(tokenizer) if form is None else form == "dialogue"):
        return None
    template = load_chat_template(tokenizer)
    if template is None:
        raise TokenizerError(
            "The model cannot answer in turns, because its tokenizer has no chat template.",
            f"tokenizer_config.json in {tokenizer.directory} has no chat_template.",
            "Add one, or let the model continue texts (`generate`), which needs none.",
        )
    return template


def is_dialogue(tokenizer: Tokenizer) -> bool:
    """Say whether the tokenizer's model was trained on dialogues, and not only to continue texts."""
    return tokenizer.settings.get("lowvram_dialogue") is True
