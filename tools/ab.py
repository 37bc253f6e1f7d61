"""Compares training recipes on one baseline: some 2 M parameters beside the embedding, 8,192 ids, real Turkish text.

python tools/ab.py adamw8 --arm adamw32 optimizer.bits=32 --arm adamw8 optimizer.bits=8

Every arm is the baseline with the arm's `--set` values, trained by lowvram's own Trainer on one thread.  Each finished
run is a line of docs/ab/NAME.jsonl; the same command continues with the missing runs, also in the middle of a run.  A
comparison is valid only if every run predicts held-out text better than token bigrams counted on the same shards.

tokenizer=none, soft, strict or threes (plain merges, but up to three digits may be one token) and vocabulary=16384
among an arm's values choose another tokenizer, learnt from the same text.  The shards then hold another number of
tokens, so such arms train for equal compute instead of equal tokens: that of one pass over the text with plain merges
of 16,384 ids, by 6 operations for each weight and token, head included.

--pairs FILE asks each finished model for 1,000 minimal pairs, such as TurBLiMP's, and notes how many are right; bits
per byte decide.

rival=silent or rival=masked among an arm's values replaces its rotation of experts by one of two other schemes: in
training the frozen experts' outputs are left out (ismail), or the router cannot choose them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.config.run_file import load_run
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.morphology.marking import MARKINGS, Marker, count_words
from lowvram.data.morphology.rules import read_rules
from lowvram.data.morphology.segmenter import learn_segmenter
from lowvram.data.shards import ShardSet, pack
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.evaluate.bits_per_byte import bigram_score, score
from lowvram.evaluate.minimal_pairs import answer_pairs, choose_light_subset, read_pairs
from lowvram.evaluate.scorer import Scorer
from lowvram.finish import finish
from lowvram.model.ffn import MoeFfn
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES
from lowvram.train.events import Started, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.start import lock_run
from tools.bench.peer_tokenizer import train_peer

Row = dict[str, Any]
Arms = dict[str, list[str]]  # the `--set` values of each, by name
# The Turkish corpus on which a million tokens beat bigrams clearly: by 4 %, on tr_mix_small by 0.2 %.
TEXT = ROOT.parent / "shared/data/text/tr_legal"
VOCABULARY = 8192
# Bytes of documents, sampled evenly; a run reads each token about once, so the bigrams have seen no more text than it.
PARTS_BYTES = {"train": 4_500_000, "valid": 550_000}
POINTS = 20  # of a loss curve
# An arm's words that are no settings of a run.
OWN_KEYS = ("tokenizer", "vocabulary", "rival")
PAIRS = 1_000
THREES = "threes"
TOKENIZERS = ("none", *MARKINGS, THREES)
EQUAL_AT = 16_384  # ids: the vocabulary with whose plain merges the text is read once
MODELS = {
    "dense": """attention = { kind = "gqa", heads = 4, kv_heads = 2, head_dim = 64 }
ffn = { kind = "swiglu", hidden = 640 }""",
    "moe": """attention = { kind = "mla", heads = 4, kv_lora_rank = 64, nope_dim = 48, rope_dim = 16, value_dim = 64 }
