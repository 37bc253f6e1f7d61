"""Compares the segmenter and tokenizers with gold segmentations of words, beside Morfessor on the same word counts.

python tools/bench/morphology.py --half odd --tokenizer tok-none tok-soft tok-strict

The rules and constants were chosen on the gold types with an even hash (BLAKE2b of the form, 8 bytes, as a number);
figures are reported on the odd ones.  The segmenter learns from all Turkish training text; Morfessor 2.0's Baseline
(Virpioja et al. 2013) learns from the same words, each type once, with the corpus weight whose F1 is best on the even
types.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.data.any_tokenizer import AnyTokenizer, find_parts, open_tokenizer
from lowvram.data.morphology.learning import choose_words
from lowvram.data.morphology.marking import count_words
from lowvram.data.morphology.rules import read_rules
from lowvram.data.morphology.segmenter import Segmenter, learn_segmenter
from lowvram.data.text import documents
from lowvram.evaluate.boundaries import BoundaryScore, GoldWord, find_boundaries, read_gold, score_boundaries
from lowvram.finish import finish

DATA = ROOT.parent / "shared/data"
GOLD = DATA / "morph/tr_segmentation_gold.tsv.gz"
KAZAKH = DATA / "morph/ud_kk_ktb_morph.tsv.gz"
# A subset of the others.
LEFT_OUT = "tr_mix_small"
# In ascending order.  The F1 on the even types rises from 0.05 (0.452) over 0.1 (0.495) to 0.4 at least.
WEIGHTS = (0.4, 0.7, 1.0, 1.5)
Cut = Callable[[str], Sequence[str]]


def is_even(word: str) -> bool:
    """Say whether a gold type belongs to the half on which the rules were chosen."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") % 2 == 0


def count_text(pattern: str) -> Counter[str]:
    """Count the words of the training text of a language."""
    paths = [path for path in sorted((DATA / "text").glob(pattern)) if LEFT_OUT not in path.name]
    return count_words(text for path in paths for text in documents(path))


def cut_into_tokens(tokenizer: AnyTokenizer) -> Cut:
    """Return what cuts a word, as it stands behind a blank, where its tokens end."""
    return lambda word: find_parts(tokenizer.split(f" {word}"), word) or [word]


def learn_morfessor(words: Sequence[str], tune: Sequence[GoldWord], lower: Callable[[str], str]) -> tuple[Cut, float]:
    """Return Morfessor's segmentation at the corpus weight that is best on `tune`, and that weight."""
    import morfessor

    best: tuple[float, float, Cut] | None = None
    for weight in WEIGHTS:
        # Morfessor draws the order of the words.
        random.seed(0)
        model = morfessor.BaselineModel(corpusweight=weight)
        model.load_data([(1, word) for word in words])
        model.train_batch()

        def cut(word: str, model: object = model) -> list[str]:
            pieces, start = model.viterbi_segment(lower(word))[0], 0  # type: ignore[attr-defined]
            parts = []
            for piece in pieces:
                parts.append(word[start : start + len(piece)])
                start += len(piece)
            return parts

        f1 = score_boundaries(tune, cut).f1 or 0.0
        print(f"  Morfessor, corpus weight {weight}: F1 {f1:.3f} on the even types", flush=True)
        if best is None or f1 > best[0]:
            best = f1, weight, cut
    assert best is not None
    if best[1] in (WEIGHTS[0], WEIGHTS[-1]):
        print(f"  The best weight, {best[1]}, is at the edge of those tried: try others beyond it.", flush=True)
    return best[2], best[1]


def show(name: str, types: BoundaryScore, tokens: BoundaryScore) -> str:
    """Return a line of the table."""
    figures = (types.precision, types.recall, types.f1, types.macro_f1, types.over, types.under, tokens.f1)
    return f"| {name} | " + " | ".join("–" if figure is None else f"{figure:.3f}" for figure in figures) + " |"


