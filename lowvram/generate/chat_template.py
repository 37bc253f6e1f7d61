"""Conversations as token ids, through the chat template that lies with a tokenizer; knows no model and no terminal.

What people and models wrote stands in the template as placeholders while it is rendered, and is encoded as plain text
afterwards: whatever they write, they never write a special token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import PromptError, TokenizerError
from lowvram.generate.template_budget import MOST_SOURCE_CHARACTERS, Budget, BudgetError

ROLES = ("system", "user", "assistant")
# Around each placeholder: white space that nobody types, and that is gone where the template trims.
_PAD = "\u2003"
# At both ends of a placeholder: no template's own text has an editorial coronis.
_MARK = "\u2e0e"
# What a template's own expressions can raise besides jinja2's errors.
_RAISED = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)


_OTHERWISE = "Mend chat_template in tokenizer_config.json, or go on with --as base, which needs none."
_LONGEST_REASON = 300


class Message(NamedTuple):
    """What one side has said.  ids: the tokens that a model wrote it in, which then stand for the content."""

    role: str
    content: str
    ids: tuple[int, ...] | None = None


class _Own(str):
    """Text that the template has written, and nobody who speaks."""

    __slots__ = ()


class ChatTemplate:
    """A chat template in Jinja, as transformers renders it, in a sandbox.

    names: special tokens by the names that the template knows them by, such as bos_token.
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
                _OTHERWISE,
            )
        self._environment = BudgetedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            why = f"Line {error.lineno} of chat_template: {_shorten(error.message)}"
            raise TokenizerError("The chat template does not compile.", why, _OTHERWISE) from error
        except (SyntaxError, *_RAISED) as error:
            why = f"It is nested too deeply, or a number in it is too long ({type(error).__name__}: {_shorten(error)})"
            raise TokenizerError("The chat template does not compile.", why, _OTHERWISE) from error

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation, and with add_generation_prompt of what opens the answer to it.

        Special tokens come from the template alone.  Raises PromptError where the template refuses the conversation or
        does something to its words that cannot be followed.
        """
        ids: list[int] = []
        text = ""
        specials = tokenizer.specials
        special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "$^")
        for part in self._parts(messages, add_generation_prompt):
            if isinstance(part, _Own):
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
        """Return the text that `encode` encodes; special tokens in it may be the template's or somebody's words."""
        plain = [message._replace(ids=None) for message in messages]
        return "".join(map(str, self._parts(plain, add_generation_prompt)))

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[str | tuple[int, ...]]:
        """Yield the template's own text, in which special tokens have names, what people said, and models' ids."""
        key = secrets.token_hex(8)
        # A template may ask whether there is content at all, so of what says nothing there is no placeholder.
        hidden = {number for number, message in enumerate(messages) if message.content or message.ids}
        contents = [
            f"{_PAD}{_MARK}{key}-{number}{_MARK}{_PAD}" if number in hidden else message.content
            for number, message in enumerate(messages)
        ]
        rendered = self._render(messages, contents, add_generation_prompt)
        # Text and number by turns: all that is left of a placeholder is its number and the spaces that it kept.
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
        yield _Own(pieces[0])
        for left, number, right, between in zip(*(pieces[start::4] for start in (1, 2, 3, 4)), strict=True):
            _, content, ids = messages[int(number)]
            content = content if left else content.lstrip()
            yield (content if right else content.rstrip()) if ids is None else ids
            yield _Own(between)

    def _render(self, messages: Sequence[Message], contents: list[str], add_generation_prompt: bool) -> str:
        import jinja2

        given = [
            {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        for message in messages:
            if not isinstance(message.content, str):
                kind = type(message.content).__name__
                raise PromptError(f"A message's content is {kind}.", "It must be text.", "Give it as a string.")
            if message.role not in ROLES:  # which would stand in the template's own text
                raise PromptError(f"Unknown role: {message.role}.", "", f"The roles are {', '.join(ROLES)}.")
        values = {"messages": given, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._environment.render(self._template, values | self._names, Budget(len(given)))
        except BudgetError as error:
            raise PromptError("The chat template does more than a template may.", str(error), _OTHERWISE) from error
        except (jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
            why = f"{type(error).__name__}: {_shorten(error)}"
            raise PromptError("The chat template does more than a template may.", why, _OTHERWISE) from error
        except (jinja2.TemplateError, *_RAISED) as error:
            raise PromptError(
                "The chat template refuses this conversation.",
                f"{type(error).__name__}: {_shorten(error)}",
                "Most templates want user and assistant by turns, behind at most one system.",
            ) from error


def _shorten(reason: object) -> str:
    """Return what a template or Jinja complains of; either can be as long as it likes."""
    text = str(reason)
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that lies with a tokenizer, None where there is none."""
    settings = tokenizer.settings
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name, as older files have them
        source = _choose_default(tokenizer, source)
    if source is None:
        return None
    if not isinstance(source, str):
        raise TokenizerError(
            f"chat_template in {tokenizer.directory} is {type(source).__name__}.",
            "It must be text, a template in Jinja.",
            _OTHERWISE,
        )
    return ChatTemplate(source, name_specials(settings))


def _choose_default(tokenizer: Tokenizer, several: list[Any]) -> Any:
    """Return the template named default; None where there are none at all."""
    if not several:
        return None
    named = {str(entry.get("name")): entry.get("template") for entry in several if isinstance(entry, dict)}
    if "default" not in named:
        names = ", ".join(named) or "none"
        raise TokenizerError(
            f'chat_template in {tokenizer.directory} is a list without a template named "default".',
            f"It names {_shorten(names)}",
            _OTHERWISE,
        )
    return named["default"]


def name_specials(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that tokenizer_config.json names, as bos_token: a text, or an object with content."""
    named = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in named.items() if isinstance(token, str)}


def choose_template(tokenizer: Tokenizer, form: str | None = None) -> ChatTemplate | None:
    """Return the template of a model that speaks, None for one that goes on with a text.

    form: "dialogue" or "base", as the user wants it; None: as the model was trained.
    Raises TokenizerError where a model is to speak and has no template.
    """
    if not (is_dialogue(tokenizer) if form is None else form == "dialogue"):
        return None
    template = load_chat_template(tokenizer)
    if template is None:
        raise TokenizerError(
            "This model is to speak in turns, and its tokenizer has no chat template.",
            f"tokenizer_config.json in {tokenizer.directory} has no chat_template.",
            "Add one, or go on with --as base, which needs none.",
        )
    return template


def is_dialogue(tokenizer: Tokenizer) -> bool:
    """Say whether the model that this tokenizer lies with has learnt to speak in turns, and not only to go on."""
    return tokenizer.settings.get("lowvram_dialogue") is True
