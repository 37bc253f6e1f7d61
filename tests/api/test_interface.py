"""The public interface as a whole: what it exports, what importing it costs, and the example of its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowvram
import lowvram.api
from lowvram.api.progress import with_bar, with_step_bar
from lowvram.api.tasks import Notice, Progress, Task, count_progress, finish
from lowvram.cli.tasks import run_task
from tests.flows.typed import environment
from tests.tiny import write_texts

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in lowvram.api.__all__:
        found = getattr(lowvram.api, name)
        assert found.__doc__ or name == "Event", name
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        lowvram.api.fti  # noqa: B018
    assert (Path(lowvram.__file__).parent / "py.typed").is_file()


def test_importing_it_costs_nothing() -> None:
    heavy = {"torch", "numpy", "pydantic", "rich", "tokenizers"}
    script = f"import sys, lowvram.api; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment(), check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    run = names["run"]
    assert isinstance(run, lowvram.api.TrainingRun)
    assert run.trainer.state.step == 4
    assert (tmp_path / "model-hf/config.json").is_file()
    exec("\n".join(blocks), names)
    run = names["run"]
    assert isinstance(run, lowvram.api.TrainingRun)
    assert run.trainer.state.step == 6, "run again, the script goes on"


def work() -> Task[int]:
    """A task that gives one notice of each level and some progress."""
    yield Notice("one", "detail")
    yield Progress("Counting")
    parts = count_progress(((n, 3) for n in (1, 2, 3)), "Counting")  # type: ignore[arg-type]
    yield from parts
    yield Notice("two", "warning")
    return 7


def test_a_task_gives_its_result_and_its_notices(capsys: pytest.CaptureFixture[str]) -> None:
    notices = (Notice("one", "detail"), Notice("two", "warning"))
    assert finish(work()) == (7, notices)
    assert finish(with_bar(work())) == (7, notices)
    assert capsys.readouterr() == ("", ""), "no bar where no terminal is"
    assert run_task(work()) == 7
    assert capsys.readouterr() == ("", "one\ntwo\n")


def test_an_error_of_a_task_comes_through_whatever_shows_it() -> None:
    def fail() -> Task[None]:
        yield Progress("Failing")
        raise lowvram.api.LowvramError("what")

    for show in (finish, run_task, lambda task: finish(with_bar(task))):
        with pytest.raises(lowvram.api.LowvramError, match="what"):
            show(fail())


def test_a_bar_of_steps_passes_every_event_on_and_closes_the_run_that_it_shows() -> None:
    closed: list[bool] = []

    def events() -> Task[None]:
        try:
            yield Notice("one")
            yield Notice("two")
        finally:
            closed.append(True)

    assert list(with_step_bar(events(), 2)) == [Notice("one"), Notice("two")]  # type: ignore[arg-type]
    shown = with_step_bar(events(), 2)  # type: ignore[arg-type]
    assert next(shown) == Notice("one")
    shown.close()
    assert closed == [True, True]
