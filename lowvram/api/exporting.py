"""A checkpoint in the format of another program: a directory for transformers, or a file for llama.cpp."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.convert.gguf.verify import Agreement, Programs
    from lowvram.convert.model_card import CardContents
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.weights import CheckpointReader
    from lowvram.storage.checkpoint import Checkpoint

Format = Literal["hf", "fp8", "gguf"]
Dtype = Literal["fp32", "bf16", "f16", "q8_0"]
# Of the matrices, by format; the first is no default: hf keeps what the run trained, gguf writes bf16.
DTYPES: dict[Format, tuple[Dtype, ...]] = {
    "hf": ("fp32", "bf16"),
    "fp8": (),
    "gguf": ("fp32", "bf16", "f16", "q8_0"),
}
_SAID = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp8": "FP8 (E4M3) in blocks of 128 × 128, the rest in bf16 and fp32; transformers opens them with `accelerate`",
}


@dataclass(frozen=True)
class ExportSettings:
    """What is written.

    to: "hf" for a directory that transformers opens, "fp8" for the same with FP8 weights as DeepSeek-V3 has them,
    "gguf" for one file for llama.cpp.  dtype: of the matrices, None: as they are kept, in gguf bf16.  license,
    language: for the model card.  verify: for gguf, the folder of llama.cpp's programs to compare with.
    """

    to: Format = "hf"
    dtype: Dtype | None = None
    license: str | None = None
    language: str = "tr"
    verify: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """A file that is still to be compared with llama.cpp's programs.  numbers: of its matrices."""

    programs: Programs
    file: Path
    numbers: str
    source: CheckpointReader
    tokenizer: Tokenizer
    max_context: int


@dataclass(frozen=True)
class Exported:
    """What was written.  step: of the checkpoint.  tensors: 0 where they were not counted.

    comparison: what `compare_with_llama_cpp` takes, None where that was not asked for.
    """

    path: Path
    step: int
    size_bytes: int
    tensors: int
    tokenizer: Tokenizer
    comparison: Comparison | None = None


def export_task(path: Path, out: Path, options: ExportSettings) -> Task[Exported]:
    """Write the newest checkpoint of a run, or the one named, to `out`; yields notices and progress.

    Raises ConfigError for options that do not go together, CheckpointError where `out` exists, ExportError where the
    other program cannot compute this model, DiskFullError.
    """
    from lowvram.api.loading import open_checkpoint
    from lowvram.convert.hf.writer import refuse_existing
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.generate.weights import CheckpointReader

    _check_options(options)
    refuse_existing(out)
    checkpoint, run = yield from open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    source = CheckpointReader(checkpoint, run.model)
    if options.to == "gguf":
        return (yield from _write_gguf(out, options, source, tokenizer, checkpoint, run))
    return (yield from _write_directory(out, options, source, tokenizer, checkpoint, run))


def _check_options(options: ExportSettings) -> None:
    from lowvram.errors import ConfigError, argument

    if options.to not in DTYPES:
        raise ConfigError(f"{argument('to')} is {options.to}.", fix=f"Known: {', '.join(DTYPES)}.")
    known = DTYPES[options.to]
    if options.dtype is not None and options.dtype not in known:
        fix = f"Take one of {', '.join(known)}, or leave `dtype` out." if known else "Leave `dtype` out."
        raise ConfigError(f"{argument('dtype', options.dtype)} does not go with {argument('to', options.to)}.", "", fix)
    if options.verify is not None and options.to != "gguf":
        raise ConfigError(
            f"{argument('verify')} is given without {argument('to', 'gguf')}.",
            "It asks llama.cpp.",
            "Leave it out, or add that.",
        )
    # They stand in the card's YAML: what could end a line there has no place in them.
    if options.license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", options.license):
        why = "The card names a licence by its identifier: letters, digits, dots and hyphens."
        raise ConfigError(
            f"{argument('license', options.license)} is no identifier.", why, 'Write `license="apache-2.0"`.'
        )
    if not re.fullmatch(r"([A-Za-z-]{2,12}(,[A-Za-z-]{2,12})*)?", options.language):
        why = "The card lists tags such as tr, en or tr,en."
        raise ConfigError(
            f"{argument('language', options.language)} names no languages.", why, 'Write `language="tr"`.'
        )


