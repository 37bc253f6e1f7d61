"""What this machine has: every mismatch of torch and card has one exact command, and every machine a profile."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from lowvram.api import device as module
from lowvram.errors import MachineError
from lowvram.hardware.detect import (
    Driver,
    NvidiaCard,
    TorchBuild,
    describe_card,
    describe_machine,
    detect,
    explain_mismatch,
    find_card,
    find_driver,
    find_torch,
    machine_memory_bytes,
)
from lowvram.hardware.profile import load_profile
from tests.flows.typed import environment

CARD = "NVIDIA GeForce RTX 5070"
GIB = 2**30
CPU_BUILD = TorchBuild("2.12.0+cpu", None)


def index_of(sentence: str | None) -> str:
    found = re.search(r'pip install --force-reinstall "torch>=[^"]+" --index-url (\S+)$', sentence or "")
    assert found, sentence
    return found[1]


def test_without_a_driver_there_is_nothing_to_explain() -> None:
    assert explain_mismatch(None, CPU_BUILD) is None
    assert explain_mismatch(None, TorchBuild("2.13.0+cu130", (13, 0))) is None


def test_without_torch_there_is_nothing_to_explain() -> None:
    assert explain_mismatch(Driver(CARD, (13, 0)), None) is None


@pytest.mark.parametrize(
    "runs, build",
    [((13, 0), (13, 0)), ((13, 1), (12, 8)), ((12, 8), (12, 8)), ((12, 6), (12, 8)), ((14, 0), (13, 0))],
    ids=["equal", "newer driver", "equal 12", "newer minor version", "driver of the future"],
)
def test_a_driver_of_the_same_or_a_newer_major_version_is_well(runs: tuple[int, int], build: tuple[int, int]) -> None:
    assert explain_mismatch(Driver(CARD, runs), TorchBuild("2.13.0", build)) is None


@pytest.mark.parametrize(
    "runs, wheel",
    [((13, 0), "cu130"), ((13, 5), "cu130"), ((12, 9), "cu128"), ((12, 8), "cu128"), ((12, 7), "cu126"),
     ((12, 6), "cu126"), ((12, 4), "cu126")],
    ids=str,
)  # fmt: skip
def test_a_cpu_build_beside_a_card_is_answered_with_the_wheel_for_its_driver(runs: tuple[int, int], wheel: str) -> None:
    sentence = explain_mismatch(Driver(CARD, runs), CPU_BUILD)
    assert sentence is not None
    assert sentence.startswith(f"{CARD} is here, but torch 2.12.0+cpu is a CPU-only build")
    assert index_of(sentence) == f"https://download.pytorch.org/whl/{wheel}"


def test_a_torch_newer_than_the_driver_is_answered_with_both_ways_out() -> None:
    sentence = explain_mismatch(Driver(CARD, (12, 8)), TorchBuild("2.13.0+cu130", (13, 0)))
    assert sentence is not None
    assert "its driver runs CUDA 12.8 at most and torch 2.13.0+cu130 needs 13.0; update the driver, or type" in sentence
    assert index_of(sentence).endswith("/cu128")


@pytest.mark.parametrize("build", [CPU_BUILD, TorchBuild("2.13.0+cu130", (13, 0))], ids=["cpu", "cuda"])
def test_a_driver_too_old_for_any_wheel_must_be_updated_and_no_wheel_is_named(build: TorchBuild) -> None:
    sentence = explain_mismatch(Driver(CARD, (11, 8)), build)
    assert sentence is not None
    assert sentence.endswith("update the NVIDIA driver, since none of torch's builds runs on it")
    assert "pip" not in sentence
    assert sentence.count("update the") == 1


def test_the_version_file_says_what_torch_itself_says() -> None:
    found = find_torch()
    assert found is not None
    assert found.version == torch.__version__
    said = torch.version.cuda
    assert found.cuda == (tuple(map(int, said.split(".")[:2])) if said else None)


@pytest.mark.parametrize(
    "text, build",
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n", TorchBuild("2.13.0+cu130", (13, 0))),
        ("__version__ = '2.10.0'\ncuda = '12.8'\nhip = None\n", TorchBuild("2.10.0", (12, 8))),
        ("__version__ = '2.11.0+rocm7'\ncuda: Optional[str] = None\nhip = '7.1'\n", TorchBuild("2.11.0+rocm7", None)),
        ("", TorchBuild("unknown", None)),
    ],
    ids=["annotated", "bare", "rocm", "empty"],
)
def test_a_version_file_is_read_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, build: TorchBuild
) -> None:
    (tmp_path / "version.py").write_text(text, encoding="utf-8")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("lowvram.hardware.detect.importlib.util.find_spec", lambda _: spec)
    assert find_torch() == build


def test_torch_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.hardware.detect.importlib.util.find_spec", lambda _: None)
    assert find_torch() is None


class FakeNvml:
    """NVML of a machine with one card, or with a driver that does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, is_broken: bool = False, name: str | bytes = CARD, total: float = 12, free: float = 11) -> None:
        self.is_broken, self.name, self.open = is_broken, name, 0
        self.total, self.free = int(total * GIB), int(free * GIB)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        if self.is_broken:
            raise self.NVMLError
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, _: int) -> str | bytes:
        return self.name

    def nvmlDeviceGetCudaComputeCapability(self, _: int) -> list[int]:
        return [8, 9]

    def nvmlDeviceGetMemoryInfo(self, _: int) -> FakeNvml:
        if self.is_broken:
            raise self.NVMLError
        return self


