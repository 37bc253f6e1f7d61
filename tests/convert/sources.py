"""Small models as sources, and the directories that they become, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowvram.api.tasks import count_progress, finish
from lowvram.config.model import ModelConfig
from lowvram.convert.hf.writer import ExportOptions, write_each_tensor
from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.weight_reader import WeightReader
from lowvram.model.transformer import Transformer
from lowvram.storage.disk import DISK, Disk
from tests.model.outside import randomise


@dataclass
class Held:
    """A source whose tensors are in memory."""

    config: ModelConfig
    tensors: dict[str, Tensor]

    def names(self) -> list[str]:
        """Return our names."""
        return list(self.tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.tensors[name]


def held(config: ModelConfig, std: float = 0.08) -> tuple[Transformer, Held]:
    """Return a model none of whose tensors can be ignored unseen, and the same as a source."""
    model = randomise(Transformer(config), std=std).eval()
    return model, Held(config, dict(model.state_dict()))


def speak(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Return the tokenizer as it lies with a model that was trained on dialogues."""
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(tokenizer.settings | {"lowvram_dialogue": True}, indent=2), "utf-8")
    return Tokenizer.load(folder)


def write_directory(
    source: WeightReader,
    tokenizer: Tokenizer,
    out: Path,
    options: ExportOptions,
    more: Mapping[str, bytes],
    disk: Disk = DISK,
) -> int:
    """Write every tensor; returns the bytes of the weights."""
    return finish(count_progress(write_each_tensor(source, tokenizer, out, options, more, disk), "Writing"))[0]


def written(config: ModelConfig, tokenizer: Tokenizer, out: Path, **wish: object) -> tuple[Transformer, Path]:
    """Write a random model of this form to `out`; returns both."""
    model, source = held(config)
    write_directory(source, tokenizer, out, ExportOptions(max_positions=256, **wish), {})
    return model, out