ffn = { kind = "moe", hidden = 640, dense_layers = 1, experts = 8, top_k = 2, shared = 1, expert_hidden = 224 }""",
}
RUN_FILE = """[model]
layers = 3
dim = 256
%s
[data]
train = "shards/train"
tokenizer = "tok"
[train]
tokens = 1_000_000
seq_len = 128
batch_tokens = 1_536
precision = "bf16"
optimizer = { name = "adamw", lr = 2e-3, beta2 = 0.99 }
schedule = { kind = "wsd", warmup = 0.05, decay = 0.9 }
[run]
save_every_minutes = 2
prompts = []
"""


class Corpus(NamedTuple):
    """A folder with a tokenizer and the text in its ids, and both sets of shards."""

    home: Path
    learnt: ShardSet
    held_out: ShardSet
    tokenizer: Tokenizer


def prepare_home(work: Path, stem: Path, kind: str = "none", vocabulary: int = VOCABULARY) -> Corpus:
    """Make tokenizer and shards once per text and tokenizer.  kind: as for `learn_tokenizer`."""
    paths = [stem.with_name(f"{stem.name}.{name}.txt.gz") for name in PARTS_BYTES]
    named = f"{vocabulary} {PARTS_BYTES}" + (f" {kind}" if kind != "none" else "")
    made_of = [named.encode(), *(path.read_bytes() for path in paths)]
    home = work / f"text-{hashlib.sha256(b''.join(made_of)).hexdigest()[:10]}"
    home.mkdir(parents=True, exist_ok=True)
    for path, (name, wanted) in zip(paths, PARTS_BYTES.items(), strict=True):
        texts = list(documents(path))
        share = min(1.0, wanted / sum(len(text.encode()) for text in texts))
        kept = [text for number, text in enumerate(texts) if int((number + 1) * share) > int(number * share)]
        (home / f"{name}.txt").write_text("\n\n".join(kept), encoding="utf-8")
    if not (home / "tok/tokenizer.json").exists():
        learn_tokenizer(home / "train.txt", kind, vocabulary, home / "tok")
    tokenizer = load_tokenizer(home / "tok")
    learnt, held_out = (pack([home / f"{n}.txt"], tokenizer, home / "shards" / n, processes=1) for n in PARTS_BYTES)
    return Corpus(home, learnt, held_out, tokenizer)


def learn_tokenizer(text: Path, kind: str, vocabulary: int, out: Path) -> None:
    """Learn a tokenizer from a text.  kind: one of TOKENIZERS."""
    if kind not in TOKENIZERS:
        sys.exit(f"There is no tokenizer={kind}: {', '.join(TOKENIZERS)}.")
    if kind == THREES:
        train_peer(documents(text), vocabulary, out, kind)
        return
    marking = next((marking for marking in MARKINGS if marking == kind), None)
    rewrite = None
    if marking:
        segmenter = finish(learn_segmenter(count_words(documents(text)), read_rules("tr")))
        rewrite = Marker(segmenter, marking).rewrite
    train_tokenizer(documents(text), vocabulary, out, rewrite=rewrite)


def count_tokens(plain: Corpus, model: str, vocabulary: int) -> int:
    """Return for how many tokens a model with this vocabulary trains, so that the compute is that of all others.

    plain: with EQUAL_AT ids.  The head is the embedding, so every weight has one multiplication for each token.
    """
    ours, theirs = (configure(plain.home, model, [], 0, "none", ids).model for ids in (vocabulary, EQUAL_AT))
    return plain.learnt.tokens * theirs.num_parameters() // ours.num_parameters()


def configure(
    home: Path, model: str, settings: Sequence[str], seed: int, run: str, vocabulary: int = VOCABULARY
) -> RunConfig:
    """Return the baseline's configuration with an arm's settings."""
    run_file = home / f"{model}.toml"
    run_file.write_text(RUN_FILE % MODELS[model], encoding="utf-8")
    return load_run(run_file, [*settings, f"train.seed={seed}", f"run.dir={home / run}"], lambda _: vocabulary)


class Forward(Protocol):
    """`forward` of a MoeFfn: returns the stream, the experts' output, and their loads."""

    def __call__(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]: ...


def learning(layer: MoeFfn) -> Tensor:
    """Say of each expert whether it is in the window, [E] bool."""
    assert layer.slot_E is not None, "only where experts rotate"
    return layer.slot_E < layer.window


