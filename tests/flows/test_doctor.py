"""`lowvram doctor` as it is typed: the machine, a row for each op, what to mend; the same when a run starts."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import OPS, Card, card_of, choose, choose_attention, override_card
from rich.console import Console

from lowvram.api import device as module
from lowvram.cli import console as show
from lowvram.cli.doctor import choose_all
from lowvram.errors import MachineError
from lowvram.fit.rehearse import imagine
from lowvram.hardware.detect import Driver, NvidiaCard, TorchBuild, TritonBuild
from lowvram.hardware.inspect import Facts, TorchSays
from lowvram.hardware.profile import load_profile, profile_names
from tests.flows.typed import environment, typed

GIB = 2**30
CARD = "NVIDIA GeForce RTX 5070"
ROWS = ["attention", "masked_attention", *OPS]
# A card beside which Triton is missing and other programs are at work.
CUDA = Facts(
    TorchSays(device="cuda", capability=(12, 0), architectures=("sm_120",)),
    driver=Driver(CARD, (13, 0)),
    card=NvidiaCard(CARD, (12, 0), 12 * GIB, 11 * GIB),
    build=TorchBuild("2.13.0+cu130", (13, 0)),
)


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], None]:
    """Be a machine of which these are the facts; ops are still looked up for what torch has here."""

    def become(facts: Facts) -> None:
        monkeypatch.setattr("lowvram.api.device.ask_torch", lambda: facts.says)
        monkeypatch.setattr("lowvram.hardware.inspect.gather", lambda _: facts)

    return become


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    """Let what is said once be said in each test."""
    module._find_launch_notices.cache_clear()
    yield
    module._find_launch_notices.cache_clear()


def rows(text: str) -> dict[str, list[str]]:
    """The table's rows by op, cells split where there are two spaces."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:] for line in cells if line[0] in ROWS}


def values(*words: str, code: int = 0) -> dict[str, Any]:
    answer = typed("doctor", *words, "--json")
    assert answer.code == code, answer.err
    assert answer.out.count("\n") == 1
    return json.loads(answer.out)


def test_this_machine_is_told_with_every_op_and_may_train() -> None:
    answer = typed("doctor")
    assert (answer.code, answer.err) == (0, "")
    for name in ("system", "processor", "memory", "disk", "card", "Python", "torch", "Triton", "bitsandbytes"):
        assert re.search(rf"^{name} +\S", answer.out, re.MULTILINE), name
    assert re.search(rf"^torch +{re.escape(torch.__version__)}", answer.out, re.MULTILINE)
    card = card_of(module.choose_device("auto").device)
    found = rows(answer.out)
    assert list(found) == ROWS
    for op in OPS:
        assert found[op][:2] == [choose(op, card).backend, choose(op, card).reason]
    assert found["attention"][0] == choose_attention(card, torch.bfloat16, is_masked=False).backend


def test_the_json_has_exactly_these_keys() -> None:
    found = values()
    kinds = {key: type(value) for key, value in found.items()}
    assert kinds == {
        "gpu": type(None), "device": str, "machine": dict, "ops": list, "findings": list, "can_train": bool,
    }  # fmt: skip
    assert list(found["machine"]) == [
        "system", "processor", "memory_bytes", "free_memory_bytes", "free_disk_bytes", "card", "driver_cuda", "python",
        "torch", "torch_cuda", "triton", "bitsandbytes",
    ]  # fmt: skip
    assert [list(row) for row in found["ops"]] == [["op", "backend", "reason", "remedy"]] * len(ROWS)
    assert [row["op"] for row in found["ops"]] == ROWS
    assert found["can_train"]


def test_the_json_of_a_card_and_of_findings_has_exactly_these_keys(be: Callable[[Facts], None]) -> None:
    be(CUDA)
    with override_card(Card("cuda", (12, 0), has_triton=False)):
        found = values()
    assert found["machine"]["card"] == {
        "name": CARD, "capability": [12, 0], "total_bytes": 12 * GIB, "free_bytes": 11 * GIB,
    }  # fmt: skip
    assert (found["machine"]["driver_cuda"], found["machine"]["torch_cuda"]) == ([13, 0], [13, 0])
    assert found["findings"] == [
        {
            "value": "Triton is not installed",
            "consequence": "plain PyTorch computes, slower",
            "command": 'pip install "triton>=3.5,<3.8"',
            "is_fatal": False,
        }
    ]
    assert found["can_train"]