@pytest.mark.parametrize("name", [CARD, CARD.encode()], ids=["text", "bytes"])
def test_the_drivers_newest_cuda_and_the_cards_name_are_read(
    monkeypatch: pytest.MonkeyPatch, name: str | bytes
) -> None:
    nvml = FakeNvml(name=name)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert find_driver() == Driver(CARD, (12, 8))
    assert nvml.open == 0


def test_a_driver_that_does_not_answer_is_none_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(is_broken=True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert find_driver() is None
    assert find_card() is None
    assert nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_driver() is None


def test_a_machine_is_described_by_processors_memory_and_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.hardware.detect.find_driver", lambda: Driver(CARD, (13, 0)))
    monkeypatch.setattr("lowvram.hardware.detect.machine_memory_bytes", lambda: 32 << 30)
    text = describe_machine()
    assert f"{psutil.cpu_count()} processors, 32.0 GiB, {CARD}" in text
    monkeypatch.setattr("lowvram.hardware.detect.find_driver", lambda: None)
    assert describe_machine().endswith("32.0 GiB")


def test_the_memory_is_the_systems() -> None:
    assert machine_memory_bytes() == psutil.virtual_memory().total


def test_the_machine_answers_without_importing_torch() -> None:
    calls = "m.find_torch(); m.describe_machine(); m.detect()"
    code = f"import lowvram.hardware.detect as m, sys; {calls}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_the_card_is_read_with_its_memory_now(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert find_card() == NvidiaCard(CARD, (8, 9), 12 * GIB, 11 * GIB)
    assert nvml.open == 0


@pytest.mark.parametrize(
    "name, total, profile, sentence",
    [
        (CARD, 11.94, "rtx5070", f"{CARD} with 11.9 GiB, 5.0 GiB of it free."),
        ("NVIDIA GeForce RTX 5060 Ti", 15.9, "rtx5060ti-16gb", "RTX 5060 Ti with 15.9 GiB, 5.0 GiB of it free."),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 8.0, "rtx4070-laptop", "GPU with 8.0 GiB, 5.0 GiB of it free."),
        ("NVIDIA GeForce RTX 3060", 8.0, "rtx3060-12gb", "with 8.0 GiB its speed may be another."),
    ],
    ids=["one size", "of two sizes", "laptop", "unknown size"],
)
def test_a_card_of_the_catalogue_is_recognised(
    monkeypatch: pytest.MonkeyPatch, name: str, total: float, profile: str, sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(name=name, total=total, free=5))
    found = detect()
    assert found.profile.id == profile
    assert found.free_bytes == 5 * GIB
    assert found.sentence.endswith(sentence)
    assert found.profile.limit_bytes(free_bytes=found.free_bytes) < 4.5 * GIB


def test_a_card_outside_the_catalogue_has_its_drivers_memory_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(name="NVIDIA GeForce RTX 4080 SUPER", total=16, free=15))
    profile, free_bytes, sentence = detect()
    assert (profile.name, profile.memory_bytes, free_bytes) == ("NVIDIA GeForce RTX 4080 SUPER", 16 * GIB, 15 * GIB)
    assert (profile.capability, profile.fp8, profile.tflops) == ((8, 9), "tensor", {})
    assert sentence.endswith("The catalogue does not know it, so its memory is known and its speed is not.")


