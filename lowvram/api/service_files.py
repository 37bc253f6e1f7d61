"""The files that have a system start a run by itself: a systemd unit, a launchd agent, a scheduled task; writes none.

In each, `lowvram train --supervise` alone decides about restarts, because it sees checkpoints, and does the same on
every system.  systemd starts only the supervisor again, and only where a signal killed it.
"""

from __future__ import annotations

import plistlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from lowvram.errors import ConfigError

# For the end of a step and a save, before the system kills the run.
STOP_S = 600
# What a shell may have set and a service does not inherit: which card and how many threads, where caches and modules
# are, and where compilers are found.
CARRIED = (
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PATH",
    "PYTHONPATH",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
)
# Windows' own namespace for tasks.
_TASK = "http://schemas.microsoft.com/windows/2004/02/mit/task"


@dataclass(frozen=True)
class Service:
    """A run that a system starts.  program: absolute words; directory: where they run; log: for what they print."""

    name: str
    program: tuple[str, ...]
    directory: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no unit can hold: a line break, or a blank at an end of a path."""
        for text in (str(self.directory), *self.program, *self.environment.values()):
            if any(ord(letter) < 32 for letter in text):
                raise ConfigError(f"{text!r} has a control character.", "A service cannot name it.", "Rename it.")
        if str(self.directory) != str(self.directory).strip():
            why = "A service cannot run in a directory whose name ends with a blank."
            raise ConfigError(f"{str(self.directory)!r} ends with a blank.", why, "Rename it.")


def systemd_unit(service: Service) -> str:
    """Return the unit of a systemd user service.

    KillMode: only the supervisor hears SIGTERM, and passes it on; both of them would hear it twice.  OOMPolicy: where
    the kernel kills the process that trains, systemd would stop the supervisor, too.
    """
    program = " ".join(_quote(word) for word in service.program)
    variables = [f"Environment={_quote(f'{name}={value}')}" for name, value in service.environment.items()]
    lines = [
        "[Unit]",
        f"Description=lowvram train ({service.name})",
        "StartLimitIntervalSec=1h",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        f"WorkingDirectory={_double(str(service.directory))}",
        *variables,
        f"ExecStart=:{program}",  # the colon: `$` in a path is no variable
        "KillMode=mixed",
        "KillSignal=SIGTERM",
        f"TimeoutStopSec={STOP_S}",
        "SuccessExitStatus=3 130",
        "Restart=on-abnormal",
        "RestartSec=30",
        "OOMPolicy=continue",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def _quote(word: str) -> str:
    escaped = word.replace("\\", r"\\").replace('"', r"\"")
    return f'"{_double(escaped)}"'


def _double(text: str) -> str:
    """Return text in which a percent sign means itself."""
    return text.replace("%", "%%")


def launchd_label(name: str) -> str:
    """Return the name under which launchd knows a service."""
    return f"lowvram.{name}"


def launchd_agent(service: Service) -> str:
    """Return the property list of a launchd agent, which starts when its user logs in."""
    agent = {
        "Label": launchd_label(service.name),
        "ProgramArguments": list(service.program),
        "WorkingDirectory": str(service.directory),
        "EnvironmentVariables": dict(service.environment),
        "RunAtLoad": True,
        "KeepAlive": False,
        "ExitTimeOut": STOP_S,
        "ProcessType": "Interactive",  # a background process gets little of the processor and the drive
        "StandardOutPath": str(service.log),
        "StandardErrorPath": str(service.log),
    }
    return plistlib.dumps(agent).decode()


def task_name(name: str) -> str:
    """Return the name under which Windows knows a service."""
    return f"lowvram\\{name}"


def windows_task(service: Service, user: str) -> str:
    """Return the XML of a scheduled task that starts when `user` (DOMAIN\\NAME) logs on; variables are not carried."""
    task = ElementTree.Element("Task", {"version": "1.2", "xmlns": _TASK})
    _add(task, "RegistrationInfo", Description=f"lowvram train ({service.name})")
    _add(ElementTree.SubElement(task, "Triggers"), "LogonTrigger", Enabled="true", UserId=user)
    principals = ElementTree.SubElement(task, "Principals")
    principal = _add(principals, "Principal", UserId=user, LogonType="InteractiveToken", RunLevel="LeastPrivilege")
    principal.set("id", "Author")
    _add(
        task,
        "Settings",
        MultipleInstancesPolicy="IgnoreNew",
        DisallowStartIfOnBatteries="false",
        StopIfGoingOnBatteries="false",
        StartWhenAvailable="true",
        ExecutionTimeLimit="PT0S",  # else a task is ended after three days
        Priority="6",  # a task's usual 7 is below normal, for the drive and memory, too
    )
    actions = ElementTree.SubElement(task, "Actions", {"Context": "Author"})
    words = subprocess.list2cmdline(service.program[1:])
    _add(actions, "Exec", Command=service.program[0], Arguments=words, WorkingDirectory=str(service.directory))
    ElementTree.indent(task)
    return '<?xml version="1.0" encoding="UTF-16"?>\n' + ElementTree.tostring(task, "unicode") + "\n"


def _add(parent: ElementTree.Element, tag: str, **texts: str) -> ElementTree.Element:
    """Add an element whose children hold these texts."""
    element = ElementTree.SubElement(parent, tag)
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = text
    return element
