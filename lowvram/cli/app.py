"""`lowvram`: parses the command line, runs the command and shows its errors; each command has a file of its own."""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys
from collections.abc import Sequence

import lowvram
from lowvram.cli.lasting import lasting_stderr
from lowvram.cli.signals import INTERRUPTED, Terminated, ended_by_signals
from lowvram.cli.usage import Parser
from lowvram.errors import LowvramError, MachineError, ShapeError

COMMANDS = (
    "demo",
    "doctor",
    "fit",
    "tokenizer",
    "data",
    "train",
    "pause",
    "resume",
    "stop",
    "verify",
    "service",
    "receipt",
    "evaluate",
    "compare",
    "chat",
    "serve",
    "export",
    "import",
)
# The modules of commands that are not called as they are.
_MODULES = {"pause": "control", "resume": "control", "stop": "control"}
# Environment variables that torch's CPU libraries read when they are loaded; values that the user has set are kept.
CPU_ENVIRONMENT = {
    # Waiting threads sleep.  By default they spin, and one other busy program makes a step 15 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # An expert has another number of rows at every step, and oneDNN caches code for 1,024 shapes: half a gigabyte.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
_DESCRIPTION = "Pretrain your own Turkish language model at home, on the GPU that you already own."
_EPILOG = (
    "Begin with `lowvram demo`, which shows every step in a few minutes. `lowvram COMMAND --help` explains each. "
    "Exit codes: 0 finished; 1 an error that you can repair; 2 wrong usage; 3 stopped as you asked, and saved; "
    "75 a fault after which the same command resumes; 130 interrupted, nothing saved."
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser("lowvram", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"lowvram {lowvram.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in dict.fromkeys(_MODULES.get(name, name) for name in COMMANDS):
        module = f"{module}_" if keyword.iskeyword(module) else module
        importlib.import_module(f"lowvram.cli.{module}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 finished, 1 an error that the user can repair, 2 wrong usage, 3 stopped by request and saved, 75 ended by a fault
    after which the same command resumes, 130 interrupted with nothing saved.
    """
    had_output = _open_closed_streams()
    _use_utf8()
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with lasting_stderr():
        typed = list(sys.argv[1:] if argv is None else argv)
        # What a command proposes to type next may be what was typed, but for one word.
        arguments = build_parser().parse_args(typed, argparse.Namespace(typed=typed))
        if not had_output:
            sys.stderr.write("Standard output is closed, so results are not shown.\n")
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        with ended_by_signals():
            return int(arguments.run(arguments) or 0)
    except (LowvramError, ShapeError) as error:
        from lowvram.cli.console import show_error

        show_error(str(error))
        return error.exit_code if isinstance(error, LowvramError) else 1
    except BrokenPipeError:
        # The reader went away (`lowvram … | head`): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        from lowvram.cli.console import show_error

        show_error(str(_explain_refusal(error)))
        return 1
    except (KeyboardInterrupt, Terminated) as error:
        from lowvram.cli.ending import show_interruption

        show_interruption(arguments, isinstance(error, Terminated))
        return INTERRUPTED


def _explain_refusal(error: OSError) -> MachineError:
    """Return the error for what the system refused: no permission, no space, a file in the place of a folder."""
    return MachineError(
        f"{error.filename or 'A file'} could not be read or written.",
        f"The system says: {error.strerror}.",
        "Repair that and type the same command again; what was finished before is kept.",
    )


def _open_closed_streams() -> bool:
    """Connect streams that were closed from the start (`>&-`, a Windows program without a console) to the null device.

    Python has None in their place, and the next file that is opened would get their descriptors and their output.
    Returns whether standard output was open.
    """
    had_output = sys.stdout is not None
    # In the descriptors' order: each open takes the lowest that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open as long as the process lives, as the stream would be.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    return had_output


def _use_utf8() -> None:
    """Use UTF-8 for every stream, where a Turkish Windows console would use cp1254 or cp857.

    Input that is not UTF-8 is refused later, where it is encoded.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
