"""Installs, removes and lists runs that the system starts by itself; prints nothing, and builds no file's contents."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import platformdirs

from lowvram.api.service_files import (
    CARRIED,
    Service,
    launchd_agent,
    launchd_label,
    systemd_unit,
    task_name,
    windows_task,
)
from lowvram.errors import BusyError, ConfigError, MachineError, name_nearest
from lowvram.shell import own_command, quote_command
from lowvram.storage.disk import DISK

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_NO_SYSTEM = (
    "Start it in a program that outlives the terminal instead, such as tmux: lowvram train {run} --supervise. On WSL, "
    "write systemd=true below [boot] in /etc/wsl.conf, type wsl --shutdown in Windows, and install it then."
)


class Answer(NamedTuple):
    """How a program ended, and what it printed."""

    code: int
    text: str


class Programs:
    """Runs the programs of the system, in one object that a test can replace."""

    def run(self, *words: str) -> Answer:
        """Run a program to its end; code 127 where there is none of that name."""
        try:
            ended = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            return Answer(127, f"{words[0]}: {error.strerror}")
        return Answer(ended.returncode, (ended.stdout + ended.stderr).strip())


PROGRAMS = Programs()


@dataclass(frozen=True)
class ServiceHost(ABC):
    """What starts services on a system.  folder: where its files lie; programs: those that it is told by."""

    folder: Path
    programs: Programs = PROGRAMS
    ending = ""
    encoding = "utf-8"

    def path(self, name: str) -> Path:
        """Return the file of a service."""
        return self.folder / f"lowvram-{name}{self.ending}"

    def names(self) -> list[str]:
        """Return the names of the services that are installed."""
        files = sorted(self.folder.glob(f"lowvram-*{self.ending}"))
        return [file.name.removeprefix("lowvram-").removesuffix(self.ending) for file in files]

    def install(self, service: Service) -> None:
        """Write a service's file, and start it; where that fails, nothing is left.

        Raises ConfigError where there is one of that name, MachineError where the system does not take it.
        """
        path = self.path(service.name)
        if path.exists():
            raise ConfigError(
                f"There is a service {service.name}.",
                f"Its file is {path}.",
                f"Give this one another name (--name), or type: lowvram service remove {service.name}",
            )
        self.prepare(service)
        self.folder.mkdir(parents=True, exist_ok=True)
        DISK.write(path, self.contents(service).encode(self.encoding))
        for words in self.start_commands(service.name):
            answer = self.programs.run(*words)
            if answer.code:
                self._take_away(service.name)
                why = f"`{quote_command(*words)}` says: {answer.text or f'exit code {answer.code}'}"
                raise MachineError(f"The service {service.name} could not be started, and was removed.", why)

    def remove(self, name: str) -> None:
        """Stop a service, which saves its run, and delete its file.  Raises ConfigError where there is none."""
        self.refuse_unknown(name)
        self._take_away(name)

    def _take_away(self, name: str) -> None:
        before, after = self.stop_commands(name)
        for words in before:
            self.programs.run(*words)
        self.path(name).unlink(missing_ok=True)
        for words in after:
            self.programs.run(*words)

    def refuse_unknown(self, name: str) -> None:
        """Raise ConfigError where no service of that name is installed."""
        if name not in self.names():
            fix = name_nearest(name, self.names()) if self.names() else "None is installed."
            raise ConfigError(f"There is no service {name}.", f"{self.path(name)} does not exist.", fix)

    @abstractmethod
    def contents(self, service: Service) -> str:
        """Return what stands in a service's file."""

    @abstractmethod
    def prepare(self, service: Service) -> None:
        """Make what the service needs; raises MachineError where this system starts no services."""

    @abstractmethod
    def start_commands(self, name: str) -> list[list[str]]:
        """Return the commands that start a service now and after each login."""

    @abstractmethod
    def stop_commands(self, name: str) -> tuple[list[list[str]], list[list[str]]]:
        """Return the commands that stop a service, before and after its file is deleted."""

    @abstractmethod
    def state(self, name: str) -> str:
        """Return what a service does now, in the system's words."""

    @abstractmethod
    def remarks(self, name: str) -> list[str]:
        """Return what the user should know: when it starts, and where its lines are."""


