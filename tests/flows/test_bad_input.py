"""Bad input gets one clear paragraph, and what existed before is not harmed."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.storage.checkpoint import open_checkpoint
from tests.conftest import TURKISH
from tests.flows.typed import RUN_FILE, Output, fill_home, typed

LATIN = "Şükrü Bey'in dükkânı".encode("windows-1254")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with two checkpoints, and every kind of file that is not what it should be."""
    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    assert typed("train", place / "run.toml", "--set", "save_every_minutes=1e-9", "--device", "cpu").code == 0
    bad = place / "bad"
    (bad / "nothing").mkdir(parents=True)
    (bad / "nothing/notes.pdf").write_bytes(b"%PDF-1.7")
    (bad / "mixed").mkdir()
    (bad / "mixed/a.txt").write_text(TURKISH[0], encoding="utf-8")
    (bad / "mixed/b.txt").write_bytes(b"Bir g\xfcn\n")
    (bad / "empty.txt").write_bytes(b"")
    (bad / "blank.txt").write_bytes(b" \n\n\t\n")
    (bad / "latin.txt").write_bytes(LATIN)
    (bad / "binary.txt").write_bytes(b"\x7fELF\x02\x01\x01\x00" * 9)
    (bad / "torn.txt.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    (bad / "rows.jsonl").write_text('{"body": "Bir gün"}\n', encoding="utf-8")
    (bad / "a-file").write_bytes(b"precious")
    (bad / "torn.toml").write_text("[model", encoding="utf-8")
    (bad / "latin.toml").write_bytes(b'[run]\ndir = "\xfc"\n')
    assert typed("tokenizer", "train", place / "train.txt", "--vocab", 333, "--out", place / "tok2").code == 0
    return place


def seen(place: Path) -> dict[str, str]:
    """The content of every file below a folder, but for the signs that a process leaves while it runs."""
    files = [
        path
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name not in ("lock", "plan.json", "status.json")
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expect_error(answer: Output, message: str, code: int = 1) -> None:
    """One paragraph that begins with "Error: ", after which nothing comes; and no result."""
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    paragraphs = [line for line in answer.err.splitlines() if line.startswith("Error: ")]
    assert len(paragraphs) == 1, answer.err
    assert answer.err.endswith(f"{paragraphs[0]}\n")
    assert re.search(message, paragraphs[0]), paragraphs[0]


TEXTS = {
    "missing": ("bad/nowhere.txt", r"nowhere\.txt does not exist\. .*Name a file or a folder that exists"),
    "empty": ("bad/empty.txt", r"empty\.txt holds no document\. It is empty"),
    "blank": ("bad/blank.txt", r"blank\.txt holds no document"),
    "not UTF-8": ("bad/latin.txt", r"latin\.txt:1 is not UTF-8: byte 0 is 0xde.*--on-bad.*iconv -f WINDOWS-1254"),
    "binary": ("bad/binary.txt", r"binary\.txt:1 is not text: byte 7 is NUL"),
    "no text inside": ("bad/nothing", r"nothing holds no text files\. 1 file .*\(1 \.pdf\)\. lowvram reads \.txt, "),
    "one bad file inside": ("bad/mixed", r"mixed.b\.txt:1 is not UTF-8: byte 5 is 0xfc"),
    "unknown ending": ("bad/a-file", r"a-file has an unknown ending"),
    "torn archive": ("bad/torn.txt.gz", r"torn\.txt\.gz cannot be read to its end"),
    "another field": ("bad/rows.jsonl", r"rows\.jsonl:1 has no field 'text'\. Fields there: body"),
}


@pytest.mark.parametrize("command", ["tokenizer train", "data pack"])
@pytest.mark.parametrize("path, message", TEXTS.values(), ids=TEXTS)
def test_text_that_cannot_be_read_is_named_and_the_old_output_stays(
    home: Path, command: str, path: str, message: str
) -> None:
    before = seen(home)
    if command == "tokenizer train":
        answer = typed("tokenizer", "train", home / path, "--out", home / "tok")
    else:
        answer = typed("data", "pack", home / path, "--tokenizer", home / "tok", "--out", home / "shards/train")
    expect_error(answer, message)
    assert seen(home) == before


COMMANDS = {
    "vocabulary below the alphabet": (
        "tokenizer train {home}/train.txt --vocab 287 --out {home}/tok",
        r"A vocabulary of 287 is too small\. 32 special ids and 256 bytes need 288\. Try",
    ),
    "shards of another tokenizer to pack over": (
        "data pack {home}/valid.txt --tokenizer {home}/tok2 --out {home}/shards/train",
        r"holds shards of another tokenizer\. They were made with tokenizer \w{12}…, not with \w{12}…",
    ),
    "shards of another tokenizer to train on": (
        "train {home}/run.toml --set tokenizer={home}/tok2 --set run.dir={home}/other",
        r"shards/train holds shards of another tokenizer\. .*Name the tokenizer that they were packed with",
    ),
    "no tokenizer there": (
        "data pack {home}/train.txt --tokenizer {home}/nowhere --out {home}/shards/train",
        r"There is no tokenizer in \S+nowhere\. .*lowvram tokenizer train",
    ),
    "a file where shards should go": (
        "data pack {home}/train.txt --tokenizer {home}/tok --out {home}/bad/a-file",
        r"a-file is no folder\. Shards need one of their own",
    ),
    "a file where a tokenizer should go": (
        "tokenizer train {home}/train.txt --vocab 300 --out {home}/bad/a-file",
        r"a-file could not be read or written\. The system says: File exists\. Repair that",
    ),
    "a file where a run should go": (
        "train {home}/run.toml --set run.dir={home}/bad/a-file",
        r"a-file could not be read or written\. The system says: File exists\.",
    ),
    "a file where the demo should go": (
        "demo --dir {home}/bad/a-file",
        r"a-file could not be read or written\. The system says: Not a directory\.",
    ),
    "a demo in a full folder": ("demo --dir {home}/shards", r"shards is not empty\. .*nothing is deleted\. Name"),
    "no run file": ("train {home}/nowhere.toml", r"There is no run file \S+nowhere\.toml\."),
    "a folder as run file": ("train {home}/run", r"run is a directory\. A run is described by a TOML file"),
    "torn run file": ("train {home}/bad/torn.toml", r"torn\.toml is not TOML: .*\(at .*\)"),
    "run file not UTF-8": ("train {home}/bad/latin.toml", r"is not TOML: 'utf-8' codec can't decode byte 0xfc"),
    "binary run file": ("train {home}/bad/binary.txt", r"binary\.txt is not TOML"),
    "unknown key set": ("train {home}/run.toml --set optimizer.rl=1", r"no key train\.optimizer\.rl\. Did you mean lr"),
    "unknown section set": ("train {home}/run.toml --set toknes=1", r"there is no key toknes\. Did you mean tokens"),
    "a section set to a value": ("train {home}/run.toml --set train=5", r"train is 5, not a table\. Write .*\[train\]"),
    "unknown preset": (
        "train {home}/run.toml --set model.preset=tr-60",
        r"model\.preset is \"tr-60\"; there is no such preset\. Did you mean tr-60m",
    ),
    "value out of range": ("train {home}/run.toml --set dropout=1.5", r"train\.dropout is 1\.5; it takes .* below 1"),
    "a changed recipe": (
        "train {home}/run.toml --set optimizer.lr=0.5",
        r"optimizer\.lr was 0\.001 and is now 0\.5\. Put that back to go on",
    ),
    "a changed model": ("train {home}/run.toml --set layers=3", r"model\.layers was 2 and is now 3"),
    "a micro-batch that does not divide": ("train {home}/run.toml --micro-batch 3", r"Possible: 1, 2, 4, 8\."),
    "a sample prompt too long": (
        "train {home}/run.toml --set prompts=['" + "uzun_" * 40 + "']",
        r"A prompt in run\.prompts has \d+ tokens\. train\.seq_len is 32",
    ),
    "weights of nothing": (
        "train {home}/run.toml --set start_from={home}/nowhere --set run.dir={home}/fresh",
        r"There is no directory \S+nowhere",
    ),
    "no run to evaluate": ("evaluate {home}/nowhere", r"There is no directory \S+nowhere\. Name a run directory"),
    "a folder without checkpoint": ("evaluate {home}/shards", r"checkpoint in \S+shards\. It holds packed text"),
    "no shards to measure on": ("evaluate {home}/run --data {home}/bad", r"bad holds text .*: lowvram data pack "),
    "a prompt longer than the context": (
        "chat {home}/run --prompt " + "çok_uzun_" * 30,
        r"The text has \d{3} tokens, \d{3} too many\. The context holds 32, .*its newest part alone be read: --newest",
    ),
    "a temperature below zero": ("chat {home}/run --prompt a --temperature -1", r"--temperature is -1\.0; it takes 0"),
    "a share above one": ("chat {home}/run --prompt a --top-p 3", r"--top-p is 3\.0; it takes 1 or less"),
    "no run to talk to": ("chat {home}/nowhere --prompt a", r"There is no directory"),
}


@pytest.mark.parametrize("command, message", COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_cannot_be_meant_is_answered_and_harms_nothing(home: Path, command: str, message: str) -> None:
    before = seen(home)
    expect_error(typed(*command.format(home=home).split()), message)
    after = seen(home)
    assert {path: after.get(path) for path in before} == before
    assert not list((home / "fresh").glob("step-*"))


MOE = "model.ffn={kind='moe',hidden=64,experts=4,top_k=2,expert_hidden=32}"
RECIPES = {
    "turns without experts": (
        ("rotation={window=1}",),
        r"train\.rotation rotates experts; ffn\.kind is \"swiglu\", which has none\. Leave train\.rotation out",
    ),
    "a window of all experts": (
        (MOE, "rotation={window=4,interval=1}"),
        r"rotation\.window is 4; a layer has 4 experts, and some must wait for their turn\. Try 1\.",
    ),
    "an interval too long for everybody's turn": (
        (MOE, "rotation={window=1,interval=2}"),
        r"rotation\.interval is 2; the run has 6 steps, in which 4 turns must end, or some .* never learn\. Try 1\.",
    ),
    "more turns than steps": (
        (MOE, "rotation={window=1,interval=1}", "tokens=512"),
        r"rotation\.interval is 1; the run has 2 steps, in which 4 turns must end, .* learn\. Train on more tokens\.",
    ),
    "experts that blocks of 8 bits cut": (
        (MOE.replace("=32", "=20"), "rotation={window=1,interval=1}", "optimizer.bits=8"),
        r"optimizer\.bits is 8; experts that rotate have dim · expert_hidden = 640, which .* 256 .*\. Try bits = 32\.",
    ),
    "experts that Muon's blocks cut": (
        (MOE.replace("=32", "=20"), "rotation={window=1,interval=1}", "optimizer={name='muon'}"),
        r"optimizer\.bits is 8; .* = 640, which .* 256 .*\. Try bits = 16\.",
    ),
    "copies of another kind": (
        (MOE, "rotation={window=1,interval=1,idle='int4'}"),
        r"train\.rotation\.idle is 'int4'; it takes 'bf16', 'int8' or 'e4m3'\.",
    ),
    "a window of nobody": ((MOE, "rotation={window=0}"), r"train\.rotation\.window is 0; it takes a number above 0"),
    "turns without a window": ((MOE, "rotation={interval=1}"), r"train\.rotation\.window is missing"),
    "no such optimizer": (
        ("optimizer.name=lion",),
        r"train\.optimizer\.name is 'lion'; there are 'adamw', 'muon'\.",
    ),
    "Muon in 32 bits": (
        ("optimizer={name='muon',bits=32}",),
        r"train\.optimizer\.bits is 32; it takes 16 or 8\.",
    ),
    "AdamW with Muon's momentum": (
        ("optimizer={name='adamw',momentum=0.9}",),
        r"no key train\.optimizer\.momentum\. Known: backend, beta1, beta2, bits, decay, embeddings, eps, lr, name\.",
    ),
    "momentum for the optimizer that is meant by none": (
        ("optimizer.momentum=0.9",),
        r"no key train\.optimizer\.momentum\. Known: backend, beta1, beta2, bits",
    ),
    "weights in fp16": (("weights=fp16",), r"train\.weights is 'fp16'; it takes 'fp32' or 'bf16'"),
}


@pytest.mark.parametrize("sets, message", RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_cannot_be_trained_is_answered_with_its_key_and_harms_nothing(
    home: Path, sets: tuple[str, ...], message: str
) -> None:
    before = seen(home)
    words = [word for assignment in sets for word in ("--set", assignment)]
    expect_error(typed("train", home / "run.toml", *words, "--device", "cpu"), message)
    expect_error(typed("train", home / "run.toml", *words, "--set", f"run.dir={home}/untouched"), message)
    assert seen(home) == before
    assert not (home / "untouched").exists()


def test_a_step_that_updates_during_backward_is_not_cut(home: Path) -> None:
    before = seen(home)
    words = ("train", home / "run.toml", "--set", "update_during_backward=true", "--set", f"run.dir={home}/whole")
    message = (
        r"--micro-batch is 2\. update_during_backward excludes accumulation: the step's 8 sequences go at once\. "
        r"Possible: 8\."
    )
    expect_error(typed(*words, "--micro-batch", 2, "--device", "cpu"), message)
    assert seen(home) == before
    assert not list((home / "whole").glob("step-*"))


@pytest.mark.parametrize(
    "key, value", [("rotation", "{window=2,interval=1}"), ("update_during_backward", "true"), ("weights", "bf16")]
)
def test_a_run_cannot_turn_to_another_technique(home: Path, key: str, value: str) -> None:
    before = seen(home)
    sets = ("--set", f"{key}={value}", *(("--set", MOE) if key == "rotation" else ()))
    answer = typed("train", home / "run.toml", *sets, "--device", "cpu")
    expect_error(answer, rf"was started differently: .*train\.{key}\S* was .* and is now .*Put that back to go on")
    assert seen(home) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_an_error(home: Path) -> None:
    expect_error(typed("evaluate", home / "run", "--device", "cuda"), r"--device is cuda\. .*Leave --device out")


def test_a_prompt_that_is_no_unicode_is_an_error(home: Path) -> None:
    # How Python hands over the bytes of an argument that are not UTF-8.
    expect_error(typed("chat", home / "run", "--prompt", "g\udcfcn"), r"not UTF-8: byte 0xFC at position 1\..*“gün”")
    expect_error(typed("chat", home / "run", "--prompt", "a\ud800"), r"half a character: \\ud800 at position 1")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seq_len", "seqlen", r"no key train\.seqlen\. Did you mean seq_len"),
        ("[run]", "[runs]", r"no key runs\. Did you mean run"),
        ("[model]", 'train = "x"\n[model]', r"is not TOML"),
        (RUN_FILE[: RUN_FILE.index("[data]")], 'model = "tr-60m"\n', r"model is 'tr-60m', not a table\. .*\[model\]"),
        ('tokenizer = "tok"', "tokenizer = 5", r"names no tokenizer"),
        ('dir = "run"', "", r"run\.dir is missing"),
        ("tokens = 1536", 'tokens = "many"', r"'many' is not a count; write it like"),
        ('"gqa"', '"mha"', r"model\.attention\.kind is 'mha'; there are 'gqa', 'mla'\."),
    ],
    ids=["key", "section", "section twice", "value for a section", "number for a path", "missing", "count", "kind"],
)
def test_a_mistake_in_a_run_file_is_named(home: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RUN_FILE
    text = RUN_FILE.replace('"shards', f'"{home}/shards').replace('"tok"', f'"{home}/tok"')
    old = old.replace('"tok"', f'"{home}/tok"')
    (tmp_path / "run.toml").write_text(text.replace(old, new), encoding="utf-8")
    expect_error(typed("train", tmp_path / "run.toml"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("keep", [0, 7, -2], ids=["empty", "seven bytes", "one token short"])
def test_a_truncated_shard_is_named(home: Path, tmp_path: Path, command: str, keep: int) -> None:
    shutil.copytree(home / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / ("train" if command == "train" else "valid") / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:keep])
    before = seen(tmp_path / "shards")
    if command == "train":
        answer = typed("train", home / "run.toml", "--set", f"data.train={tmp_path}/shards/train")
    else:
        answer = typed("evaluate", home / "run", "--data", tmp_path / "shards/valid")
    expect_error(answer, r"The shard \S+00000\.bin is damaged\. It has \d+ bytes of \d+\. Pack the text again")
    assert seen(tmp_path / "shards") == before


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("command", ["train", "evaluate", "chat"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_is_used(home: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    damage(run / "step-00000006/weights.safetensors")
    options = {
        "train": (home / "run.toml", "--set", f"run.dir={run}"),
        "evaluate": (run, "--json", "--data", home / "shards/valid"),
        "chat": (run, "--prompt", "Kış"),
    }
    answer = typed(command, *options[command])
    assert answer.code == 0, answer.err
    assert re.search(r"Passed over a corrupt checkpoint: \S+step-00000006/weights\.safetensors was altered", answer.err)
    if command == "train":
        assert re.search(r"Going on from \S+step-00000005 \(step 5 of 6\)", answer.err)
        assert open_checkpoint(run / "step-00000006").step == 6
    if command == "evaluate":
        assert "step-00000005" in answer.out


@pytest.mark.parametrize("command", ["train", "evaluate", "chat"])
def test_where_no_checkpoint_is_whole_all_are_named_and_none_is_written_over(
    home: Path, tmp_path: Path, command: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    damage(run / "step-00000006/weights.safetensors")
    (run / "step-00000005/state.json").unlink()
    before = seen(run)
    words = (home / "run.toml", "--set", f"run.dir={run}") if command == "train" else (run,)
    expect_error(typed(command, *words), r"No checkpoint in \S+run is whole\. .*weights\.safetensors.*state\.json")
    assert {path: key for path, key in seen(run).items() if "step-" in path} == {
        path: key for path, key in before.items() if "step-" in path
    }


def test_an_error_that_is_no_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("lowvram.storage.checkpoint.find_checkpoint", fail)
    with pytest.raises(OSError, match="libcudart"):
        typed("evaluate", home / "run")
