"""Services are installed whole or not at all, in the words that each system understands; the systems are fakes."""

from __future__ import annotations

import os
import plistlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from lowvram.api import services
from lowvram.api.services import (
    Answer,
    Launchd,
    Programs,
    Systemd,
    TaskScheduler,
    describe_service,
    name_after,
    refuse_busy,
)
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import BusyError, ConfigError, MachineError
from tests.flows.typed import typed, write_home


@dataclass
class FakePrograms(Programs):
    """Answers by the words of a command, and notes each."""

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def run(self, *words: str) -> Answer:
        """Return the answer whose key stands in the command."""
        line = " ".join(words)
        self.asked.append(line)
        return next((answer for key, answer in self.answers.items() if key in line), Answer(0, ""))


@pytest.fixture
def service(tmp_path: Path) -> services.Service:
    return describe_service(
        tmp_path / "run.toml", "first", {"PATH": "/bin", "SECRET": "x", "PYTHONPATH": f"a{os.pathsep}/b"}
    )


def test_a_service_carries_absolute_paths_and_only_the_variables_that_decide_a_run(
    service: services.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.program[0] == sys.executable
    assert service.program[-3:] == ("train", str(tmp_path / "run.toml"), "--supervise")
    assert service.directory == tmp_path
    here = os.path.abspath("a") + os.pathsep + os.path.abspath("/b")
    assert service.environment == {"PATH": "/bin", "PYTHONPATH": here}
    monkeypatch.chdir(tmp_path)
    assert describe_service(Path("run.toml"), "first", {}).program == service.program


def test_systemd_is_told_to_start_it_and_what_lingering_means_is_said(
    service: services.Service, tmp_path: Path
) -> None:
    programs = FakePrograms()
    host = Systemd(tmp_path / "units", programs)
    host.install(service)
    unit = tmp_path / "units/lowvram-first.service"
    assert unit.read_text(encoding="utf-8") == services.systemd_unit(service)
    assert programs.asked[-2:] == [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now lowvram-first.service",
    ]
    assert host.names() == ["first"]
    assert any("loginctl enable-linger " in remark for remark in host.remarks("first"))
    programs.answers["loginctl show-user"] = Answer(0, "Linger=yes")
    assert not any("enable-linger" in remark for remark in host.remarks("first"))
    with pytest.raises(ConfigError, match=r"There is a service first\. .* another name"):
        host.install(service)
    programs.asked.clear()
    host.remove("first")
    assert programs.asked == [
        "systemctl --user disable --now lowvram-first.service",
        "systemctl --user daemon-reload",
        "systemctl --user reset-failed lowvram-first.service",
    ]
    assert host.names() == []
    with pytest.raises(ConfigError, match=r"There is no service first\. .* None is installed"):
        host.remove("first")


def test_a_service_that_systemd_does_not_start_leaves_nothing_behind(service: services.Service, tmp_path: Path) -> None:
    host = Systemd(tmp_path, FakePrograms({"enable": Answer(1, "Unit is masked.")}))
    with pytest.raises(
        MachineError, match=r"could not be started, and was removed\. .*enable --now .*says: Unit is masked"
    ):
        host.install(service)
    assert host.names() == []
    assert host.programs.asked[-1] == "systemctl --user reset-failed lowvram-first.service"


NO_BUS = Answer(1, "Failed to connect to bus: No medium found")


@pytest.mark.parametrize(
    "answers, says",
    [
        ({"systemctl": Answer(127, "systemctl: No such file or directory")}, r"does not run here.*tmux.*systemd=true"),
        (
            {"--user": NO_BUS},
            r"does not answer this user: Failed to connect to bus.*not through su or sudo.*enable-linger",
        ),
    ],
    ids=["no systemd", "no session"],
)
def test_where_systemd_does_not_run_nothing_is_written(
    service: services.Service, tmp_path: Path, answers: dict[str, Answer], says: str
) -> None:
    host = Systemd(tmp_path / "units", FakePrograms(answers))
    with pytest.raises(MachineError, match=says):
        host.install(service)
    assert not (tmp_path / "units").exists()


@pytest.mark.parametrize(
    "text, state",
    [
        ("Result=success\nExecMainStatus=0\nActiveState=active", "active"),
        ("Result=exit-code\nExecMainStatus=1\nActiveState=failed", "failed (exit-code, exit code 1)"),
        ("", "unknown (systemctl does not answer)"),
    ],
)
def test_what_a_unit_does_is_said_with_the_exit_code_of_one_that_ended(tmp_path: Path, text: str, state: str) -> None:
    assert Systemd(tmp_path, FakePrograms({"show": Answer(0, text)})).state("first") == state


def test_launchd_loads_the_agent_into_the_login_and_reads_its_state(
    service: services.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_domain", lambda: "gui/501")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    service = describe_service(tmp_path / "run.toml", "first")
    programs = FakePrograms({"print": Answer(0, "x = {\n\tactive count = 1\n\tstate = running\n}")})
    host = Launchd(tmp_path / "agents", programs)
    host.install(service)
    file = tmp_path / "agents/lowvram-first.plist"
    assert plistlib.loads(file.read_bytes())["ProgramArguments"] == list(service.program)
    assert service.log.parent.is_dir(), "launchd does not make it"
    assert host.state("first") == "running"
    host.remove("first")
    assert programs.asked == [
        f"launchctl bootstrap gui/501 {file}",
        "launchctl print gui/501/lowvram.first",
        "launchctl bootout gui/501/lowvram.first",
    ]
    assert not file.exists()


def test_windows_gets_the_task_as_a_file_and_tells_its_state_in_no_language(
    service: services.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USERDOMAIN", "HOME-PC")
    programs = FakePrograms({"powershell": Answer(0, "Running")})
    host = TaskScheduler(tmp_path, programs)
    host.install(service)
    file = tmp_path / "lowvram-first.xml"
    assert file.read_bytes().startswith((b"\xff\xfe", b"\xfe\xff")), "schtasks reads UTF-16 with its mark"
    assert "<UserId>HOME-PC\\" in file.read_text(encoding="utf-16")
    assert host.state("first") == "Running"
    host.remove("first")
    assert [line for line in programs.asked if line.startswith("schtasks")] == [
        f"schtasks /Create /TN lowvram\\first /XML {file}",
        "schtasks /Run /TN lowvram\\first",
        "schtasks /End /TN lowvram\\first",
        "schtasks /Delete /F /TN lowvram\\first",
    ]


@pytest.mark.parametrize(
    "directory, name", [("tr-25m", "tr-25m"), ("ılık İğde 2", "ilik-Igde-2"), ("...", "run"), ("日本", "run")]
)
def test_a_service_is_called_after_its_run_in_letters_that_every_system_takes(directory: str, name: str) -> None:
    assert name_after(Path("runs") / directory) == name
    assert describe_service(Path("run.toml"), name, {}).name == name


@pytest.mark.parametrize("name", ["", "a b", "ı", "../x", "-x", "x" * 90])
def test_a_name_that_some_system_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        describe_service(Path("run.toml"), name, {})


def test_a_run_that_is_being_trained_is_not_started_a_second_time(tmp_path: Path) -> None:
    refuse_busy(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with FileLock(tmp_path / "lock"):
        with pytest.raises(BusyError, match="A process is training in"):
            refuse_busy(tmp_path)
    refuse_busy(tmp_path)


def test_a_program_that_does_not_exist_is_an_answer() -> None:
    assert Programs().run("lowvram-has-no-such-program").code == 127
    assert Programs().run(sys.executable, "-S", "-c", "print(5); raise SystemExit(4)") == Answer(4, "5")


@pytest.fixture
def type_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tokenizer: Tokenizer
) -> tuple[Callable[..., object], FakePrograms]:
    """A home with a run file, and a systemd that does what it is told."""
    write_home(tmp_path)
    (tmp_path / "tok").symlink_to(small_tokenizer.directory)
    programs = FakePrograms({"show lowvram": Answer(0, "ActiveState=active")})
    monkeypatch.setattr(services, "host_here", lambda: Systemd(tmp_path / "units", programs))
    return lambda *words: typed("service", *words), programs


def test_a_service_is_installed_shown_listed_and_removed_by_commands(tmp_path: Path, type_service) -> None:
    service, programs = type_service
    printed = service("install", tmp_path / "run.toml", "--print")
    assert (printed.code, programs.asked) == (0, [])
    assert not (tmp_path / "units").exists()
    answer = service("install", tmp_path / "run.toml")
    assert answer.code == 0, answer.err
    assert (tmp_path / "units/lowvram-run.service").read_text(encoding="utf-8") == printed.out
    assert "loginctl enable-linger" in answer.err
    assert "lowvram service status run" in answer.err
    assert service("list").out == "run: active\n"
    assert service("status", "run").out == "run: active\n"
    again = service("install", tmp_path / "run.toml")
    assert (again.code, "There is a service run." in again.err) == (1, True)
    assert service("install", tmp_path / "run.toml", "--name", "second").code == 0
    assert service("remove", "run").code == 0
    assert service("list").out == "second: active\n"
    assert "Did you mean second?" in service("status", "secnd").err


def test_a_run_file_that_cannot_be_trained_gets_no_service(tmp_path: Path, type_service) -> None:
    service, programs = type_service
    (tmp_path / "bad.toml").write_text('[model]\npreset = "tr-25n"\n', encoding="utf-8")
    answer = service("install", tmp_path / "bad.toml")
    assert answer.code == 1
    assert "tr-25m" in answer.err
    assert (programs.asked, (tmp_path / "units").exists()) == ([], False)
