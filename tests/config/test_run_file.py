"""Run files: what they may say, what they inherit, and how a mistake in them is answered."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.config.architecture import Alibi, SwiGlu, Window
from lowvram.config.base import MOST_TOKENS, differences
from lowvram.config.run import RunConfig
from lowvram.config.run_file import from_portable, load_preset, load_run, overlay, preset_names, to_portable
from lowvram.config.train import AdamW, WarmupStableDecay
from lowvram.errors import ConfigError
from lowvram.fit.run_file_writer import tables_to_go_on, write_run

RUN = """\
[model]
preset = "tr-60m"
[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"
[train]
tokens = "1.2e9"
[run]
dir = "runs/first"
"""


def load(tmp_path: Path, text: str = RUN, *sets: str, size: int = 16_384) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_run(path, sets, lambda _: size)


def test_a_preset_fills_model_and_training_and_the_file_overrides_single_fields(tmp_path: Path) -> None:
    text = RUN.replace('"tr-60m"', '"tr-60m"\nlayers = 10\nattention = { heads = 4 }')
    what = load(tmp_path, text)
    preset, train = load_preset("tr-60m")
    assert what.model.layers == 10
    assert what.model.attention == preset.attention.model_copy(update={"heads": 4})
    assert what.train.tokens == 1_200_000_000
    assert what.train.batch_tokens == train.batch_tokens


def test_another_kind_replaces_the_whole_variant(tmp_path: Path) -> None:
    attention = '{ kind = "mla", heads = 8, kv_lora_rank = 64, nope_dim = 32, rope_dim = 32, value_dim = 64 }'
    what = load(tmp_path, RUN.replace('"tr-60m"', f'"tr-60m"\nattention = {attention}'))
    assert what.model.attention.kind == "mla"
    assert not hasattr(what.model.attention, "kv_heads")


@pytest.mark.parametrize("way", ["preset", "set"])
def test_none_switches_off_what_a_preset_has(tmp_path: Path, way: str) -> None:
    text = RUN.replace('"tr-60m"', '"ismail-512"')
    if way == "preset":
        text = text.replace('"ismail-512"', '"ismail-512"\npositions = { yarn = "none" }')
        assert load(tmp_path, text).model.positions.yarn is None
    else:
        assert load(tmp_path, text, "positions.yarn=none").model.positions.yarn is None


def test_a_configuration_moves_with_its_directory(tmp_path: Path) -> None:
    corpora = '[{ path = "a" }, { path = "../b" }]'
    (tmp_path / "here").mkdir()
    what = load(tmp_path / "here", RUN.replace('"shards/train"', corpora))
    tables = to_portable(what, what.run.dir)
    assert str(tmp_path) not in str(tables)
    assert from_portable(tables, what.run.dir) == what
    moved = from_portable(to_portable(what, what.run.dir), tmp_path / "there" / "runs" / "first")
    assert [corpus.path for corpus in moved.data.train] == [tmp_path / "there" / "a", tmp_path / "b"]
    assert moved.data.tokenizer == tmp_path / "there" / "tok"


@pytest.mark.parametrize(
    "preset, sets, holds",
    [
        (
            "tr-350m",
            ("optimizer.name=adamw",),
            lambda model, train: train.optimizer == AdamW(),
        ),
        (
            "tr-350m",
            ("optimizer.bits=8", "optimizer.name=adamw", "optimizer.lr=2e-4"),
            lambda model, train: train.optimizer == AdamW(bits=8, lr=2e-4),
        ),
        (
            "tr-350m",
            ("optimizer.iterations=5",),
            lambda model, train: (train.optimizer.iterations, train.optimizer.lr) == (5, 6e-4),
        ),
        ("tr-60m", ("positions.kind=alibi",), lambda model, train: model.positions == Alibi()),
        ("tr-60m", ("schedule.kind=wsd",), lambda model, train: train.schedule == WarmupStableDecay()),
        ("ismail-512", ("positions.yarn=none",), lambda model, train: model.positions.yarn is None),
        ("tr-130m-moe", ("ffn.kind=swiglu", "ffn.hidden=512"), lambda model, train: model.ffn == SwiGlu(hidden=512)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_over_a_preset_means_the_same_wherever_it_is_written(
    tmp_path: Path, preset: str, sets: tuple[str, ...], holds: Callable[..., bool]
) -> None:
    model, train = load_preset(preset, sets)
    assert holds(model, train)
    bare = f'[model]\npreset = "{preset}"\n[data]\ntrain = "a"\ntokenizer = "b"\n[run]\ndir = "c"\n'
    homes = {"positions": "model", "ffn": "model"}
    lines = []
    for assignment in sets:
        key, _, value = assignment.partition("=")
        quoted = value if value[0].isdigit() else f'"{value}"'
        lines.append(f"{homes.get(key.partition('.')[0], 'train')}.{key} = {quoted}\n")
    written = "".join(lines) + bare.replace("[model]\npreset", "model.preset", 1)
    for text, options in ((bare, sets), (written, ())):
        what = load(tmp_path, text, *options, size=model.vocabulary)
        assert (what.model, what.train) == (model, train)


@pytest.mark.parametrize("home", ["model", "train"])
def test_a_part_of_a_preset_that_is_set_to_a_value_is_named(tmp_path: Path, home: str) -> None:
    message = rf"{home} is 3, not a table\. Write its values below a line \[{home}\]"
    with pytest.raises(ConfigError, match=message):
        load_preset("tr-60m", (f"{home}=3",))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, RUN.replace("[train]", "[other]").replace("[other]\n", ""), f"{home}=3")


def test_the_vocabulary_follows_the_tokenizer(tmp_path: Path) -> None:
    assert load(tmp_path, size=5000).model.vocabulary == 5000


def test_another_vocabulary_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocabulary is 99.*16384 ids.*Leave model.vocabulary out"):
        load(tmp_path, RUN.replace('"tr-60m"', '"tr-60m"\nvocabulary = 99'))


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    what = load(tmp_path, RUN.replace("[train]", '[train]\nstart_from = "runs/zero"'))
    assert what.data.train[0].path == tmp_path / "shards/train"
    assert what.data.valid == tmp_path / "shards/valid"
    assert what.data.tokenizer == tmp_path / "tok"
    assert what.run.dir == tmp_path / "runs/first"
    assert what.train.start_from == tmp_path / "runs/zero"


def test_several_corpora_keep_their_weights(tmp_path: Path) -> None:
    corpora = '[{ path = "a", weight = 3.0 }, { path = "b" }]'
    what = load(tmp_path, RUN.replace('"shards/train"', corpora))
    assert [(corpus.path.name, corpus.weight) for corpus in what.data.train] == [("a", 3.0), ("b", 1.0)]


@pytest.mark.parametrize(
    "assignment, found",
    [
        ("optimizer.lr=3e-4", lambda what: what.train.optimizer.lr == 3e-4),
        ("train.optimizer.lr = 3e-4", lambda what: what.train.optimizer.lr == 3e-4),
        ("tokens=3M", lambda what: what.train.tokens == 3_000_000),
        ("model.layers=2", lambda what: what.model.layers == 2),
        ("precision=fp32", lambda what: what.train.precision == "fp32"),
        ('prompts=["a", "b"]', lambda what: what.run.prompts == ("a", "b")),
        ("window.size=64", lambda what: what.model.window == Window(size=64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_set_reaches_any_value_with_or_without_its_section(tmp_path: Path, assignment: str, found) -> None:
    assert found(load(tmp_path, RUN, assignment))


def test_an_assignment_that_is_wrong_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    for assignment, says in (
        ("tokens=abc", "'abc' is not a count"),
        ("optimizer.lr=abc", "train.optimizer.lr is 'abc'"),
    ):
        with pytest.raises(ConfigError) as refused:
            load(tmp_path, RUN, assignment)
        assert str(refused.value).startswith(f'`overrides=["{assignment}"]`: {says}')
        with pytest.raises(ConfigError) as refused:
            load_preset("tr-25m", [assignment])
        assert str(refused.value).startswith(f'`overrides=["{assignment}"]`: {says}')
    with pytest.raises(ConfigError, match=r"`: train\.seq_len is 'x'.*run\.toml: train\.optimizer\.lr is 'y'") as both:
        load(tmp_path, RUN.replace("[train]", "[train]\noptimizer = { lr = 'y' }"), "seq_len=x")
    assert str(both.value).startswith('`overrides=["seq_len=x"]`')


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"tr-60m"', '"tr-60"', r'model.preset is "tr-60".*Did you mean.*tr-60m'),
        ("[train]", "[trian]", r"no key trian. Did you mean train"),
        ("[run]", "[runn]", r"\.toml: there is no key runn\. Did you mean run\?$"),
        ("[run]\n", "[runn]\nx = 1\n[rum]\n", r"there is no key runn\. Did you mean run\? There is no key rum\. "),
        ("tokens =", "token =", r"no key train.token. Did you mean.*tokens"),
        ('"1.2e9"', '"lots"', r"'lots' is not a count"),
        ('"1.2e9"', "0", r"train.tokens is 0"),
        ('"1.2e9"', str(MOST_TOKENS + 1), r"train.tokens is 1000000000000001; it takes 1,000,000,000,000,000 or less"),
        ('"1.2e9"', '"1e17"', r"train.tokens is 100000000000000000; it takes 1,000,000,000,000,000 or less"),
        ('dir = "runs/first"', "", r"run.dir is missing"),
        ('tokenizer = "tok"', "", r"names no tokenizer"),
        (
            '"1.2e9"',
            '"1e9"\nseq_len = 1000',
            r"batch_tokens is 131072; it must be a multiple of seq_len \(1000\). Try 131000",
        ),
        (
            '"1.2e9"',
            '"1e9"\nprecision = "fp12"',
            r"train.precision is 'fp12'; it takes 'fp32', 'bf16', 'fp16', 'fp8' or 'int8'",
        ),
        ('"tr-60m"', '"tr-60m"\nattention = { headz = 3 }', r"no key model.attention.headz. Did you mean heads"),
        ('"tr-60m"', '"tr-60m"\nattention = { heads = 3 }', r"kv_heads is 2; it must divide heads \(3\)"),
        (
            '"tr-60m"',
            '"tr-60m"\nattention = { head_dim = 33 }',
            r"head_dim is 33; rotation needs an even number. Try 34",
        ),
        ('"tr-60m"', '"tr-130m-moe"\npositions = { kind = "alibi" }', r"MLA goes with \"rope\" only"),
        ('"tr-60m"', '"tr-130m-moe"\nffn = { top_k = 9 }', r"ffn.top_k is 9; there are only 8 experts"),
        ('"tr-60m"', '"tr-130m-moe"\nffn = { dense_layers = 14 }', r"dense_layers is 14; it must be less than layers"),
        (
            '"tr-60m"',
            '"tr-130m-moe"\nattention = { value_dim = 97 }',
            r"value_dim is 97; it must not exceed nope_dim \+ rope_dim \(64 \+ 32\)",
        ),
        ('"tr-60m"', '"tr-60m"\nlayers = 1025', r"layers is 1025; it takes 1,024 or less"),
        ("[data]", "[data", r"is not TOML"),
    ],
)
def test_a_mistake_is_answered_with_file_key_value_and_way_out(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RUN
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, RUN.replace(old, new))


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("optimiser.lr=1", "no key optimiser. Did you mean optimizer"),
        ("lr", "not an assignment"),
        ("tokens.x=1", "value"),
    ],
)
def test_a_wrong_set_is_answered(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, RUN, assignment)


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no run file .*nowhere.toml"):
        load_run(tmp_path / "nowhere.toml", [], lambda _: 1)
    with pytest.raises(ConfigError, match="is a directory"):
        load_run(tmp_path, [], lambda _: 1)


def test_configurations_are_frozen() -> None:
    model, _ = load_preset("tr-25m")
    with pytest.raises(Exception, match="frozen"):
        model.layers = 3  # type: ignore[misc]


def test_differences_name_what_changed_and_nothing_else() -> None:
    model, train = load_preset("tr-25m")
    other = model.model_copy(update={"layers": 3})
    assert differences(model, other) == [("layers", 12, 3)]
    assert differences(train, train) == []


def test_overlay_leaves_its_base_alone() -> None:
    base = {"a": {"kind": "x", "n": 1}, "b": 2}
    assert overlay(base, {"a": {"n": 5}}) == {"a": {"kind": "x", "n": 5}, "b": 2}
    assert overlay(base, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}, "b": 2}
    assert base == {"a": {"kind": "x", "n": 1}, "b": 2}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_its_size_is_near_its_name(name: str) -> None:
    model, train = load_preset(name)
    assert train.batch_tokens % train.seq_len == 0
    sizes = {"25m": 25e6, "60m": 60e6, "125m": 125e6, "350m": 350e6, "130m": 130e6, "600m": 600e6}
    for word in name.split("-"):
        if word in sizes:
            assert model.num_parameters() == pytest.approx(sizes[word], rel=0.04)


@pytest.mark.parametrize("name", ["tr-130m-moe", "tr-600m-moe"])
def test_our_moe_presets_can_be_exported_and_keep_fused_attention_open(name: str) -> None:
    model, _ = load_preset(name)
    assert model.norm_eps == 1e-6
    assert model.ffn.shared >= 1
    assert model.attention.query_dim == model.attention.value_dim <= 128
    assert not (model.layers in (26, 27) and model.attention.q_lora_rank)


@pytest.mark.parametrize(
    "preset, sets",
    [
        ("tr-60m", ()),
        ("tr-60m", ("precision=fp16", "tokens=3M", "optimizer.lr=1e-8")),
        ("tr-60m", ("optimizer.name=adamw",)),
        ("tr-60m", ("optimizer.name=adamw", "optimizer.bits=8", "optimizer.lr=1.5e-3")),
        ("tr-60m", ("optimizer.adamw_lr=1e-4", "schedule.kind=wsd", "schedule.floor=0.25")),
        ("tr-60m", ("layers=3", "positions.kind=alibi", "window.size=64", "tied=false", "seed=7")),
        ("ismail-512", ("positions.yarn=none", "rotation.window=2", "update_during_backward=true")),
        ("tr-130m-moe", ("ffn.kind=swiglu", "ffn.hidden=512", "attention.q_lora_rank=none")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_written_run_file_is_toml_and_learns_what_was_weighed(
    tmp_path: Path, preset: str, sets: tuple[str, ...]
) -> None:
    model, train = load_preset(preset, sets)
    data = tmp_path / ("Türkçe 'metin' # 1" + ("" if os.name == "nt" else ' "iki" \\ \x7f'))
    folders = {"train": str(data / "train"), "tokenizer": str(data / "tok")}
    write_run(tmp_path / "run.toml", preset, model, train, folders)
    tables = tomllib.loads((tmp_path / "run.toml").read_text(encoding="utf-8"))
    assert list(tables) == ["model", "data", *(["train"] if "train" in tables else []), "run"]
    what = load_run(tmp_path / "run.toml", [], lambda _: model.vocabulary)
    assert (what.model, what.train) == (model, train)
    assert (what.data.train[0].path, what.data.tokenizer) == (data / "train", data / "tok")
    if not sets:
        assert tables["model"] == {"preset": preset}
        assert "train" not in tables


@pytest.mark.parametrize("preset", preset_names())
def test_the_tables_that_train_an_imported_model_further_describe_that_model(tmp_path: Path, preset: str) -> None:
    model, _ = load_preset(preset)
    text = tables_to_go_on(model, Path("runs/base"))
    assert "vocabulary" not in text
    own = {"data": 'train = "shards"', "train": "tokens = 1_000_000"}
    for table, value in own.items():
        text = text.replace(f"[{table}]", f"[{table}]\n{value}")
    (tmp_path / "run.toml").write_text(f'{text}\n[run]\ndir = "run"\n', encoding="utf-8")
    what = load_run(tmp_path / "run.toml", [], lambda _: model.vocabulary)
    assert what.model == model
    assert what.train.start_from == tmp_path / "runs/base"
    assert what.data.tokenizer == tmp_path / "runs/base/tokenizer"


def test_a_run_file_with_gaps_names_them_and_keeps_its_comment(tmp_path: Path) -> None:
    write_run(tmp_path / "run.toml", "tr-60m", *load_preset("tr-60m"), None)
    assert "# the key valid can be left out: then nothing is held out" in (tmp_path / "run.toml").read_text(
        encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"leaves data\.train, data\.valid, data\.tokenizer open"):
        load_run(tmp_path / "run.toml", [], lambda _: 1)
    with pytest.raises(ConfigError, match="exists already"):
        write_run(tmp_path / "run.toml", "tr-60m", *load_preset("tr-60m"), None)


def test_a_presets_experts_rotate_where_it_has_any() -> None:
    _, train = load_preset("tr-130m-moe", ("rotation={window=1}",))
    assert train.rotation is not None
    assert train.rotation.window == 1
    message = r"preset tr-60m: train\.rotation rotates experts; ffn\.kind is \"swiglu\", which has none\. Leave"
    with pytest.raises(ConfigError, match=message):
        load_preset("tr-60m", ("rotation={window=1}",))
    with pytest.raises(ConfigError, match=r"preset tr-130m-moe: rotation\.window is 64; a layer has \d+ experts"):
        load_preset("tr-130m-moe", ("rotation={window=64}",))


@pytest.mark.parametrize("tokens, taken", [("42857142.857", 42_857_143), ('"1.23456789k"', 1235), ("1234.5", 1234)])
def test_a_count_with_a_fraction_is_rounded_as_it_always_was(tmp_path: Path, tokens: str, taken: int) -> None:
    assert load(tmp_path, RUN, f"tokens={tokens}").train.tokens == taken
    assert load_preset("tr-25m", [f"train.tokens={tokens}"])[1].tokens == taken


WHOLE = RUN.replace(
    'preset = "tr-60m"',
    """layers = 2
dim = 64
attention = { kind = "gqa", heads = 2, kv_heads = 1, head_dim = 32 }
ffn = { kind = "swiglu", hidden = 128 }""",
)


@pytest.mark.parametrize("written", ["", "positions = { theta = 5e5 }", 'positions = { kind = "rope", theta = 5e5 }'])
def test_a_table_that_names_no_kind_is_of_the_default_kind(tmp_path: Path, written: str) -> None:
    text = WHOLE.replace("dim = 64", f"dim = 64\n{written}").replace("[run]", "schedule = { floor = 0.2 }\n[run]")
    what = load(tmp_path, text)
    assert (what.model.positions.kind, what.model.positions.theta) == ("rope", 5e5 if written else 1e4)
    assert (what.train.schedule.kind, what.train.schedule.floor) == ("cosine", 0.2)
    assert what.train.optimizer.name == "adamw"


@pytest.mark.parametrize(
    "old, key, kinds",
    [('kind = "gqa", ', "attention", "'gqa', 'mla'"), ('kind = "swiglu", ', "ffn", "'swiglu', 'moe'")],
)
def test_a_kind_that_must_be_named_is_asked_for_with_those_that_there_are(
    tmp_path: Path, old: str, key: str, kinds: str
) -> None:
    with pytest.raises(ConfigError, match=rf"run\.toml: model\.{key}\.kind is missing; there are {kinds}\.$"):
        load(tmp_path, WHOLE.replace(old, ""))
