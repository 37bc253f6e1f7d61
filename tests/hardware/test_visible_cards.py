"""Of several NVIDIA cards the one that CUDA calls its first is found and named; hidden cards are none."""

from __future__ import annotations

import sys

import pytest
import torch

import lowvram.cli.machine as command
from lowvram.hardware.detect import describe_machine, detect, find_card, find_driver
from tests.hardware.test_detect import CPU_BUILD, FakeNvml


class SeveralCards(FakeNvml):
    """A slow card in the first slot, a fast one in the second, nothing in the others; or no card at all."""

    names = ("NVIDIA GeForce GT 1030", "NVIDIA GeForce RTX 3060")
    uuids: tuple[str | bytes, ...] = ("GPU-10aa", b"GPU-30bb")

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.count = count

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= self.count:
            raise self.NVMLError
        return index

    def nvmlDeviceGetName(self, index: int) -> str:
        return self.names[index]

    def nvmlDeviceGetUUID(self, index: int) -> str | bytes:
        return self.uuids[index]

    def nvmlDeviceGetCudaComputeCapability(self, index: int) -> list[int]:
        return [(6, 1), (8, 6)][index]


def be_visible(monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None = None) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "visible, order, expected",
    [
        (None, None, 1),
        ("0", None, 1),
        ("1", None, 0),
        (" 1 , 0", None, 0),
        (None, "PCI_BUS_ID", 0),
        ("1", "PCI_BUS_ID", 1),
        (None, "FASTEST_FIRST", 1),
        ("GPU-10aa", None, 0),
        ("GPU-3", None, 1),
        ("GPU-30bb,GPU-10aa", "PCI_BUS_ID", 1),
        ("0,-1,1", None, 1),
        ("0,7", None, 1),
        ("MIG-3f", None, 1),
        ("", None, None),
        (" ", None, None),
        ("-1", None, None),
        ("-1,0", None, None),
        ("2", None, None),
        ("200,0", None, None),
        ("GPU-", None, None),
        ("GPU-99", None, None),
        ("NoDevFiles", None, None),
        ("1,1", None, None),
        ("GPU-3,0", None, None),
    ],
    ids=str,
)
def test_the_card_is_the_one_that_cuda_calls_its_first_and_no_other_is_named(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, expected: int | None
) -> None:
    be_visible(monkeypatch, visible, order)
    monkeypatch.setitem(sys.modules, "pynvml", SeveralCards())
    card, driver = find_card(), find_driver()
    assert driver is not None
    if expected is None:
        assert card is None
        assert driver.card == SeveralCards.names[1], "it is here, and a run would use it"
        assert detect().profile.id == "cpu"
    else:
        assert card is not None
        assert card.name == driver.card == SeveralCards.names[expected]
        assert card.capability == ((6, 1), (8, 6))[expected]


@pytest.mark.parametrize("visible", [None, "", "0", "GPU-3", "MIG-3f"])
def test_a_driver_without_a_card_is_a_machine_without_one(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    be_visible(monkeypatch, visible)
    monkeypatch.setitem(sys.modules, "pynvml", SeveralCards(count=0))
    assert (find_driver(), find_card()) == (None, None)
    assert detect().profile.id == "cpu"
    assert describe_machine().endswith("GiB")


def test_the_note_of_an_idle_card_names_the_one_that_a_run_would_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_visible(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "pynvml", SeveralCards())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(command, "find_torch", lambda: CPU_BUILD)
    assert command.choose_device("auto") == torch.device("cpu")
    assert "NVIDIA GeForce RTX 3060 is here, but torch" in " ".join(capsys.readouterr().err.split())


class CardsOfUnknownMemory(SeveralCards):
    """NVML answers "not supported" where a card shares the computer's memory."""

    def nvmlDeviceGetMemoryInfo(self, index: int) -> SeveralCards:
        raise self.NVMLError


def test_cards_whose_memory_is_not_known_are_ranked_by_their_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    be_visible(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "pynvml", CardsOfUnknownMemory())
    driver = find_driver()
    assert driver is not None
    assert driver.card == SeveralCards.names[1]
    assert driver.cuda == (12, 8)
    assert find_card() is None, "what fits on it cannot be said"