def _write_directory(
    out: Path,
    options: ExportSettings,
    source: CheckpointReader,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    run: RunConfig,
) -> Task[Exported]:
    from lowvram.convert.hf.writer import ExportOptions, Numbers, estimate_bytes, write_each_tensor
    from lowvram.convert.model_card import write_card
    from lowvram.data.hf_tokenizer import HfTokenizer

    by_dtype: dict[Dtype | None, Numbers] = {"fp32": "fp32", "bf16": "bf16"}
    numbers: Numbers | None = "fp8" if options.to == "fp8" else by_dtype.get(options.dtype)
    needs_bos = not isinstance(tokenizer, HfTokenizer)
    size = estimate_bytes(source, numbers)
    card = write_card(_tell_story(out, options, checkpoint, run, numbers, size, needs_bos))
    writing = write_each_tensor(source, tokenizer, out, ExportOptions(run.train.seq_len, numbers), card)
    size = yield from count_progress(writing, "Writing")
    return Exported(out, checkpoint.step, size, 0, tokenizer)


def _tell_story(
    out: Path,
    options: ExportSettings,
    checkpoint: Checkpoint,
    run: RunConfig,
    numbers: str | None,
    size: int,
    needs_bos: bool,
) -> CardContents:
    from lowvram.convert.model_card import CardContents, read_curve

    return CardContents(
        name=out.resolve().name,
        checkpoint=checkpoint,
        what=run,
        numbers=_SAID[numbers or run.train.weights],
        weight_bytes=size,
        licence=options.license,
        languages=tuple(filter(None, options.language.split(","))),
        needs_bos=needs_bos,
        points=read_curve(checkpoint.directory.parent / "log.jsonl", checkpoint.step),
    )


def _write_gguf(
    out: Path,
    options: ExportSettings,
    source: CheckpointReader,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    run: RunConfig,
) -> Task[Exported]:
    from lowvram.convert.gguf.verify import find_programs
    from lowvram.convert.gguf.writer import Numbers, write_gguf
    from lowvram.data.hf_tokenizer import HfTokenizer
    from lowvram.errors import TokenizerError

    if isinstance(tokenizer, HfTokenizer):
        why = "llama.cpp knows pre-tokenizers by name, and lowvram knows the name of its own only."
        raise TokenizerError("This model's tokenizer is another program's.", why, 'Export it with `to="hf"`.')
    # Before anything is written: a wrong folder is said at once.
    programs = None if options.verify is None else find_programs(options.verify)
    by_dtype: dict[Dtype | None, Numbers] = {None: "bf16", "bf16": "bf16", "fp32": "f32", "f16": "f16", "q8_0": "q8_0"}
    numbers = by_dtype[options.dtype]
    metadata = {"name": out.stem, "license": options.license or "unknown"}
    yield Progress("Writing")
    written = write_gguf(source, tokenizer, out, run.train.seq_len, numbers, metadata)
    if written.kept_wider:
        yield Notice(f"{len(written.kept_wider)} matrices are in f16: blocks of 32 do not cut their rows.")
    comparison = None
    if programs is not None:
        comparison = Comparison(programs, out, numbers, source, tokenizer, run.train.seq_len)
    return Exported(written.path, checkpoint.step, written.size_bytes, written.tensors, tokenizer, comparison)


def compare_with_llama_cpp(asked: Comparison) -> Task[Agreement]:
    """Compare the ids of 1,000 lines and up to 64 greedy tokens with llama.cpp's.

    Raises ExportError where they differ by more than rounding explains.
    """
    import torch

    from lowvram.convert.gguf.verify import verify
    from lowvram.errors import ExportError
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.weights import load_for_inference

    yield Progress("Comparing with llama.cpp")
    model = load_for_inference(asked.source, "fp32", compute_dtype=torch.float32)
    decoder = Decoder(model, asked.max_context, dtype=torch.float32)
    found = verify(asked.programs, asked.file, asked.numbers, asked.tokenizer, decoder)
    if found.gap is not None and not found.is_tie:
        raise ExportError(
            f"llama.cpp writes another text after {found.tokens} of {found.of} greedy tokens.",
            f"There our logits differ by {found.gap:.3f}, which rounding to {asked.numbers} does not explain.",
            'Export with `dtype="fp32"` and verify again; if it differs there, too, please report it.',
        )
    return found
