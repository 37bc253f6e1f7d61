"""Arguments of the public functions: read, or refused by name; and options in messages, turned into arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowvram.api.tasks import Notice, Result, Task, finish
from lowvram.errors import ConfigError, LowvramError
from lowvram.units import parse_count, parse_share

# Of options that stand for something else than an argument of the same name.
_SPELLINGS = {
    "--on-bad-row skip": 'on_bad_row="skip"',
    "--on-bad-row report": "check_texts",
    "; report lists": "; check_texts lists",
    "--replace": "replace=True",
}
_OPTION = re.compile(r"(?<![\w/.-])--([a-z]+(?:-[a-z]+)*)")


def carry_out(task: Task[Result], progress: bool) -> tuple[Result, tuple[Notice, ...]]:
    """Run a task to its end; return its result and its notices, which name arguments, as its errors do.

    progress: whether to show a progress bar.
    """
    from lowvram.api.progress import with_bar

    with naming_arguments():
        result, notices = finish(with_bar(task) if progress else task)
    return result, tuple(Notice(name_arguments(said.text), said.level) for said in notices)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Turn options of the command line in an error into the arguments that they stand for."""
    try:
        yield
    except LowvramError as error:
        named = type(error)(*map(name_arguments, (error.what, error.why, error.fix)))
        raise named.with_traceback(error.__traceback__) from error.__cause__


def name_arguments(text: str) -> str:
    """Return a message with `--out` as `out` and `--replace` as `replace=True`."""
    for option, argument in _SPELLINGS.items():
        text = text.replace(option, argument)
    return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)


def read_path(name: str, value: str | Path) -> Path:
    """Return a path; raises ConfigError where the argument is none."""
    if not isinstance(value, str | Path) or value == "":
        raise _refused(name, value, f'{name}="a/folder", or a pathlib.Path')
    return Path(value)


def read_paths(name: str, value: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Return one path or several; raises ConfigError where the argument holds none, or something else."""
    values = [value] if isinstance(value, str | Path) else list(value) if isinstance(value, list | tuple) else []
    if not values:
        raise _refused(name, value, f'{name}="a/folder", or a list of files and folders')
    return tuple(read_path(name, each) for each in values)


def read_name(name: str, value: str) -> str:
    """Return a text that names something; raises ConfigError where the argument is none, or empty."""
    if not isinstance(value, str) or not value:
        raise _refused(name, value, f'{name}="text"')
    return value


def read_count(name: str, value: int | str, example: str = '32768 or "32k"') -> int:
    """Return a whole number of at least one, from 32768 or "32k"; raises ConfigError."""
    number = value
    if isinstance(value, str):
        try:
            number = parse_count(value)
        except ValueError as error:
            raise _refused(name, value, f"{name}={example}") from error
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise _refused(name, value, f"{name}={example}")
    return number


def read_share(name: str, value: float | str | None) -> float | None:
    """Return a share between 0 and 1, from 0.005 or "0.5%"; raises ConfigError."""
    if isinstance(value, str):
        try:
            return parse_share(value)
        except ValueError as error:
            raise _refused(name, value, f'{name}=0.005 or "0.5%"') from error
    if value is not None and (not isinstance(value, float) or not 0.0 < value < 1.0):
        raise _refused(name, value, f'{name}=0.005 or "0.5%"')
    return value


def read_flag(name: str, value: bool) -> bool:
    """Return a truth value; raises ConfigError for anything else."""
    if not isinstance(value, bool):
        raise _refused(name, value, f"{name}=True or {name}=False")
    return value


def _refused(name: str, value: object, example: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}.", fix=f"Write {example}.")