def make_rival(model: Transformer, kind: str) -> None:
    """Change how a model's layers use frozen experts in training; evaluation still uses all experts."""

    def silent(layer: MoeFfn, forward: Forward, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        router, learns_E = layer.router.forward, learning(layer)

        def only_window(x_ND: Tensor) -> tuple[Tensor, Tensor]:
            weight_NK, id_NK = router(x_ND)
            return weight_NK * learns_E[id_NK], id_NK

        layer.router.forward = only_window  # type: ignore[method-assign]  # of this router, until `forward` returns
        try:
            return forward(x, added)
        finally:
            layer.router.forward = router  # type: ignore[method-assign]  # as before

    def masked(layer: MoeFfn, forward: Forward, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        router, bias_E, top_k = layer.router, layer.router.bias_E, layer.router.top_k
        learns_E = learning(layer)
        router.bias_E = torch.where(learns_E, bias_E, -1e9)
        router.top_k = min(top_k, layer.window)
        try:
            stream, out, load_E = forward(x, added)
        finally:
            router.bias_E, router.top_k = bias_E, top_k
        # Only those that may be chosen are balanced.
        return stream, out, torch.where(learns_E, load_E, load_E[learns_E].mean())

    def treat(layer: MoeFfn) -> Forward:
        forward, scheme = layer.forward, {"silent": silent, "masked": masked}[kind]

        def treated(x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            return scheme(layer, forward, x, added) if torch.is_grad_enabled() else forward(x, added)

        return treated

    for layer in model.moe_layers():
        layer.forward = treat(layer)  # type: ignore[method-assign]  # of this layer


def train_once(what: RunConfig, valid: ShardSet, rival: str | None, pairs_file: Path | None = None) -> Row:
    """Train one run to its end, from its last checkpoint if it has one, and return its results."""
    notes, done, began = what.run.dir / "steps.jsonl", list[Row](), 0.0
    with lock_run(what.run.dir):
        trainer = prepare(RunSettings(what, choose_plan(what.train)[0], torch.device("cpu")))
        if rival is not None:
            make_rival(trainer.state.model, rival)
        for event in trainer.run():
            if isinstance(event, Started):
                done = read_rows(notes)[: event.step]
                write_rows(notes, done)
                began = time.process_time() - (done[-1]["cpu_s"] if done else 0.0)
            if isinstance(event, StepDone):
                done.append({"loss": event.loss, "cpu_s": time.process_time() - began})
                write_rows(notes, done[-1:], "a")
    losses, model, tokenizer = [line["loss"] for line in done], trainer.state.model, trainer.tokenizer
    dtype = DTYPES[what.train.precision]
    result = score(model, valid, tokenizer.bos_id, tokenizer.byte_count_V, what.train.seq_len, dtype)
    asked: Row = {}
    if pairs_file is not None:
        pairs = choose_light_subset(read_pairs(pairs_file), PAIRS)
        answers = finish(answer_pairs(Scorer(model, dtype, tokenizer, what.train.seq_len), pairs))
        asked = {"pairs_right": sum(answers.by_sum) / len(pairs), "pairs": f"{len(pairs)} of {pairs_file.name}"}
    spans = itertools.pairwise(len(losses) * point // POINTS for point in range(POINTS + 1))
    return {
        "tokens": trainer.state.tokens,
        "curve": [round(statistics.fmean(losses[start:end]), 4) for start, end in spans],
        "final_loss": statistics.fmean(losses[-max(1, len(losses) // POINTS) :]),
        "valid_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        **asked,
        "cpu_s": round(done[-1]["cpu_s"], 1),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the objects of a file of JSON lines, if it is there; a torn last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[Row], mode: str = "w") -> None:
    """Write objects as lines of JSON; mode: "a" adds them to what is there."""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def missing(rows: Sequence[Row], arms: Arms, model: str, seeds: int) -> list[tuple[str, int]]:
    """Return the runs that are still missing, seed by seed; exits if a finished run of an arm has other settings."""
    done = {(row["arm"], row["seed"]) for row in rows}
    for row in rows:
        if row["arm"] in arms and (row["settings"], row["model"]) != (arms[row["arm"]], model):
            sys.exit(f"{row['arm']} was run as {row['model']} with {row['settings']}: choose another name.")
    return [(arm, seed) for seed in range(seeds) for arm in arms if (arm, seed) not in done]


def table(rows: Sequence[Row], arms: Iterable[str]) -> str:
    """Return means and ranges of each arm, and its differences from the first one, seed by seed."""
    runs_of = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in arms}
    (base, first), lines = next(iter(runs_of.items())), []
    for arm, runs in runs_of.items():
        lines.append(f"{arm}: {len(runs)} runs, {statistics.fmean(r['cpu_s'] for r in runs.values()):.0f} CPU s each")
        for key in ("final_loss", "valid_loss", "bits_per_byte"):
            values = [run[key] for run in runs.values()]
            line = f"  {key:14} {statistics.fmean(values):.4f}  ({min(values):.4f} to {max(values):.4f})"
            apart = [100 * (runs[seed][key] / first[seed][key] - 1) for seed in runs if seed in first]
            if arm != base and apart:
                line += f"  {statistics.fmean(apart):+.2f} % of {base}: " + " ".join(f"{own:+.2f}" for own in apart)
            lines.append(line)
    bigram, worst = (max(row[key] for row in rows) for key in ("bigram_bits_per_byte", "bits_per_byte"))
    verdict = "passed" if worst < bigram else "NOT passed, the comparison says nothing"
    return "\n".join([*lines, f"bigrams: {bigram:.4f} bits per byte, {verdict} (worst run {worst:.4f})"])


def main() -> None:
    """Read the options, make the missing runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--arm", nargs="+", action="append", required=True, metavar="WORD", help="NAME KEY=VALUE ...")
    parser.add_argument("--base", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every arm")
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=TEXT, help="STEM of STEM.train.txt.gz and STEM.valid.txt.gz")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="minimal pairs that each finished model answers")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-ab")
    options = parser.parse_args()
    arms = {name: [*options.base, *settings] for name, *settings in options.arm}
    path = ROOT / f"docs/ab/{options.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, read_rows(path))
    if others := {row["text"] for row in read_rows(path)} - {options.text.name}:
        sys.exit(f"{options.name} was run on {', '.join(others)}: choose another name.")
    for arm, seed in missing(read_rows(path), arms, options.model, options.seeds):
        own = dict(word.split("=", 1) for word in arms[arm] if word.partition("=")[0] in OWN_KEYS)
        settings = [word for word in arms[arm] if word.partition("=")[0] not in OWN_KEYS]
        vocabulary = int(own.get("vocabulary", VOCABULARY))
        corpus = prepare_home(options.work, options.text, own.get("tokenizer", "none"), vocabulary)
        ids = corpus.tokenizer.size
        if "tokenizer" in own:
            plain = prepare_home(options.work, options.text, "none", EQUAL_AT)
            settings = [f"train.tokens={count_tokens(plain, options.model, ids)}", *settings]
        bigram = bigram_score(corpus.learnt, corpus.held_out, corpus.tokenizer.bos_id, corpus.tokenizer.byte_count_V)
        what = configure(corpus.home, options.model, settings, seed, f"runs/{options.name}-{arm}-{seed}", ids)
        row = {"arm": arm, "seed": seed, "settings": arms[arm], "model": options.model, "text": options.text.name}
        row |= {"bigram_bits_per_byte": bigram.bits_per_byte, "text_tokens": corpus.learnt.tokens}
        row |= train_once(what, corpus.held_out, own.get("rival"), options.pairs)
        write_rows(path, [row], "a")
        shutil.rmtree(what.run.dir)
        pairs = f", {row['pairs_right']:.1%} of minimal pairs right" if "pairs_right" in row else ""
        print(f"{arm} seed {seed}: {row['bits_per_byte']:.4f} bits per byte, {row['cpu_s']} CPU s{pairs}", flush=True)
    print(table(read_rows(path), arms))


if __name__ == "__main__":
    main()
