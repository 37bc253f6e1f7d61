"""A conversation in the terminal: reads lines and commands, and shows answers as they are generated."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lowvram.api.models import build_sampler
from lowvram.api.typed_text import read_typed
from lowvram.cli.console import AnswerStream, clean, notice, quote, show_error
from lowvram.errors import ConfigError, LowvramError, MachineError, PromptError, PromptTooLongError, name_nearest
from lowvram.units import count_of, show_bytes

if TYPE_CHECKING:
    from lowvram.generate.conversation import Conversation
    from lowvram.generate.sampling import Sampler

_HELP = '''/help               this list
/reset              forget the conversation
/retry              answer again, with the next seed
/system TEXT        set the system message of a dialogue model (without TEXT: show it; "-": remove it)
/set [NAME VALUE]   change temperature, top_k, top_p, min_p, repetition_penalty, seed or tokens; without NAME: show them
/save FILE          write the conversation, as .md or .json
/stats              tokens, speed and memory so far
/quit               end, as Ctrl-D, /exit and /q do
"""                 begins a text of several lines and ends it; a line that ends in \\ continues in the next'''
# The names that other programs have for these commands.
_OTHER_NAMES = {"exit": "quit", "q": "quit", "bye": "quit", "çık": "quit", "h": "help", "?": "help", "yardım": "help"}
_MOST_LINES = 1_000  # of history
_LONG = '"""'


@dataclass
class Repl:
    """The loop.  tokens: maximum of an answer.  notes, warning: shown at the beginning, and the notes again by /stats.

    trained_len: tokens of the longest text that the model was trained on.  newest: of a text that is too long its
    newest part is read without asking.
    """

    conversation: Conversation
    sampler: Sampler
    tokens: int
    notes: list[str]
    warning: str
    trained_len: int
    newest: bool = False
    _is_over: bool = field(default=False, init=False)
    _has_warned: bool = field(default=False, init=False)

    def run(self, keeps_history: bool = True) -> int:
        """Run until Ctrl-D, /quit, or Ctrl-C twice; returns 1 if the input is no terminal and a text had no answer."""
        failed = False
        for note in self.notes:
            notice(note, "dim")
        if self.warning:
            notice(self.warning, "yellow")
        notice("/help lists what can be typed; Ctrl-D ends.", "dim")
        with _history() if keeps_history and sys.stdin.isatty() else contextlib.nullcontext():
            for typed in self._inputs():
                try:
                    self._handle(typed)
                except LowvramError as error:
                    show_error(str(error))
                    failed |= not typed.is_command
                except RuntimeError as error:
                    show_error(str(_explain(error)))
                    failed |= not typed.is_command
                except KeyboardInterrupt:
                    notice("(stopped)", "dim")
                if self._is_over:
                    break
        # A person has read the error; a script has only the exit code.
        return int(failed and not sys.stdin.isatty())

    def _inputs(self) -> Iterator[Typed]:
        """Yield what is typed, until the end of input or a second Ctrl-C in a row."""
        was_interrupted = False
        while True:
            try:
                typed = _read_typed()
            except EOFError:
                notice("")  # the prompt's line is still open
                return
            except KeyboardInterrupt:
                notice("")
                if was_interrupted:
                    return
                was_interrupted = True
                notice("Press Ctrl-C again, or Ctrl-D, to end.", "dim")
                continue
            was_interrupted = False
            if typed.text:
                yield typed

    def _handle(self, typed: Typed) -> None:
        commands = self._commands()
        if not typed.is_command:
            self._answer(typed.text)
            return
        name, _, rest = typed.text[1:].partition(" ")
        command = commands.get(_OTHER_NAMES.get(name.lower(), name.lower()))
        if command is None:
            raise PromptError(
                f"There is no command /{name}.",
                f"The commands are {', '.join(f'/{known}' for known in commands)}.",
                f"{_name_nearest_command(name, [*commands, *_OTHER_NAMES])} "
                "Type a blank before a text that begins with /.",
            )
        command(rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: notice(_HELP),
            "reset": self._reset,
            "retry": self._retry,
            "system": self._set_system,
            "set": self._set,
            "save": self._save,
            "stats": lambda _: notice(self._describe()),
            "quit": self._quit,
        }

    def _answer(self, text: str) -> None:
        text = read_typed(text)
        try:
            pieces = self.conversation.ask(text, self.sampler, self.tokens, self.newest)
        except PromptTooLongError as error:
            if self.newest or not sys.stdin.isatty():
                raise
            show_error(str(error))
            if not _confirm("Read only its newest part?"):
                return
            pieces = self.conversation.ask(text, self.sampler, self.tokens, newest=True)
        self._show(pieces)

    def _show(self, pieces: Iterator[str]) -> None:
        """Print an answer as it is generated; Ctrl-C ends it, and what was written stays in the conversation."""
        conversation = self.conversation
        dropped, was_stopped, answer = conversation.dropped, False, AnswerStream()
        try:
            for piece in pieces:
                answer.write(piece)
        except KeyboardInterrupt:
            was_stopped = True
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
            answer.end()
        engine = conversation.engine
        if was_stopped:
            notice("(stopped)", "dim")
        elif engine.ended == "context":
            notice(f"(The context of {engine.max_context:,} tokens is full; the next turn makes room.)", "dim")
        elif engine.ended == "tokens":
            notice(f"(cut at {count_of(self.tokens, 'token')}; /set tokens allows more)", "dim")
        elif conversation.template is None:
            notice("(The model ended the text here.)", "dim")
        if conversation.dropped > dropped:
            what = "turns" if conversation.template is not None else "part of the text"
            notice(f"(The oldest {what} no longer fit the context and are forgotten.)", "dim")
        if len(engine.ids) > self.trained_len and not self._has_warned:
            self._has_warned = True
            notice(f"(From here on the text is longer than the {self.trained_len:,} tokens of training.)", "yellow")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        notice("Forgotten.", "dim")

    def _retry(self, _: str) -> None:
        sampler = self.sampler.model_copy(update={"seed": self.sampler.seed + 1})
        pieces = self.conversation.retry(sampler, self.tokens)
        self.sampler = sampler
        self._show(pieces)

    def _set_system(self, text: str) -> None:
        conversation = self.conversation
        if conversation.template is None:
            raise PromptError(
                "This model continues a text, which has no turns.",
                "Only a dialogue model takes a system message.",
                "If it is one, start chat again with --as dialogue.",
            )
        if text:
            conversation.system = None if text == "-" else read_typed(text)
        notice(f"System: {conversation.system or 'nothing'}", "dim")

    def _set(self, text: str) -> None:
        values = self.sampler.model_dump() | {"tokens": self.tokens}
        if not text:
            notice("\n".join(f"{name} {value}" for name, value in values.items()))
            return
        name, _, given = (part.strip() for part in text.partition(" "))
        if name not in values:
            raise ConfigError(
                f"There is no setting {name}.",
                f"The settings are {', '.join(values)}.",
                name_nearest(name, values) or "For example: /set temperature 0.7",
            )
        if name == "tokens":
            if not given.isdecimal() or int(given) < 1:
                raise ConfigError(
                    f"tokens is {given or 'missing'}.", "It must be a number of at least 1.", "/set tokens 200"
                )
            self.tokens = int(given)
        else:
            self.sampler = build_sampler(self.sampler.model_dump() | {name: given})
        notice(f"{name} {given}", "dim")

    def _save(self, text: str) -> None:
        from lowvram.storage.disk import DISK

        path = Path(os.path.expanduser(text))  # a ~ of an unknown user stays as it is
        if path.suffix not in (".md", ".json"):
            raise PromptError(
                f"/save needs a file that ends in .md or .json, not {text or 'nothing'}.", "", "/save talk.md"
            )
        if path.exists() and not (sys.stdin.isatty() and _confirm(f"{path} exists. Overwrite it?")):
            notice("Not saved.", "dim")
            return
        try:
            DISK.write(path, self._as_file(path.suffix).encode())
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise PromptError(f"{path} cannot be written.", f"{why}.", "Name another file.") from error
        notice(f"Saved to {path}.", "dim")

    def _as_file(self, suffix: str) -> str:
        conversation = self.conversation
        said = [("system", conversation.system)] if conversation.system else []
        # A text that is continued has no user and no assistant.
        names = {} if conversation.template is not None else {"user": "text", "assistant": "continuation"}
        said += [(names.get(message.role, message.role), message.content) for message in conversation.messages]
        if suffix == ".json":
            return quote([{"role": role, "content": text} for role, text in said]) + "\n"
        return "".join(f"**{role}**\n\n{clean(text)}\n\n" for role, text in said)

    def _quit(self, _: str) -> None:
        self._is_over = True

    def _describe(self) -> str:
        """Return the tokens read and written, their speed, and the memory in use."""
        from lowvram.generate.weights import weight_bytes

        conversation, counts = self.conversation, self.conversation.counts
        engine = conversation.engine
        read, written = f"{count_of(counts.read, 'token')} read", f"{counts.written:,} written"
        if counts.read:
            read += f" in {counts.read_s:,.2f} s"
        if counts.written and counts.written_s:
            written += f", {counts.written / counts.written_s:,.1f} a second"
        weights, cache = weight_bytes(engine.decoder.model), engine.decoder.cache_bytes
        lines = [
            f"{read}, {counts.reused:,} reused, {written}",
            f"{len(engine.ids):,} of {engine.max_context:,} tokens of context in use",
            f"weights {show_bytes(weights)}, cache {show_bytes(cache)}",
        ]
        return "\n".join([*lines, *self.notes])


def _name_nearest_command(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean /{_OTHER_NAMES.get(near[0], near[0])}?" if near else "/help explains each."


def _explain(error: RuntimeError) -> MachineError:
    """Return the error for memory that ran out; any other error is raised again."""
    from lowvram.train.oom import is_out_of_memory

    if not is_out_of_memory(error):
        raise error
    return MachineError(
        "Memory ran out.",
        "Another program may have taken what was free when this one began.",
        "Close it, or start chat again with a smaller --context or --precision fp8.",
    )


class Typed(NamedTuple):
    """A text for the model, or a command without the blanks around it."""

    text: str
    is_command: bool = False


def _read_typed() -> Typed:
    """Return a line, or several: between triple quotes, or where each but the last ends in a backslash."""
    line = _read_line("› ")
    if line.startswith("/"):
        return Typed(line.strip(), is_command=True)
    if line.startswith(_LONG):
        lines = [line[len(_LONG) :]]
        while _LONG not in lines[-1] and (more := _read_next_line()) is not None:
            lines.append(more)
        lines[-1] = lines[-1].partition(_LONG)[0]
        return Typed("\n".join(lines).strip("\n"))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_next_line() or "")
    return Typed("\n".join(lines).strip())


def _read_next_line() -> str | None:
    """Read the next line of a text; None at the end of the input, which ends the text as its closing mark does."""
    try:
        return _read_line("… ")
    except EOFError:
        notice("")
        return None


def _read_line(prompt: str) -> str:
    """Read a line; the prompt is for people alone."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)
    # Answers go to a file or a program, where the prompt has no place.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _confirm(question: str) -> bool:
    try:
        return _read_line(f"{clean(question)} [y/N] ").strip().lower() in ("y", "yes", "e", "evet")
    except (EOFError, KeyboardInterrupt):
        notice("")
        return False


@contextmanager
def _history() -> Iterator[None]:
    """Let lines be edited and recalled, if this Python has readline."""
    try:
        import readline
    except ImportError:  # Windows has its own editing
        yield
        return
    import platformdirs

    path = Path(platformdirs.user_state_dir("lowvram")) / "chat-history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_MOST_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
