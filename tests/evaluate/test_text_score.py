"""Text files scored as they lie, against the shards that `data pack` makes of them."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path

import pytest
import torch

from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.bits_per_byte import Score, TokenSource, score
from lowvram.evaluate.text_score import TokenSequence, find_domains, open_domain
from tests.evaluate.scored import finish, scorer_of


def measure(tokenizer: Tokenizer, source: TokenSource, most: int | None = None) -> Score:
    model = scorer_of(tokenizer).model
    return score(model, source, tokenizer.bos_id, tokenizer.byte_count_V, 16, torch.float32, most)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl"])
def test_a_text_scores_what_its_shards_score(
    ending: str, tmp_path: Path, small_tokenizer: Tokenizer, turkish: tuple[str, ...]
) -> None:
    texts = [unicodedata.normalize("NFD", text) if number % 2 else text for number, text in enumerate(turkish)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts) if ending == ".jsonl" else "\n\n".join(texts)
    file = tmp_path / f"text{ending}"
    file.write_bytes(gzip.compress(lines.encode()) if ending.endswith(".gz") else lines.encode())
    shards = pack([file], small_tokenizer, tmp_path / "shards", field="body", processes=1)
    source = finish(open_domain(file, "body", small_tokenizer, None))
    assert isinstance(source, TokenSequence)
    assert (source.tokens, source.documents) == (shards.tokens, shards.documents) == (source.tokens, len(turkish))
    found = measure(small_tokenizer, source)
    assert found == measure(small_tokenizer, shards)
    assert found.text_bytes == sum(len(text.encode()) for text in turkish)
    part = finish(open_domain(file, "body", small_tokenizer, 40))
    assert part.tokens < source.tokens
    assert measure(small_tokenizer, part, 40) == measure(small_tokenizer, shards, 40)
    opened = finish(open_domain(tmp_path / "shards", "body", small_tokenizer, None))
    assert isinstance(opened, ShardSet)
    assert measure(small_tokenizer, opened) == found


def test_each_file_and_each_folder_of_shards_is_a_domain(
    tmp_path: Path, small_tokenizer: Tokenizer, turkish: tuple[str, ...]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("news", "law"):
        (folder / f"{name}.txt").write_text(turkish[0], encoding="utf-8")
    pack([folder / "law.txt"], small_tokenizer, tmp_path / "shards", processes=1)
    (folder / "cover.png").write_bytes(b"")
    found, passed_over = find_domains([folder, tmp_path / "shards"])
    assert found == [tmp_path / "shards", folder / "law.txt", folder / "news.txt"]
    assert [sentence[:6] for sentence in passed_over] == ["1 file"]
    with pytest.raises(DataError, match="does not exist"):
        find_domains([tmp_path / "nowhere"])
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no document"):
        finish(open_domain(folder / "empty.txt", "text", small_tokenizer, None))
