"""What other projects call our keys, options and commands is answered with our names, wherever it is typed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lowvram.cli.app import COMMANDS
from lowvram.config import field_names
from lowvram.config.field_names import answer_command, answer_option, find_meant
from lowvram.config.run_file import full_names
from lowvram.errors import ConfigError
from tests.config.test_run_file import RUN, load
from tests.flows.typed import typed

KEYS = {
    "learning_rate": "train.optimizer.lr",
    "lr": "train.optimizer.lr",
    "width": "model.dim",
    "hidden_size": "model.dim",
    "n_embd": "model.dim",
    "d_model": "model.dim",
    "max_seq_len": "train.seq_len",
    "block_size": "train.seq_len",
    "context_length": "train.seq_len",
    "n_layer": "model.layers",
    "num_layers": "model.layers",
    "batch_size": "train.batch_tokens",
    "epochs": "train.tokens",
    "max_steps": "train.tokens",
    "vocab_size": "model.vocabulary",
    "gpu": "--gpu",
    "gradient_checkpointing": "--recompute",
}


@pytest.mark.parametrize("word, key", KEYS.items())
def test_a_usual_name_is_answered_with_ours_in_a_run_file_in_set_and_as_an_option(
    tmp_path: Path, word: str, key: str
) -> None:
    for text, sets in ((RUN.replace("[train]\n", f"[train]\n{word} = 3\n"), ()), (RUN, (f"{word}=3",))):
        if word in ("lr",) and sets:
            continue
        with pytest.raises(ConfigError, match=rf"there is no key (train\.)?{word}\. It is (called )?{key}( here)?\."):
            load(tmp_path, text, *sets)
    said = answer_option("--" + word.replace("_", "-"), ["--ram", "--model", "--set"], full_names())
    assert key in said
    assert "Did you mean" not in said


@pytest.mark.parametrize("word", ["n_embd", "--n-embd", "nEmbd", "N_EMBD", "-n-embd"])
def test_every_spelling_is_one_name(word: str) -> None:
    assert find_meant(word) == find_meant("n_embd")
    assert find_meant(word).key == "model.dim"


def test_every_name_leads_to_a_key_an_option_or_a_command_that_exists(tmp_path: Path) -> None:
    names = Counter(name for words in field_names._NAMES.values() for name in words.split())
    assert {name: count for name, count in names.items() if count > 1} == {}
    # Keys whose last part several tables have.
    shared = ("model.attention.kind=gqa", "train.schedule.kind=wsd", "train.optimizer.decay=0.2", "data.train=a")
    load(tmp_path, RUN, *shared)
    ours = {*full_names().values(), *(assignment.split("=")[0] for assignment in shared)}
    assert {meant.key for meant in field_names._NAMES} <= ours | {"--gpu", "--recompute", "--compile"}
    for word, command in field_names._COMMANDS.items():
        assert command.split()[0] in COMMANDS
        assert word not in COMMANDS


def test_a_key_in_the_wrong_table_is_told_where_it_belongs(tmp_path: Path) -> None:
    for old, new, said in (
        ("[run]", "[run]\ntokens = 5", r"no key run\.tokens\. It is train\.tokens\."),
        ("[train]", "[train]\nlr = 5", r"no key train\.lr\. It is train\.optimizer\.lr\."),
        ('"tr-60m"', '"tr-60m"\nheads = 3', r"no key model\.heads\. It is model\.attention\.heads\."),
    ):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path, RUN.replace(old, new))
    mla = '"tr-60m"\nattention = { kind = "mla", heads = 8, kv_heads = 2 }'
    with pytest.raises(ConfigError, match=r"no key model\.attention\.kv_heads\. (?!It is model\.attention\.kv_heads)"):
        load(tmp_path, RUN.replace('"tr-60m"', mla))


def test_a_list_of_folders_is_a_list_of_corpora_and_one_log_is_a_list_of_one(tmp_path: Path) -> None:
    what = load(
        tmp_path, RUN.replace('"shards/train"', '["a", "b", { path = "c", weight = 2 }]'), "run.log=tensorboard"
    )
    assert [(corpus.path, corpus.weight) for corpus in what.data.train] == [
        (tmp_path / "a", 1.0),
        (tmp_path / "b", 1.0),
        (tmp_path / "c", 2.0),
    ]
    assert what.run.log == ("tensorboard",)
    assert load(tmp_path, RUN, 'prompts="Bir"').run.prompts == ("Bir",)
    assert load(tmp_path, RUN, "run.log=[]").run.log == ()


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"shards/train"', "[1, 2]", r"data\.train\[0\] is 1; it takes a table with path, weight\."),
        ('"shards/train"', "7", r"data\.train is 7; it takes a list"),
        ("[run]", "[run]\nprompts = 7", r"run\.prompts is 7; it takes a list"),
        ("[run]", '[run]\nkeep = "x"', r"run\.keep is 'x'; it takes a whole number\."),
        (
            "[run]",
            '[run]\nlog = "tensorbord"',
            r"run\.log\[0\] is 'tensorbord'; it takes 'tensorboard' or 'wandb'",
        ),
        ("[train]", "[train]\noptimizer = 3", r"train\.optimizer"),
        ("[train]", "[train]\ndropout = 'x'", r"train\.dropout is 'x'; it takes a number\."),
    ],
)
def test_a_wrong_kind_of_value_is_answered_without_the_validators_words(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path, RUN.replace(old, new))
    for word in ("dictionary", "instance of", "tuple", "parse string"):
        assert word not in str(caught.value)


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "lowvram: error: which command? demo, doctor, fit"),
        ("data", "lowvram data: error: which command? clean, pack"),
        ("fti", "lowvram: error: there is no command fti. Did you mean fit"),
        ("generate", "there is no command generate. It is called `lowvram chat` here."),
        ("tokenizer trian", "lowvram tokenizer: error: there is no command trian. Did you mean train?"),
        ("fit --modle tr-25m", "lowvram fit: error: there is no option --modle. Did you mean --model"),
        ("fit --modle=tr-25m", "there is no option --modle. Did you mean --model"),
        (
            "tokenizer train x --vocb 5",
            "lowvram tokenizer train: error: there is no option --vocb. Did you mean --vocab",
        ),
        ("train run.toml --learning-rate 3e-4", "--set train.optimizer.lr=VALUE` sets."),
        ("train run.toml --tokens 3", "--set train.tokens=VALUE` sets."),
        (
            "train run.toml --gpu 1",
            "there is no option --gpu. This command computes on this machine's own card, and --device",
        ),
        ("fit --device cuda", "there is no option --device. It is called --gpu here."),
        ("tokenizer train x --gpu 1", "`lowvram fit --gpu CARD` and `lowvram train --device` take it."),
        ("tokenizer train x --vocab-size 16000", "there is no option --vocab-size. It is called --vocab here."),
        ("tokenizer train x --vocabulary 16000", "It is called --vocab here."),
        ("chat run --max-tokens 5", "It is called --tokens here."),
        ("chat run --n-ctx 5", "It is called --context here."),
        ("serve run --max-seq-len 5", "It is called --context here."),
        ("chat run --dtype=bf16", "there is no option --dtype. It is called --precision here."),
        ("export run --to hf --out e --torch-dtype bf16", "It is called --dtype here."),
        ("data pack x --tokenizer-path t", "It is called --tokenizer here."),
        ("data pack x --output-dir t", "It is called --out here."),
        ("evaluate run --dataset d", "It is called --data here."),
        ("demo --save-dir d", "It is called --dir here."),
        ("chat run --learning-rate 1", "there is no option --learning-rate. Did you mean "),
        ("evaluate run --epochs 1", "there is no option --epochs. Did you mean "),
        ("fit --dataset d", "It is called --data here."),
        ("fit --max-tokens 5", "--set train.tokens=VALUE` sets."),
        ("evaluate --pairs p.jsonl run", "required: RUN. --pairs takes all the words behind it: write RUN before it"),
        ("fit --desktop lniux", "argument --desktop: there is no 'lniux'. Did you mean linux?"),
        ("tokenizer train x --vocab 2.5", "is not a count, because it is no whole number"),
        ("tokenizer train x --vocab 0", "0 is less than 1"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_was_meant(line: str, said: str) -> None:
    answer = typed(*line.split())
    assert answer.code == 2
    assert said in answer.err.splitlines()[-1]


def test_words_that_are_not_options_are_left_to_the_command() -> None:
    answer = typed("fit", "--gpu", "RTX", "5070")
    assert 'Two words go in quotes: --gpu "RTX 5070"' in answer.err
    assert answer_command("trian", COMMANDS) == "Did you mean train?"


def test_counts_are_taken_by_options_as_by_run_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Kış geldi, kar yağdı.\n\n" * 300, encoding="utf-8")
    answer = typed("tokenizer", "train", tmp_path / "text.txt", "--vocab", "0.3k", "--out", tmp_path / "tok")
    assert answer.code == 0, answer.err
