"""The documents of a shard, one by one, with their bytes, hashes and places; writes nothing.

A document is named by the SHA-256 of its text in NFC and UTF-8, which is what its ids stand for, as
`exclusion_list.hash_document` has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lowvram.data.places import Place, read_places
from lowvram.data.shard_set import PLACES, ShardPart, ShardSet, read_bytes, read_json
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError

# Tokens whose bytes are looked up at once: some tens of megabytes.
_TOKENS = 1 << 18


@dataclass(frozen=True)
class ShardDocuments:
    """The documents of one shard.  D documents, T tokens.

    id_T: the shard's ids.  start_D, stop_D: where each document's ids begin, behind its BOS, and where they end.
    """

    part: ShardPart
    tokenizer: Tokenizer
    id_T: np.ndarray
    start_D: np.ndarray
    stop_D: np.ndarray

    @cached_property
    def byte_count_D(self) -> np.ndarray:
        """How many bytes of text each document has, int64."""
        end_T = np.concatenate([[0], np.cumsum(self.tokenizer.byte_count_V[self.id_T])])
        return np.asarray(end_T[self.stop_D] - end_T[self.start_D])

    def read_ids(self, number: int) -> np.ndarray:
        """Return the ids of a document, without BOS."""
        return self.id_T[self.start_D[number] : self.stop_D[number]]

    def read_bytes(self, number: int) -> bytes:
        """Return the text of a document in UTF-8."""
        return self.tokenizer.decode_bytes(self.read_ids(number))

    def all_bytes(self) -> Iterator[bytes]:
        """Yield the text of each document in UTF-8."""
        ends = np.cumsum(self.byte_count_D)
        first, documents = 0, len(self.start_D)
        while first < documents:
            # As many documents at once as have about so many tokens.
            last = max(first + 1, int(np.searchsorted(self.stop_D, self.start_D[first] + _TOKENS)))
            id_N = self.id_T[self.start_D[first] : self.stop_D[last - 1]]
            data = self.tokenizer.decode_bytes(id_N[id_N != self.tokenizer.bos_id])
            before = int(ends[first - 1]) if first else 0
            begin = 0
            for end in (ends[first:last] - before).tolist():
                yield data[begin:end]
                begin = end
            first = last

    def hashes(self) -> Iterator[str]:
        """Yield the hash of each document."""
        for data in self.all_bytes():
            yield hashlib.sha256(data).hexdigest()

    @cached_property
    def places(self) -> list[Place] | None:
        """Where each document stands in its file; None where the packing did not note it."""
        path = self.part.path.with_suffix(f".{PLACES}")
        data, noted = read_bytes(path), read_json(self.part.path.with_suffix(".json")).get(PLACES)
        if data is None or hashlib.sha256(data).hexdigest() != noted:
            return None
        return read_places(data, path.parent, len(self.start_D))


def open_documents(shards: ShardSet, part: ShardPart, tokenizer: Tokenizer) -> ShardDocuments:
    """Return the documents of a shard; raises DataError where it holds other ones than its record says."""
    id_T = shards.read(part.start, part.tokens)
    bos_D = np.flatnonzero(id_T == tokenizer.bos_id)
    if len(bos_D) != part.documents or not len(bos_D) or bos_D[0] != 0:
        what = f"The shard {part.path} holds {len(bos_D):,} beginnings of documents, and not {part.documents:,}."
        fix = "Pack the text again into the same folder."
        raise DataError(what, "Its bytes are damaged, or it was packed with another tokenizer.", fix)
    return ShardDocuments(part, tokenizer, id_T, bos_D + 1, np.append(bos_D[1:], len(id_T)))


def check_tokenizer(directory: Path, shards: ShardSet, tokenizer: Tokenizer) -> None:
    """Raise DataError where shards were packed with another tokenizer than the one in `directory`."""
    if shards.tokenizer_hash != tokenizer.hash:
        what = f"{shards.directory} was not packed with the tokenizer in {directory}."
        why = f"Its shards are of tokenizer {shards.tokenizer_hash[:12]}…, and that is {tokenizer.hash[:12]}…."
        raise DataError(what, why, "Name shards and tokenizer, or shards and a run, that belong together.")
