"""A unit, an agent and a task hold every path and word as it is, whatever letters it has, and start one supervisor."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowvram.api.service_files import STOP_S, Service, launchd_agent, systemd_unit, windows_task
from lowvram.errors import ConfigError

# What a home directory may be called.
ODD = 'ağaç 50% $HOME "x" \\n İ'
WORDS = ("/opt/my python/python", "-P", "-m", "lowvram", "train", f"/home/{ODD}/run.toml", "--supervise")
SERVICE = Service(
    "first", WORDS, Path(f"/home/{ODD}"), Path("/var/log/x"), {"PATH": f"/a:{ODD}", "OMP_NUM_THREADS": "4"}
)


def unquote(text: str) -> list[str]:
    """Split words as systemd does: quoted, with backslashes before `"` and `\\`, and percent signs doubled."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%") for word in found]


def values(unit: str, key: str) -> list[str]:
    return [line.removeprefix(f"{key}=") for line in unit.splitlines() if line.startswith(f"{key}=")]


def test_a_unit_runs_the_words_in_their_directory_with_their_variables() -> None:
    unit = systemd_unit(SERVICE)
    (start,) = values(unit, "ExecStart")
    assert start[0] == ":", "without it a dollar sign would be a variable"
    assert unquote(start[1:]) == list(WORDS)
    assert [unquote(value) for value in values(unit, "Environment")] == [[f"PATH=/a:{ODD}"], ["OMP_NUM_THREADS=4"]]
    (directory,) = values(unit, "WorkingDirectory")
    assert directory.replace("%%", "%") == f"/home/{ODD}", "systemd takes it as it stands, without quotation marks"


def test_a_unit_leaves_restarts_to_the_supervisor_and_gives_a_save_its_time() -> None:
    lines = systemd_unit(SERVICE).splitlines()
    for line in (
        "KillMode=mixed",
        "KillSignal=SIGTERM",
        f"TimeoutStopSec={STOP_S}",
        "SuccessExitStatus=3 130",
        "Restart=on-abnormal",
        "OOMPolicy=continue",
        "WantedBy=default.target",
    ):
        assert lines.count(line) == 1, line
    assert STOP_S >= 600
    assert [line for line in lines if line.startswith("[")] == ["[Unit]", "[Service]", "[Install]"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_itself_accepts_the_unit_and_finds_the_program(tmp_path: Path) -> None:
    home = tmp_path / ODD
    folder = tmp_path / "ağaç 50% $HOME"  # systemd refuses programs whose path has quotation marks or backslashes
    for directory in (home, folder):
        directory.mkdir()
    (folder / "python").symlink_to(sys.executable)
    unit, runtime = tmp_path / "lowvram-first.service", tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    words = ["systemd-analyze", "--user", "verify", str(unit)]
    for name, complaint in (("python", ""), ("missing", f"Command {folder}/missing is not executable")):
        service = Service("first", (str(folder / name), *WORDS[1:]), home, tmp_path / "log", SERVICE.environment)
        unit.write_text(systemd_unit(service), encoding="utf-8")
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        answer = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if "Failed to initialize manager" in answer.stderr:
            pytest.skip("systemd-analyze cannot check units of a user here.")
        assert complaint in answer.stderr
        assert answer.returncode == bool(complaint), answer.stderr
        assert "Unknown key" not in answer.stderr


def test_an_agent_is_read_back_as_what_was_meant() -> None:
    agent = plistlib.loads(launchd_agent(SERVICE).encode())
    assert agent["Label"] == "lowvram.first"
    assert agent["ProgramArguments"] == list(WORDS)
    assert agent["WorkingDirectory"] == f"/home/{ODD}"
    assert agent["EnvironmentVariables"] == SERVICE.environment
    assert agent["StandardErrorPath"] == agent["StandardOutPath"] == "/var/log/x"
    assert (agent["RunAtLoad"], agent["KeepAlive"], agent["ExitTimeOut"]) == (True, False, STOP_S)


def test_a_task_is_read_back_as_what_was_meant_and_never_ends_by_itself() -> None:
    text = windows_task(SERVICE, "HOME-PC\\Ayşe & Can")
    task = ElementTree.fromstring(text.partition("\n")[2])
    assert task.tag == "{http://schemas.microsoft.com/windows/2004/02/mit/task}Task"

    def found(path: str) -> list[str | None]:
        steps = "/".join(f"{{*}}{step}" for step in path.split("/"))
        return [element.text for element in task.findall(steps)]

    assert found("Actions/Exec/Command") == [WORDS[0]]
    assert found("Actions/Exec/WorkingDirectory") == [f"/home/{ODD}"]
    (arguments,) = found("Actions/Exec/Arguments")
    assert arguments is not None
    assert shlex.split(arguments) == list(WORDS[1:]), "the C runtime's rules agree with a shell's for these words"
    assert found("Triggers/LogonTrigger/UserId") == found("Principals/Principal/UserId") == ["HOME-PC\\Ayşe & Can"]
    assert found("Settings/ExecutionTimeLimit") == ["PT0S"]
    assert found("Settings/StopIfGoingOnBatteries") == found("Settings/DisallowStartIfOnBatteries") == ["false"]


@pytest.mark.parametrize("path", ["/home/a\nb", "/home/a "], ids=["a line break", "a blank at its end"])
def test_a_path_that_no_unit_can_hold_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(path))):
        Service("first", WORDS, Path(path), Path("/var/log/x"))