def test_a_slower_machine_ends_with_0_and_shows_what_would_change_each_op(be: Callable[[Facts], None]) -> None:
    be(CUDA)
    with override_card(Card("cuda", (12, 0), has_triton=False)):
        answer = typed("doctor")
    assert answer.code == 0
    row = "reference", "Triton is not installed, so plain PyTorch computes, slower", "pip install"
    assert rows(answer.out)["adamw8"][0:2] == list(row[:2])
    assert rows(answer.out)["adamw8"][2].startswith(row[2])
    assert re.search(rf"^card +{CARD}, capability 12\.0, 12\.0 GiB, 11\.0 GiB of it free$", answer.out, re.MULTILINE)
    assert re.search(r"^driver +runs CUDA 13\.0 and older$", answer.out, re.MULTILINE)
    assert re.search(r"^torch +2\.13\.0\+cu130, built for CUDA 13\.0$", answer.out, re.MULTILINE)
    ending = (
        "\nNote: Triton is not installed\n  what follows  plain PyTorch computes, slower\n"
        '  to repair it  pip install "triton>=3.5,<3.8"\n\nTraining works here.\n'
        "Next: lowvram fit  (which models fit this machine)\n"
    )
    assert answer.out.endswith(ending)


def test_a_machine_that_cannot_train_ends_with_1_and_says_why(be: Callable[[Facts], None]) -> None:
    be(Facts(CUDA.says, card=CUDA.card, driver=CUDA.driver, build=CUDA.build, triton=TritonBuild("3.7.1")))
    with override_card(Card("cuda", (12, 0))):
        answer, found = typed("doctor"), values(code=1)
    assert answer.code == 1
    assert "Fatal: there is no C compiler\n" in answer.out
    assert "  to repair it  sudo apt install gcc\n" in answer.out
    assert answer.out.endswith("Training would fail here. Repair what is fatal, then type `lowvram doctor` again.\n")
    assert not found["can_train"]


@pytest.mark.parametrize(
    "says", [TorchSays("No module named 'torch'"), CUDA.says._replace(card_problem="CUDA error", capability=None)]
)
def test_where_no_op_could_be_computed_there_is_no_table(be: Callable[[Facts], None], says: TorchSays) -> None:
    be(Facts(says))
    answer, found = typed("doctor"), values(code=1)
    assert (answer.code, rows(answer.out)) == (1, {})
    assert "\n\n\n" not in answer.out
    assert (found["ops"], found["device"]) == ([], None if says.problem else "cuda")
    assert re.search("^torch +not installed$", answer.out, re.MULTILINE)


@pytest.mark.parametrize("torch_text", [None, "raise OSError('c10.dll is missing')"], ids=["missing", "broken"])
def test_without_a_working_torch_the_doctor_still_answers(tmp_path: Path, torch_text: str | None) -> None:
    (tmp_path / "torch").mkdir()
    if torch_text is not None:
        (tmp_path / "torch/__init__.py").write_text(torch_text, encoding="utf-8")
        (tmp_path / "torch/version.py").write_text("__version__ = '2.13.0'\ncuda = None\n", encoding="utf-8")
    hide = "import importlib.util, sys; find = importlib.util.find_spec; sys.modules['torch'] = None\n"
    hide += "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    code = (hide if torch_text is None else "") + "from lowvram.cli.app import main; raise SystemExit(main(['doctor']))"
    paths = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=paths), capture_output=True, encoding="utf-8"
    )
    assert (found.returncode, found.stderr) == (1, "")
    what = "torch is not installed" if torch_text is None else "torch 2.13.0 does not import (c10.dll is missing)"
    assert f"Fatal: {what}\n" in found.stdout
    assert "Training would fail here." in found.stdout


@pytest.mark.parametrize("name", profile_names())
def test_the_table_on_paper_is_the_cards_own(name: str) -> None:
    profile = load_profile(name)
    own = Card(profile.platform, profile.capability, multiprocessors=profile.multiprocessors or 48)
    assert choose_all(imagine(profile)) == choose_all(own)


