"""What a check-up is told: each fact read from the machine itself, and what torch says of itself."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowvram.cli.machine as command
import lowvram.hardware.inspect as facts_module
from lowvram.hardware.detect import (
    Bitsandbytes,
    Driver,
    NvidiaCard,
    TorchBuild,
    find_bitsandbytes,
    find_compiler,
    find_triton,
    find_wheel,
    first_line,
    install_command,
)
from lowvram.hardware.inspect import Facts, TorchSays, gather
from tests.flows.typed import environment


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from before any other; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "triton"}
    for name in before:
        del sys.modules[name]
    yield tmp_path
    sys.modules.pop("triton", None)
    sys.modules.update(before)


def write_package(home: Path, name: str, text: str = "", version: str = "") -> Path:
    folder = home / name.replace("-windows", "")
    folder.mkdir()
    (folder / "__init__.py").write_text(text, encoding="utf-8")
    if version:
        metadata = home / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


def test_triton_is_found_with_its_version(packages: Path) -> None:
    write_package(packages, "triton", version="3.7.9")
    found = find_triton()
    assert found is not None
    assert (found.version, found.problem) == ("3.7.9", "")


def test_tritons_package_for_windows_is_found_under_its_own_name(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(packages, "triton-windows", version="3.6.0.post26")
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    found = find_triton()
    assert found is not None
    assert found.version == "3.6.0.post26"


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
def test_a_triton_that_does_not_import_says_why_in_a_line(packages: Path, kind: str) -> None:
    write_package(packages, "triton", f"raise {kind}('libtriton.so: no symbol\\nsecond line')")
    found = find_triton()
    assert found is not None
    assert found.problem == "libtriton.so: no symbol"


def test_another_error_of_triton_is_not_hidden(packages: Path) -> None:
    write_package(packages, "triton", "raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        find_triton()


def test_packages_that_are_not_installed_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.hardware.detect.importlib.util.find_spec", lambda _: None)
    assert find_triton() is None
    assert find_bitsandbytes() is None


@pytest.mark.parametrize(
    "files, libraries",
    [
        ((), ()),
        (("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"), ("libbitsandbytes_cpu", "libbitsandbytes_cuda130")),
        (("libbitsandbytes_cuda128.dll", "libbitsandbytes_cuda.txt"), ("libbitsandbytes_cuda128",)),
        (("libbitsandbytes_cpu.dylib", "other.so"), ("libbitsandbytes_cpu",)),
    ],
    ids=["none", "linux", "windows", "mac"],
)
def test_bitsandbytes_is_known_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], libraries: tuple[str, ...]
) -> None:
    folder = write_package(tmp_path, "bitsandbytes", "raise SystemExit('never imported')")
    for file in files:
        (folder / file).touch()
    spec = type("Spec", (), {"origin": str(folder / "__init__.py")})
    monkeypatch.setattr("lowvram.hardware.detect.importlib.util.find_spec", lambda _: spec)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.50.2")
    assert find_bitsandbytes() == Bitsandbytes("0.50.2", libraries)


@pytest.mark.parametrize(
    "asked, present, found",
    [
        (None, ("gcc", "clang", "cc"), "/bin/gcc"),
        (None, ("clang",), "/bin/clang"),
        (None, ("cc",), None),
        ("tcc", ("gcc", "tcc"), "/bin/tcc"),
        ("gone", ("gcc",), None),
    ],
    ids=str,
)
def test_the_compiler_is_the_one_that_triton_takes(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, present: tuple[str, ...], found: str | None
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in present else None)
    if asked is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", asked)
    assert find_compiler() == found


def test_an_errors_first_line_or_its_kind() -> None:
    assert first_line(OSError("one\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    "runs, capability, wheel",
    [
        ((13, 0), None, (13, 0)),
        ((13, 0), (12, 0), (13, 0)),
        ((13, 0), (6, 1), (12, 6)),
        ((13, 0), (7, 0), (12, 6)),
        ((13, 0), (7, 5), (13, 0)),
        ((12, 8), (12, 0), (12, 8)),
        ((12, 4), (8, 6), (12, 6)),
        ((12, 6), (12, 0), (12, 8)),
        ((11, 8), (6, 1), None),
        ((13, 0), (3, 7), None),
    ],
    ids=str,
)
def test_the_wheel_suits_driver_and_card(
    runs: tuple[int, int], capability: tuple[int, int] | None, wheel: tuple[int, int] | None
) -> None:
    assert find_wheel(Driver("card", runs), capability) == wheel


def test_a_command_that_installs_torch_names_its_index_or_none() -> None:
    assert install_command("") == 'pip install --force-reinstall "torch>=2.10,<2.14"'
    cpu = 'pip install "torch>=2.10,<2.14" --index-url https://download.pytorch.org/whl/cpu'
    assert install_command("cpu", is_forced=False) == cpu


def test_the_facts_are_this_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "a-compiler")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.chdir(tmp_path)
    says = TorchSays(device="cpu")
    facts = gather(says)
    assert facts.says is says
    assert (facts.system, facts.processor) == (platform.system(), platform.machine())
    assert facts.python == platform.python_version()
    assert facts.build is not None
    assert facts.build.version == torch.__version__
    assert (facts.compiler, facts.compiler_asked, facts.visible_cards) == (None, "a-compiler", "3")
    assert facts.has_headers == (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    assert facts.free_disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert facts.torch_wants == tuple(importlib.metadata.requires("torch") or ())
    assert not facts.is_translated


def test_facts_are_gathered_without_importing_torch() -> None:
    code = (
        "import sys; import lowvram.hardware.doctor as c, lowvram.hardware.inspect as f; "
        "c.find_all(f.gather(f.TorchSays())); "
        "assert 'torch' not in sys.modules and 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize(
    "said, processor, expected", [("1\n", "x86_64", True), ("0\n", "x86_64", False), ("1\n", "arm64", False)]
)
def test_a_translated_python_is_known_by_the_system(
    monkeypatch: pytest.MonkeyPatch, said: str, processor: str, expected: bool
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "sysctl.proc_translated"
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(facts_module.subprocess, "run", run)
    monkeypatch.setattr(facts_module.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(facts_module.platform, "machine", lambda: processor)
    monkeypatch.setattr(facts_module.platform, "mac_ver", lambda: ("15.2", ("", "", ""), processor))
    facts = gather(TorchSays())
    assert (facts.is_translated, facts.system_version) == (expected, (15, 2))


def test_the_capability_is_torchs_where_both_know_it() -> None:
    card = NvidiaCard("card", (8, 6), 1, 1)
    assert Facts(TorchSays(capability=(9, 0)), card=card).capability == (9, 0)
    assert Facts(TorchSays(), card=card).capability == (8, 6)
    assert Facts(TorchSays()).capability is None


@pytest.mark.parametrize(
    "device, build, expected",
    [
        ("cuda", TorchBuild("2.13.0", (13, 0)), True),
        ("cuda", TorchBuild("2.13.0+rocm", None), False),
        ("cpu", TorchBuild("2.13.0", (13, 0)), False),
    ],
)
def test_cuda_is_a_card_that_a_torch_for_cuda_sees(device: str, build: TorchBuild, expected: bool) -> None:
    assert Facts(TorchSays(device=device), build=build).has_cuda == expected


def test_torch_says_what_it_computes_on_here() -> None:
    says = command.ask_torch()
    assert says.problem == says.card_problem == ""
    assert says.device == command.choose_device("auto").type
    assert says.has_metal == torch.backends.mps.is_built()


def test_torch_says_which_card_it_has_and_for_which_it_holds_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86", "sm_90"])
    says = command.ask_torch()
    assert (says.device, says.capability, says.architectures) == ("cuda", (8, 9), ("sm_86", "sm_90"))


def test_a_card_that_does_not_start_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    says = command.ask_torch()
    assert (says.device, says.card_problem, says.capability) == ("cuda", "CUDA error: unknown error", None)


def test_a_torch_that_does_not_import_is_said_and_not_raised(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", "raise OSError('c10.dll is missing\\nmore')")
    code = "from lowvram.cli.machine import ask_torch; print(ask_torch().problem)"
    paths = {"PYTHONPATH": f"{tmp_path}{':' if sys.platform != 'win32' else ';'}{environment()['PYTHONPATH']}"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(**paths), check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "c10.dll is missing"
