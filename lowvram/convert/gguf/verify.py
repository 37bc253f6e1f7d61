"""Checks that a user's own llama.cpp gives the same token ids and the same greedy tokens as our model.

It runs the programs llama-tokenize and llama-completion (llama-cli in older builds); knows no terminal.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lowvram.data.sample import sample_documents
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import ExportError, MachineError, argument
from lowvram.generate.decoder import Decoder
from lowvram.storage.json_files import JsonError, parse_object

LINES, TOKENS = 1_000, 64
PROMPT = "Ankara'nın en"
# Two logits that differ by less count as a tie: the file's numbers are rounded, ours are the fp32 masters.
_TIE = {"f32": 0.01, "bf16": 0.25, "f16": 0.1, "q8_0": 1.0}
_WAIT_S = 600
# Characters that the sample text lacks.
_RARE = ("İstanbul'da \"ığüşöç\" %20'si", "a\u0301 🫖 \u200d é", "1234567 0.5e-3", "<|user|> </s>", "  iki  boşluk\t.")


class Programs(NamedTuple):
    """The two programs of llama.cpp that are run."""

    tokenize: Path
    complete: Path


class Agreement(NamedTuple):
    """How far both programs agree.

    ids: how many ids were compared; all were equal.  tokens: how many of `of` greedy tokens were equal.  gap: at the
    first difference, our logit of our next token minus our logit of llama.cpp's; None if there is no difference.
    is_tie: whether the file's rounding explains it.
    """

    ids: int
    tokens: int
    of: int
    gap: float | None
    is_tie: bool


def find_programs(place: Path) -> Programs:
    """Return the programs in a folder, beside a given program, or on the search path if only a name is given.

    Raises MachineError where one is missing.
    """
    found = place if place.exists() else Path(shutil.which(str(place)) or place)
    folder = found if found.is_dir() else found.parent
    known = {path.stem: path for path in folder.glob("llama-*")}
    complete = known.get("llama-completion") or known.get("llama-cli")
    if "llama-tokenize" not in known or complete is None:
        raise MachineError(
            f"{argument('verify')} is {place}, and there are no llama-tokenize and llama-completion (or llama-cli).",
            f"They were looked for in {folder}.",
            "Name the folder of llama.cpp's programs, often build/bin.",
        )
    return Programs(known["llama-tokenize"].resolve(), complete.resolve())


def verify(programs: Programs, file: Path, numbers: str, tokenizer: Tokenizer, decoder: Decoder) -> Agreement:
    """Compare the ids of 1,000 lines and up to 64 greedy tokens.

    numbers: the number format of the file's matrices.  decoder: for the same model in fp32, with one slot.
    Raises ExportError where a program fails or an id differs.
    """
    ids = _compare_ids(programs, file, tokenizer)
    prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    count = max(1, min(TOKENS, decoder.max_context - len(prompt) - 1))
    ours = _write_greedily(decoder, prompt, count, tokenizer.stop_ids)
    options = ("-p", PROMPT, "-n", count, "-c", decoder.max_context, "--temp", 0, "--repeat-penalty", "1.0", "-no-cnv")
    output = _run(programs.complete, file, *options, "--no-display-prompt", "--simple-io", "--no-warmup", "-ngl", 0)
    theirs = output.removesuffix(b"\n").removesuffix(b"\n").removesuffix(b" [end of text]")
    texts = [tokenizer.token_bytes(id) for id in ours]
    equal = sum(theirs.startswith(b"".join(texts[: n + 1])) for n in range(len(texts)))
    rest = theirs[len(b"".join(texts[:equal])) :]
    has_ended = len(ours) < count
    if equal == len(ours) and (not rest or not has_ended):
        return Agreement(ids, equal, len(ours), None, True)
    # At the first difference: our next token against theirs, where BOS stands for the end of the text.
    our_next = ours[equal] if equal < len(ours) else tokenizer.bos_id
    their_next = tokenizer.encode(rest.decode("utf-8", "replace"))[0] if rest else tokenizer.bos_id
    logit_V = _prefill(decoder, [*prompt, *ours[:equal]])
    gap = float(logit_V[our_next] - logit_V[their_next])
    return Agreement(ids, equal, len(ours), gap, abs(gap) <= _TIE[numbers])


def write_lines() -> str:
    """Return the text whose ids are compared."""
    lines = [line for text in sample_documents(0, 200 * LINES) for line in text.splitlines()]
    return "\n".join([*_RARE, *lines][:LINES])


def _compare_ids(programs: Programs, file: Path, tokenizer: Tokenizer) -> int:
    text = write_lines()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.txt"
        path.write_text(text, encoding="utf-8", newline="\n")
        options = ("-f", path, "--ids", "--no-bos", "--no-escape", "--no-parse-special", "--log-disable")
        output = _run(programs.tokenize, file, *options)
    try:
        theirs = parse_object(b'{"ids": ' + output + b"}")["ids"]
    except JsonError:
        theirs = None
    if not isinstance(theirs, list):
        what = f"{programs.tokenize} answered with something else than ids."
        raise ExportError(what, f"It printed {output[:80]!r}.", "Update llama.cpp.")
    ours = tokenizer.encode(text)
    if theirs != ours:
        pairs = zip(ours, theirs, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        raise ExportError(
            f"llama.cpp makes other tokens of the text behind {tokenizer.decode(ours[:same])[-30:]!r}.",
            f"There ours are {ours[same : same + 4]} and its {theirs[same : same + 4]}; {same:,} before are equal.",
            "Update llama.cpp; with this one the model would read another text.",
        )
    return len(ours)


def _write_greedily(decoder: Decoder, prompt: Sequence[int], count: int, stops: Sequence[int]) -> list[int]:
    logit_V, written = _prefill(decoder, prompt), list[int]()
    while len(written) < count:
        id = int(logit_V.argmax())
        if id in stops:
            break
        written.append(id)
        logit_V = decoder.decode_one_token([0], [id])[0]
    return written


def _prefill(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    decoder.rewind(0, 0)
    return decoder.prefill(0, ids)


def _run(program: Path, file: Path, *options: object) -> bytes:
    """Return what a program printed; raises ExportError where it fails."""
    command = [str(program), "-m", str(file), *map(str, options)]
    try:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"{program} did not answer.", f"{error}.", "Try it by hand with the same file.") from error
    if process.returncode:
        lines = process.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ExportError(
            f"{program} ended with {process.returncode}.",
            f"It said: {lines[-1][:200] if lines else 'nothing'}",
            "The file is written; an older llama.cpp than the one named above does not know its pre-tokenizer.",
        )
    return process.stdout
