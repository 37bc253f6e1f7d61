"""Our model behind lm-evaluation-harness, offline: the same accuracies on the same pairs, and its other questions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.minimal_pairs import answer_pairs, read_pairs
from tests.evaluate.scored import finish, nats_by_hand, scorer_of, write

pytestmark = pytest.mark.nightly
pytest.importorskip("lm_eval", reason="lm_eval (extra eval) is not installed")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
from lowvram.evaluate.harness import HarnessModel, run_harness  # noqa: E402

DATA = Path(__file__).parents[3] / "shared/data/eval/turblimp.jsonl.gz"
TASK = """\
task: pairs_here
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: ""
target_delimiter: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


@pytest.fixture
def pairs(tmp_path: Path, turkish: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf/datasets"))
    sentences = [{"sentence_good": text, "sentence_bad": text.replace("l", "r", 1) + "."} for text in turkish]
    if DATA.exists():
        found = read_pairs(DATA)[::100]
        sentences += [{"sentence_good": p.good, "sentence_bad": p.bad} for p in found if p.good != p.bad]
    return write(tmp_path / "pairs.jsonl", *map(json.dumps, sentences))


def test_native_and_harness_accuracies_are_equal_on_the_same_pairs(
    pairs: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    scorer = scorer_of(small_tokenizer)
    task = tmp_path / "pairs.yaml"
    task.write_text(TASK.format(file=pairs), encoding="utf-8")
    native = finish(answer_pairs(scorer, read_pairs(pairs)))
    rows = {row.metric: row for row in run_harness(scorer, [str(task)])}
    assert rows["acc"].value == sum(native.by_sum) / len(native.by_sum)
    assert rows["acc_bytes"].value == sum(native.per_byte) / len(native.per_byte)
    assert rows["acc"].task == "pairs_here"
    assert rows["acc"].error is not None
    assert 0 < rows["acc"].value < 1


def test_a_task_that_is_not_there_is_told(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"cannot load turblimp_x\. KeyError: .*lm-eval ls tasks"):
        run_harness(scorer_of(small_tokenizer), ["turblimp_x"])


def test_rolling_scores_every_token_once_with_what_fits_before_it(small_tokenizer: Tokenizer) -> None:
    text = "Kış geldiğinde köyün yolları kapanır, haberler radyodan dinlenirdi."
    model = HarnessModel(scorer_of(small_tokenizer))
    whole = model.loglikelihood_rolling([SimpleNamespace(args=(text,)), SimpleNamespace(args=("",))])  # type: ignore[list-item]
    scorer = scorer_of(small_tokenizer)
    assert whole[0] == pytest.approx(-nats_by_hand(scorer, text), abs=1e-3)
    assert whole[1] == 0
    short = scorer_of(small_tokenizer, max_context=7)
    ids = [small_tokenizer.bos_id, *small_tokenizer.encode(text)]
    expected = 0.0
    for start in range(1, len(ids), 7):
        chunk = ids[start : start + 7]
        window = ids[max(0, start + len(chunk) - 8) : start + len(chunk)]
        found = finish(
            scorer.score(
                [scorer.encode("", "")._replace(context=tuple(window[: -len(chunk)]), continuation=tuple(chunk))]
            )
        )
        expected -= found[0].nats
    got = HarnessModel(short).loglikelihood_rolling([SimpleNamespace(args=(text,))])  # type: ignore[list-item]
    assert got[0] == pytest.approx(expected, abs=1e-3)


def test_greedy_texts_end_before_the_first_end_and_are_their_own_greedy_continuation(
    small_tokenizer: Tokenizer,
) -> None:
    model = HarnessModel(scorer_of(small_tokenizer))
    free, cut = model.generate_until(
        [
            SimpleNamespace(args=("Kış", {"max_gen_toks": 12, "until": []})),  # type: ignore[list-item]
            SimpleNamespace(args=("Kış", {"max_gen_toks": 12, "until": ["\x00nothing"]})),  # type: ignore[list-item]
        ]
    )
    assert free == cut
    assert free
    middle = free[len(free) // 2]
    ended = model.generate_until([SimpleNamespace(args=("Kış", {"max_gen_toks": 12, "until": [middle]}))])  # type: ignore[list-item]
    assert ended[0] == free[: free.index(middle)]
    long = SimpleNamespace(args=("Kış " * 400, {"max_gen_toks": 4}))
    assert isinstance(model.generate_until([long])[0], str)  # type: ignore[list-item]