def show_errors(gold: Sequence[GoldWord], segmenter: Segmenter) -> list[str]:
    """Return a table of errors: which suffix is cut off too often or too rarely, by its name."""
    errors: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for word in gold:
        named = segmenter.name_parts(word.word)
        ours, theirs, start = find_boundaries([part.text for part in named]), find_boundaries(word.parts), 0
        for part in named:
            if start in ours - theirs:
                key = "cut off wrongly", part.name
                errors[key] += 1
                examples.setdefault(key, f"{' '.join(p.text for p in named)} for {' '.join(word.parts)}")
            start += len(part.text)
        start = 0
        for text in word.parts:
            if start in theirs - ours:
                key = "not cut off", f"-{segmenter.rules.lower_case(text)}"
                errors[key] += 1
                examples.setdefault(key, f"{' '.join(p.text for p in named)} for {' '.join(word.parts)}")
            start += len(text)
    rows = [f"| {kind} | {what} | {count} | {examples[kind, what]} |" for (kind, what), count in errors.most_common(24)]
    return ["| error | suffix | boundaries | an example |", "| --- | --- | ---: | --- |", *rows]


def judge_kazakh() -> str:
    """Return how often the end of a Kazakh lemma is among the boundaries of a word, or the bare lemma is left whole."""
    segmenter = finish(learn_segmenter(count_text("kk_*.train.txt.gz"), read_rules("kk")))
    lemmas: dict[str, str] = {}
    with gzip.open(KAZAKH, "rt", encoding="utf-8") as rows:
        for row in rows:
            fields = row.rstrip("\n").split("\t")
            if len(fields) > 6 and fields[6] in ("NOUN", "PROPN", "ADJ", "VERB", "PRON") and fields[4].isalpha():
                lemmas[fields[4].lower()] = fields[5].lower()
    right = words = 0
    for word, lemma in lemmas.items():
        # The last letter may have changed, as in кітап, кітаб-ы.
        if len(word) >= len(lemma) and word.startswith(lemma[:-1]):
            words += 1
            ends = find_boundaries(segmenter.segment(word))
            right += len(lemma) in ends if len(word) > len(lemma) else not ends
    return f"Kazakh (UD_Kazakh-KTB): the lemma's end is found in {right:,} of {words:,} types, {right / words:.3f}"


def main() -> None:
    """Learn, compare, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("even", "odd"), default="odd")
    parser.add_argument("--tokenizer", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--no-morfessor", action="store_true")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the learnt Turkish segmenter")
    options = parser.parse_args()
    all_gold = read_gold(GOLD)
    even = [word for word in all_gold if is_even(word.word)]
    gold = even if options.half == "even" else [word for word in all_gold if not is_even(word.word)]
    counts = count_text("tr_*.train.txt.gz")
    began = time.process_time()
    segmenter = finish(learn_segmenter(counts, read_rules("tr")))
    print(f"Learnt from {sum(counts.values()):,} words in {time.process_time() - began:.0f} CPU s on", end=" ")
    print(f"{platform.machine()}, Python {platform.python_version()}; {len(segmenter.model.stems):,} stems", flush=True)
    if options.save:
        segmenter.save(options.save)
    cuts: dict[str, Cut] = {"ours": segmenter.segment}
    if not options.no_morfessor:
        words = choose_words(counts, segmenter.rules)
        morfessor, weight = learn_morfessor(words, even, segmenter.rules.lower_case)
        cuts[f"Morfessor 2.0.6 (corpus weight {weight})"] = morfessor
    for folder in options.tokenizer:
        cuts[f"tokens of {folder.name}"] = cut_into_tokens(open_tokenizer(folder))
    print(f"\n{len(gold):,} gold types with an {options.half} hash; over and under: shares of types\n")
    print("| cut by | precision | recall | F1 | macro F1 | over | under | F1 by token |")
    print("| --- |" + " ---: |" * 7)
    for name, cut in cuts.items():
        print(show(name, score_boundaries(gold, cut), score_boundaries(gold, cut, by="token")), flush=True)
    print("", *show_errors(gold, segmenter), "", judge_kazakh(), sep="\n")


if __name__ == "__main__":
    main()
