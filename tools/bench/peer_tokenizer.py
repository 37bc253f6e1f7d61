"""Trains tokenizers that ours is compared with: a plain byte-level BPE with another expression, by `tokenizers`.

python tools/bench/peer_tokenizer.py TEXT… --vocab 32768 --out tok-gpt2

GPT-2's expression is the default; `--expression threes` is ours, but up to three digits may be one token.  It learns
from the same documents in the same form (NFC) as `lowvram tokenizer train`, and has no tokens but its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

# The script's own folder is not searched, since a module there must not hide a package.
ROOT = Path(__file__).parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lowvram.data.nfc import nfc
from lowvram.data.text import documents, find_files
from lowvram.data.tokenizer import EXPRESSION

END = "<|endoftext|>"
DIGIT = r"\p{N}|"  # in ours, as an alternative of its own
EXPRESSIONS = {
    "gpt2": None,  # Radford et al. 2019; the library knows it
    "threes": EXPRESSION.replace(DIGIT, r"\p{N}{1,3}|"),
}


def train_peer(texts: Iterable[str], vocabulary: int, out: Path, expression: str = "gpt2") -> int:
    """Train and write a tokenizer; return its number of ids.  expression: a name of EXPRESSIONS."""
    pattern = EXPRESSIONS[expression]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([split, model.pre_tokenizer])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(map(nfc, texts), trainer)
    out.mkdir(parents=True, exist_ok=True)
    model.save(str(out / "tokenizer.json"))
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    return model.get_vocab_size()


def main() -> None:
    """Read the options, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--expression", choices=EXPRESSIONS, default="gpt2")
    parser.add_argument("--out", type=Path, default=Path("tok-gpt2"))
    options = parser.parse_args()
    texts = (text for file in find_files(options.text) for text in documents(file))
    print(f"{options.out}: {train_peer(texts, options.vocab, options.out, options.expression)} ids")


if __name__ == "__main__":
    main()
