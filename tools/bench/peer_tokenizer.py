"""Trains the tokenizer that ours is compared with: a plain byte-level BPE with GPT-2's expression, by `tokenizers`.

python tools/bench/peer_tokenizer.py TEXT… --vocab 32768 --out tok-gpt2

It learns from the same documents in the same form (NFC) as `lowvram tokenizer train`, and has no tokens but its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The script's own folder is not searched, since a module there must not hide a package.
ROOT = Path(__file__).parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lowvram.data.nfc import nfc
from lowvram.data.text import documents, find_files

# Radford et al. 2019: the expression of GPT-2, which the library calls by its name.
END = "<|endoftext|>"


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("tok-gpt2"))
    options = parser.parse_args()
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (nfc(text) for file in find_files(options.text) for text in documents(file))
    model.train_from_iterator(texts, trainer)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save(str(options.out / "tokenizer.json"))
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    (options.out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    print(f"{options.out}: {model.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
