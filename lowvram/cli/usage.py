"""Usage errors that name what was probably meant: the nearest command, option or value."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

# argparse's message; from Python 3.12 on it has the choices without quotes.
_CHOICE = re.compile(r"argument (.+?): invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)
# By an option's action, how often it may be given.
_OFTEN = {"append": "may be repeated", "extend": "one or several"}
_COMMAND = {"COMMAND", "command", "ACTION", "action"}


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors name the nearest option, value or command."""

    _given: Sequence[str] = ()

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, whose help says that it may be given more than once, or takes several values, if it does."""
        often = _OFTEN.get(options.get("action", ""))
        if often and options.get("help"):
            options["help"] += f" ({often})"
        return super().add_argument(*names, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse an option here, where its neighbours are known; argparse would refuse it at the very top."""
        self._given = list(args or ())
        found, left = super().parse_known_args(args, namespace)
        unknown = [word.partition("=")[0] for word in left if re.match(r"--?[^\W\d]", word)]
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        if unknown and not has_commands:
            self.error(f"there is no option {unknown[0]}. {self._answer_option(unknown[0])}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message with the nearest choice, and exit with 2.

        Of a command that is missing or unknown there is no usage, and that of what stands before it says nothing.
        """
        choice = _CHOICE.fullmatch(message)
        is_of_command = message.endswith((": COMMAND", ": ACTION")) or (choice and choice[1] in _COMMAND)
        if message.endswith((": COMMAND", ": ACTION")):
            known = [
                name
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
                for name in action.choices
            ]
            message = f"which command? {', '.join(known)}" + (". Begin with: lowvram demo" if "demo" in known else "")
        if choice is not None:
            message = _answer_choice(choice[1], choice[2], re.findall(r"[^\s,']+", choice[3]))
        if is_of_command:
            self.exit(2, f"{self.prog}: error: {message}\n")
        if message.startswith("the following arguments are required"):
            message += self._explain_greed(message.rpartition(": ")[2])
        super().error(message)

    def _explain_greed(self, missing: str) -> str:
        """Return a sentence where an option that takes several values may have taken what is missing, else nothing."""
        takers = [name for action in self._actions if action.nargs == "+" for name in action.option_strings]
        taker = next((name for name in self._given if name in takers), None)
        return f". {taker} takes all the words behind it: write {missing} before it" if taker else ""

    def _answer_option(self, word: str) -> str:
        from lowvram.config.field_names import answer_option
        from lowvram.config.run_file import full_names

        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        return answer_option(word, options, full_names())


def _answer_choice(argument: str, given: str, choices: list[str]) -> str:
    from lowvram.config.field_names import answer_command
    from lowvram.errors import name_nearest

    if argument in _COMMAND:
        return f"there is no command {given}. {answer_command(given, choices)}"
    return f"argument {argument}: there is no {given!r}. {name_nearest(given, choices)}"