def test_another_card_is_shown_on_paper_and_nothing_of_this_machine() -> None:
    answer = typed("doctor", "--gpu", "RTX 2060", "--json")
    assert answer.err.startswith("GeForce RTX 2060 6GB.")
    found = json.loads(answer.out)
    assert (found["gpu"], found["device"], found["machine"], found["findings"]) == ("rtx2060-6gb", "cuda", None, [])
    backends = {row["op"]: row["backend"] for row in found["ops"]}
    assert (backends["attention"], backends["fp8_matmul"], backends["adamw8"]) == ("efficient", "decode", "triton")
    table = typed("doctor", "--gpu", "rtx5070")
    assert (table.code, rows(table.out)["fp8_matmul"][0]) == (0, "mxfp8")
    assert "torch  " not in table.out
    assert rows(typed("doctor", "--gpu", "m3-max").out)["attention"][0] == "math"


def test_a_card_that_nobody_knows_is_answered_with_the_nearest() -> None:
    answer = typed("doctor", "--gpu", "rtx5071")
    assert (answer.code, answer.out) == (1, "")
    assert "Did you mean rtx5070" in answer.err
    assert typed("doctor", "--cpu").code == 2


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_narrow_window_folds_the_table_and_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, be: Callable[[Facts], None], width: int
) -> None:
    screen = io.StringIO()
    window = Console(file=screen, width=width, force_terminal=True, color_system=None, soft_wrap=True, highlight=False)
    monkeypatch.setattr(show, "out", window)
    be(CUDA)
    with override_card(Card("cuda", (12, 0), has_triton=False)):
        assert typed("doctor").code == 0
    whole = screen.getvalue()
    table = whole.split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= width
    assert list(rows(whole)) == ROWS
    assert {row[0] for op, row in rows(whole).items() if op in OPS} == {"reference"}
    words = set(re.findall(r"\w+", table))
    assert set(re.findall(r"\w+", "Triton is not installed, so plain PyTorch computes, slower")) <= words
    assert '  to repair it  pip install "triton>=3.5,<3.8"\n' in whole


def test_a_card_that_is_too_old_for_torch_ends_a_run_before_its_first_launch(
    monkeypatch: pytest.MonkeyPatch, be: Callable[[Facts], None]
) -> None:
    name = "Tesla P100-PCIE-16GB"
    says = TorchSays(device="cuda", capability=(6, 0), architectures=("sm_75", "sm_80", "sm_120"))
    driver, card = Driver(name, (12, 8)), NvidiaCard(name, (6, 0), 16 * GIB, 15 * GIB)
    build = TorchBuild("2.13.0+cu129", (12, 9))
    be(Facts(says, driver=driver, card=card, build=build, triton=TritonBuild("3.7.1"), compiler="gcc"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "find_driver", lambda: driver)
    monkeypatch.setattr(module, "find_card", lambda: card)
    monkeypatch.setattr(module, "find_torch", lambda: build)
    with pytest.raises(MachineError) as caught:
        module.choose_device("auto")
    assert caught.value.what == "This card has capability 6.0."
    assert "too old for Triton, and torch 2.13.0+cu129 has no code for it" in caught.value.why
    assert "on Kaggle and Colab the T4" in caught.value.why
    assert "/cu126" in caught.value.fix
    assert '`device="cpu"`' in caught.value.fix
    assert module.choose_device("cpu") == (torch.device("cpu"), ())


def test_a_missing_triton_is_one_sentence_when_a_card_is_opened(
    monkeypatch: pytest.MonkeyPatch, be: Callable[[Facts], None]
) -> None:
    be(CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "find_driver", lambda: CUDA.driver)
    monkeypatch.setattr(module, "find_torch", lambda: CUDA.build)
    device, (notice,) = module.choose_device("auto")
    assert device == torch.device("cuda", 0)
    sentence = (
        'Note: Triton is not installed: plain PyTorch computes, slower; to repair it: pip install "triton>=3.5,<3.8".'
    )
    assert (notice.text, notice.level) == (sentence, "warning")
    assert module.choose_device("cuda") == (torch.device("cuda", 0), ()), "once is enough"
    assert module.choose_device("cpu") == (torch.device("cpu"), ())


def test_without_triton_every_op_has_a_path_on_a_card() -> None:
    found = choose_all(Card("cuda", (12, 0), has_triton=False))
    assert {found[op].backend for op in OPS} == {"reference"}
    assert found["attention"].backend == "flash"


def test_the_help_of_the_doctor_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib; from lowvram.cli.app import main\n"
        "with contextlib.suppress(SystemExit): main(['doctor', '--help'])\n"
        "print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment())
    assert "Nothing is trained" in found.stdout
    assert not {"torch", "triton", "rich", "psutil", "pydantic"} & set(found.stdout.splitlines()[-1].split())