class Systemd(ServiceHost):
    """systemd's user services on Linux."""

    ending = ".service"

    def contents(self, service: Service) -> str:
        """Return the unit."""
        return systemd_unit(service)

    def prepare(self, service: Service) -> None:
        """Raise MachineError where systemd does not run, or no services of this user."""
        answer = self.programs.run("systemctl", "--user", "show-environment")
        if answer.code == 0:
            return
        is_running = self.programs.run("systemctl", "show", "--property=Version").code == 0
        what = "No service was installed."
        if not is_running:
            why = "systemd, which would start it, does not run here, as in most containers and in WSL as it comes."
            raise MachineError(what, why, _NO_SYSTEM.format(run=quote_command(service.program[-2])))
        raise MachineError(
            what,
            f"systemd does not answer this user: {answer.text}.",
            "Log in as this user itself, and not through su or sudo; or keep its services without a login: "
            f"loginctl enable-linger {getpass.getuser()}",
        )

    def start_commands(self, name: str) -> list[list[str]]:
        """Enable it, now too."""
        return [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", "--now", _unit(name)]]

    def stop_commands(self, name: str) -> tuple[list[list[str]], list[list[str]]]:
        """Disable it, now too; a failed one would be remembered."""
        after = [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "reset-failed", _unit(name)]]
        return [["systemctl", "--user", "disable", "--now", _unit(name)]], after

    def state(self, name: str) -> str:
        """Return whether it is active, and the exit code of one that ended."""
        wanted = "--property=ActiveState,Result,ExecMainStatus"
        answer = self.programs.run("systemctl", "--user", "show", _unit(name), wanted)
        found = dict(line.partition("=")[::2] for line in answer.text.splitlines())
        if answer.code or "ActiveState" not in found:
            return f"unknown ({answer.text or 'systemctl does not answer'})"
        if found["ActiveState"] == "active":
            return "active"
        return f"{found['ActiveState']} ({found.get('Result')}, exit code {found.get('ExecMainStatus')})"

    def remarks(self, name: str) -> list[str]:
        """Say whether it starts without a login."""
        user = getpass.getuser()
        answer = self.programs.run("loginctl", "show-user", user, "--property=Linger")
        lines = f"What it prints: journalctl --user -u {_unit(name)} -f"
        if answer.text == "Linger=yes":
            return ["It starts when the computer does (lingering is on).", lines]
        starts = "It starts when you log in, and ends when you log out."
        return [f"{starts} To start without a login, type once: loginctl enable-linger {user}", lines]


def _unit(name: str) -> str:
    return f"lowvram-{name}.service"


class Launchd(ServiceHost):
    """launchd's agents on macOS."""

    ending = ".plist"

    def contents(self, service: Service) -> str:
        """Return the property list."""
        return launchd_agent(service)

    def prepare(self, service: Service) -> None:
        """Make the folder of logs, which launchd does not."""
        service.log.parent.mkdir(parents=True, exist_ok=True)

    def start_commands(self, name: str) -> list[list[str]]:
        """Load it into the domain of this user's login, which starts it."""
        return [["launchctl", "bootstrap", _domain(), str(self.path(name))]]

    def stop_commands(self, name: str) -> tuple[list[list[str]], list[list[str]]]:
        """Unload it, which stops it."""
        return [["launchctl", "bootout", f"{_domain()}/{launchd_label(name)}"]], []

    def state(self, name: str) -> str:
        """Return what launchd says of its state."""
        answer = self.programs.run("launchctl", "print", f"{_domain()}/{launchd_label(name)}")
        found = re.search(r"^\s*state = (.+)$", answer.text, re.MULTILINE)
        return found[1] if found and not answer.code else "not loaded"

    def remarks(self, name: str) -> list[str]:
        """Say when it starts."""
        return ["It starts when you log in.", f"What it prints: tail -f {quote_command(log_of(name))}"]