def test_a_card_that_is_here_and_too_old_is_told_so_with_its_memory() -> None:
    found = describe_card(NvidiaCard("Tesla P100-PCIE-16GB", (6, 0), 16 * GIB, 15 * GIB))
    assert found.sentence.startswith("Tesla P100-PCIE-16GB with 16.0 GiB, 15.0 GiB of it free. It is too old")
    assert "on Kaggle and Colab the T4" in found.sentence


@pytest.fixture
def be_mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    def be(chip: str, ram_bytes: int) -> None:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            assert command[1:] == ["-n", "machdep.cpu.brand_string"]
            return subprocess.CompletedProcess(command, 0, f"{chip}\n", "")

        memory = type("Memory", (), {"total": ram_bytes, "available": GIB})
        monkeypatch.setitem(sys.modules, "pynvml", None)
        monkeypatch.setattr("lowvram.hardware.detect.platform.system", lambda: "Darwin")
        monkeypatch.setattr("lowvram.hardware.detect.platform.machine", lambda: "arm64")
        monkeypatch.setattr("lowvram.hardware.detect.psutil.virtual_memory", lambda: memory)
        monkeypatch.setattr("lowvram.hardware.detect.subprocess.run", run)

    return be


def test_an_apple_chip_is_recognised_with_the_memory_that_it_has(be_mac: Callable[[str, int], None]) -> None:
    be_mac("Apple M3 Max", 64 * GIB)
    profile, free_bytes, sentence = detect()
    assert profile == load_profile("m3-max").model_copy(update={"memory_bytes": 64 * GIB})
    assert free_bytes is None
    assert sentence == "Apple M3 Max with 64.0 GiB of unified memory."


def test_an_apple_chip_of_the_future_has_memory_and_no_speed(be_mac: Callable[[str, int], None]) -> None:
    be_mac("Apple M9 Ultra", 96 * GIB)
    profile, _, sentence = detect()
    assert (profile.id, profile.name, profile.platform) == ("generic", "Apple M9 Ultra", "mps")
    assert (profile.tflops, profile.bandwidth_bytes_per_s, profile.sources) == ({}, None, ())
    assert profile.limit_bytes() == load_profile("m1").limit_bytes(ram_bytes=96 * GIB)
    assert sentence.endswith("The catalogue does not know it, so its speed is not known.")


@pytest.mark.parametrize("system, processor", [("Linux", "x86_64"), ("Darwin", "x86_64"), ("Linux", "arm64")])
def test_without_a_gpu_the_processor_trains_in_this_machines_memory(
    monkeypatch: pytest.MonkeyPatch, system: str, processor: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("lowvram.hardware.detect.platform.system", lambda: system)
    monkeypatch.setattr("lowvram.hardware.detect.platform.machine", lambda: processor)
    profile, free_bytes, sentence = detect()
    assert (profile.id, profile.memory_bytes) == ("cpu", psutil.virtual_memory().total)
    assert free_bytes is not None
    assert 0 < free_bytes < profile.memory_bytes
    assert sentence.startswith("No GPU here that PyTorch can train on; the processor has ")


def no_accelerator(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, build: TorchBuild) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(module, "find_driver", lambda: driver)
    monkeypatch.setattr(module, "find_torch", lambda: build)


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused_with_a_way_on(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    no_accelerator(monkeypatch, None, CPU_BUILD)
    with pytest.raises(MachineError, match=rf"`device` is {asked}\. torch .* sees none here\. Leave `device` out"):
        module.choose_device(asked)


def test_a_card_that_torch_cannot_use_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerator(monkeypatch, Driver(CARD, (13, 0)), CPU_BUILD)
    with pytest.raises(MachineError, match=rf"{CARD} is here, but .*CPU-only build.*whl/cu130\. Leave"):
        module.choose_device("cuda")


def test_auto_takes_what_is_here_and_says_which_card_lies_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerator(monkeypatch, None, CPU_BUILD)
    assert module.choose_device("auto") == (torch.device("cpu"), ())
    no_accelerator(monkeypatch, Driver(CARD, (13, 0)), CPU_BUILD)
    device, (notice,) = module.choose_device("auto")
    assert device == torch.device("cpu")
    assert notice.text.startswith(f"Note: {CARD} is here")
    assert notice.level == "warning"
    assert module.choose_device("cpu") == (torch.device("cpu"), ()), "who asks for the processor needs no note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert module.choose_device("auto").device == torch.device("cuda", 0), "with its number, which some calls insist on"