def _domain() -> str:
    return f"gui/{os.getuid()}" if sys.platform != "win32" else "gui"


class TaskScheduler(ServiceHost):
    """The task scheduler of Windows."""

    ending = ".xml"
    encoding = "utf-16"

    def contents(self, service: Service) -> str:
        """Return the task."""
        domain, user = os.environ.get("USERDOMAIN"), getpass.getuser()
        return windows_task(service, f"{domain}\\{user}" if domain else user)

    def prepare(self, service: Service) -> None:
        """Do nothing: every Windows has a task scheduler."""

    def start_commands(self, name: str) -> list[list[str]]:
        """Create it from its file, and run it."""
        create = ["schtasks", "/Create", "/TN", task_name(name), "/XML", str(self.path(name))]
        return [create, ["schtasks", "/Run", "/TN", task_name(name)]]

    def stop_commands(self, name: str) -> tuple[list[list[str]], list[list[str]]]:
        """End and delete it."""
        task = task_name(name)
        return [["schtasks", "/End", "/TN", task], ["schtasks", "/Delete", "/F", "/TN", task]], []

    def state(self, name: str) -> str:
        """Return its state; schtasks would say it in the language of the system."""
        script = f"(Get-ScheduledTask -TaskPath '\\lowvram\\' -TaskName '{name}').State"
        answer = self.programs.run("powershell", "-NoProfile", "-Command", script)
        return "unknown" if answer.code or not answer.text else answer.text

    def remarks(self, name: str) -> list[str]:
        """Say when it starts, and how it is stopped."""
        return ["It starts when you log on, in a window of its own; Ctrl-C there saves the run and stops it."]


def host_here(programs: Programs = PROGRAMS) -> ServiceHost:
    """Return what starts services on this system; raises MachineError where that is not known."""
    if sys.platform == "win32":
        folder = Path(platformdirs.user_data_dir("lowvram", appauthor=False)) / "services"
        return TaskScheduler(folder, programs)
    if sys.platform == "darwin":
        return Launchd(Path.home() / "Library/LaunchAgents", programs)
    if sys.platform == "linux":
        base = os.environ.get("XDG_CONFIG_HOME")
        return Systemd((Path(base) if base else Path.home() / ".config") / "systemd/user", programs)
    raise MachineError("No service can be installed.", f"What starts programs on {sys.platform} is not known here.")


def log_of(name: str) -> Path:
    """Return the file for what a service on macOS prints."""
    return Path.home() / f"Library/Logs/lowvram-{name}.log"


def name_after(run: Path) -> str:
    """Return a name for the service of a run directory, in the letters that every system takes."""
    plain = unicodedata.normalize("NFKD", run.name.replace("ı", "i")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.]+", "-", plain).strip("-._")[:60] or "run"


def describe_service(run_file: Path, name: str, environment: Mapping[str, str] = os.environ) -> Service:
    """Return the service that trains what a run file describes.  Raises ConfigError where the name cannot be used."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"The name {name!r} cannot be a service's.",
            "It has letters that not every system takes.",
            "Use a-z, 0-9 and -.",
        )
    carried = {variable: environment[variable] for variable in CARRIED if environment.get(variable)}
    if "PYTHONPATH" in carried:  # relative to the directory in which it was typed
        places = carried["PYTHONPATH"].split(os.pathsep)
        carried["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in places if place)
    run_file = Path(os.path.abspath(run_file))
    words = (*own_command(run_file.parent), "train", str(run_file), "--supervise")
    return Service(name, words, run_file.parent, log_of(name), carried)


def refuse_busy(run: Path) -> None:
    """Raise BusyError where a process trains in a run directory: the service's own would be refused."""
    from filelock import FileLock, Timeout

    if not (run / "lock").exists():
        return
    try:
        with FileLock(run / "lock", timeout=0):
            return
    except Timeout as error:
        raise BusyError(
            f"A process is training in {run}.", "The service would start a second one.", "Stop it first: Ctrl-C saves."
        ) from error
