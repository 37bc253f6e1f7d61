"""Compiles every Triton kernel for every kind of card, without a card.

python tools/compile_gate.py [--write] [--changed] [--accept]

Every launch that the ops make for the shapes and tiles of gate_cases.py, and that the presets' steps make, is compiled
for compute capability 7.5, 8.0, 8.6, 8.9, 9.0 and 12.0.  It fails if a card does not support a type, if a block needs
more shared memory than the card has, if registers are spilled to memory, if an expected tensor-core instruction is
missing, or if the loops of a kernel have over 5 % more instructions than the written table says (--accept takes them).
--write puts the table into kernels/README.md.  --changed compiles only those rows of the table whose digest is not the
written one, and keeps the others.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import triton
from lowvram_kernels.dispatch import Card, Launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What Triton raises if a card does not support a type or the assembler fails.
REFUSED = (triton.compiler.CompilationError, triton.runtime.errors.PTXASError, RuntimeError)
# In addition to Triton's own cache, which holds the machine code but not the assembler's report about it.
CACHE = Path(tempfile.gettempdir()) / f"lowvram-gate-{os.getuid()}"
BEGIN, END = "<!-- written by tools/compile_gate.py -->", "<!-- end -->"
README = ROOT / "kernels/README.md"
LOOPS = "instructions of a loop"
_GROWTH = 1.05
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
# The instruction that the PTX of each expected kind of matrix product must contain.
INSTRUCTIONS = {
    "f16": r"(mma\.sync|wgmma\.mma_async)\S*\.f16\.f16",
    "bf16": r"(mma\.sync|wgmma\.mma_async)\S*\.bf16\.bf16",
    "e4m3": r"(mma\.sync|wgmma\.mma_async)\S*\.e4m3\.e4m3",
    "mxf8": r"mma\.sync\S*kind::mxf8f6f4\S*block_scale",
    "s8": r"(mma\.sync|wgmma\.mma_async)\S*\.s8\.s8",
}


class Compiled(NamedTuple):
    """The result of compiling one launch for one card."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instruction: str
    loop_length: int  # machine instructions of the longest loop that holds no other; of all, where there is no loop


def source_of(what: Launch) -> ASTSource:
    """Return the kernel as Triton specialises it for these arguments: types, divisibility by 16, ones as constants."""
    kernel = getattr(importlib.import_module(f"lowvram_kernels.{what.module}"), what.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = [*what.arguments, *(what.constants[name] for name in kernel.arg_names[len(what.arguments) :])]
    for index, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        is_constant = index >= len(what.arguments) or value is None or (type(value) is int and value == 1)
        if is_constant:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        address = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        if type(address) is int and address % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def options_of(what: Launch) -> dict[str, Any]:
    """Return the compiler options of a launch, which are not the kernel's own constants."""
    kernel = getattr(importlib.import_module(f"lowvram_kernels.{what.module}"), what.kernel)
    return {name: value for name, value in what.constants.items() if name not in kernel.arg_names}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(what: Launch, card: Card) -> Compiled:
    """Compile a launch for a card; raises Triton's errors if the card does not support it."""
    assert card.capability is not None
    target = GPUTarget("cuda", card.capability[0] * 10 + card.capability[1], 32)
    options = {"num_warps": what.warps, "num_stages": what.stages, **options_of(what)}
    kernel = triton.compile(source_of(what), target=target, options=options)
    pattern = INSTRUCTIONS.get(what.expected_mma)
    match = re.search(pattern, kernel.asm["ptx"]) if pattern else None
    usage, code = (_dump(kernel.asm["cubin"], what_to_show) for what_to_show in ("-res-usage", "-sass"))
    # A thread's registers, and the bytes of its stack, to which registers are spilled.
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    instruction = match[0] if match else ""
    return Compiled(int(numbers[1]), int(numbers[2]), kernel.metadata.shared, instruction, loop_length(code))


def _dump(cubin: bytes, what_to_show: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what_to_show, file.name], check=True, capture_output=True, text=True).stdout


def loop_length(code: str) -> int:
    """Return the instructions of the longest loop that holds no other; of the whole program, where there is none.

    code: machine code as cuobjdump prints it, `/*0a90*/ @P0 BRA 0xb00 ;`; every instruction has 16 bytes.
    """
    places, loops = [], []
    for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", code):
        places.append(int(place, 16))
        target = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < places[-1]:
            loops.append((int(target[1], 16), places[-1]))
    # The jump to itself at the end, which nothing reaches, is none; nor is code that holds a loop.
    inner = [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]
    return max(((last - first) // 16 + 1 for first, last in inner), default=len(places))


def judge(what: Launch, card: Card, compiled: Compiled) -> list[str]:
    """Return what is wrong with a compiled launch."""
    wrong = []
    if compiled.shared_bytes > card.shared_bytes:
        wrong.append(f"{compiled.shared_bytes} bytes of shared memory; the card has {card.shared_bytes}")
    if compiled.stack_bytes:
        wrong.append(f"{compiled.stack_bytes} bytes of stack: registers spill")
    if what.expected_mma and not compiled.instruction:
        wrong.append(f"no tensor-core instruction for {what.expected_mma}")
    return wrong


class Job(NamedTuple):
    """One launch to compile for one card.  key: a hash of everything that decides the machine code."""

    card: Card
    launch: Launch
    key: str

    @property
    def name(self) -> str:
        """Return the names of module and kernel, without the folder."""
        module = self.launch.module.rpartition(".")[2].removesuffix("_triton")
        return f"{module}: {self.launch.kernel}"


@functools.cache
def hash_sources(module: str) -> str:
    """Return a hash of a module of device code and of the modules that it imports.

    Comments, docstrings, formatting and the names of modules do not count: none of them reaches the compiler.
    """
    path = ROOT / f"kernels/lowvram_kernels/{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowvram_kernels."):
            imported.append((node.module or "").removeprefix("lowvram_kernels."))
            node.module = ""
        elif isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256("".join([ast.unparse(tree), *map(hash_sources, imported)]).encode()).hexdigest()[:16]


def jobs_of(card: Card, launches: list[Launch]) -> dict[str, Job]:
    """Return the launches that give different machine code on a card, by a hash of everything that decides it."""
    about = f"{triton.__version__} {card.capability}"
    jobs: dict[str, Job] = {}
    for what in launches:
        source = source_of(what)
        text = f"{about} {hash_sources(what.module)} {what.kernel} {source.signature} {source.constants} {source.attrs}"
        text += f" {what.warps} {what.stages} {what.expected_mma}"
        if options := options_of(what):
            text += f" {options}"
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        jobs.setdefault(key, Job(card, what, key))
    return jobs


def compile_job(job: Job) -> tuple[Compiled | None, list[str]]:
    """Compile a job, or read its earlier result from the cache; returns also what is wrong with it."""
    path = CACHE / f"{job.key}-{len(Compiled._fields)}.json"
    if path.exists():
        values, wrong = json.loads(path.read_text(encoding="utf-8"))
        return Compiled(*values), wrong
    try:
        compiled = compile_launch(job.launch, job.card)
    except REFUSED as error:
        return None, [f"refused: {' '.join(str(error).split())[-300:]}"]
    wrong = judge(job.launch, job.card, compiled)
    if not wrong:
        path.write_text(json.dumps([compiled, wrong]), encoding="utf-8")
    return compiled, wrong


def collect(capabilities: Sequence[tuple[int, int]]) -> list[Job]:
    """Return every job of every card."""
    from gate_cases import launches_of

    jobs: dict[str, Job] = {}
    for capability in capabilities:
        card = Card("cuda", capability)
        jobs |= jobs_of(card, launches_of(card))
    return list(jobs.values())


def compile_all(jobs: Sequence[Job], processes: int) -> list[tuple[Compiled | None, list[str]]]:
    """Compile the jobs in so many processes, each with its own Triton."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        return [compile_job(job) for job in jobs]
    # A forked child has the jobs already; a launch's tensors cannot be sent to another process.
    global _JOBS
    _JOBS = jobs
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_compile_numbered, range(len(jobs)), chunksize=4)


_JOBS: Sequence[Job] = ()


def _compile_numbered(number: int) -> tuple[Compiled | None, list[str]]:
    return compile_job(_JOBS[number])


def digests(jobs: Sequence[Job]) -> dict[tuple[str, str], str]:
    """Return 8 digits per kernel and card: a hash of all that decides its variants' code and how they are judged."""
    texts: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        judged = f"{job.card.shared_bytes} {INSTRUCTIONS.get(job.launch.expected_mma)}"
        texts.setdefault(_row_of(job), []).append(f"{job.key} {judged}")
    return {row: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8] for row, lines in texts.items()}


def _row_of(job: Job) -> tuple[str, str]:
    assert job.card.capability is not None
    return job.name, "{}.{}".format(*job.card.capability)


def table(
    jobs: Sequence[Job],
    results: Sequence[tuple[Compiled | None, list[str]]],
    kept: Mapping[tuple[str, str], Sequence[str]] | None = None,
) -> str:
    """Return a Markdown table with a row per kernel and card: the ranges over its tiles and types.

    kept: the cells of rows that were compiled earlier, without kernel and card.
    """
    compiled_of: dict[tuple[str, str], list[Compiled]] = {}
    for job, (compiled, _) in zip(jobs, results, strict=True):
        if compiled is not None:
            compiled_of.setdefault(_row_of(job), []).append(compiled)
    titles = "kernel", "card", "variants", "registers", "shared memory", "tensor-core instructions", LOOPS, "digest"
    cells_of = dict(kept or {})
    digest_of = digests(jobs)
    for (name, card), rows in compiled_of.items():
        registers, shared = ([getattr(row, what) for row in rows] for what in ("registers", "shared_bytes"))
        instructions = sorted({_shorten(row.instruction) for row in rows} - {""})
        cells_of[name, card] = [
            str(len(rows)),
            _range(registers),
            _range(shared),
            ", ".join(f"`{one}`" for one in instructions) or "–",
            _range([row.loop_length for row in rows]),
            digest_of[name, card],
        ]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for (name, card), cells in sorted(cells_of.items(), key=lambda pair: (pair[0][0], float(pair[0][1]))):
        lines.append(f"| {' | '.join((name, card, *cells))} |")
    return "\n".join(lines)


def longer_loops(now: str, written: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """Say which rows of a table have loops over 5 % longer than they had: the shortest or the longest of a row.

    written: rows as `rows_of` returns them; those that have no lengths are passed over.
    """
    longer = []
    for row, cells in rows_of(now).items():
        old = written.get(row, [])
        if len(old) == len(cells):
            ranges = [[int(number.replace(",", "")) for number in text[-2].split("–")] for text in (old, cells)]
            ends = [(numbers[0], numbers[-1]) for numbers in ranges]
            grown = [after > before * _GROWTH for before, after in zip(*ends, strict=True)]
            if any(grown):
                longer.append(f"{row[0]} on {row[1]}: loops of {cells[-2]} instructions, {old[-2]} before")
    return longer


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    """Return the rows of such a table by kernel and card: the cells after these two; the last one is the digest."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return {(row[0], row[1]): row[2:] for row in cells}


def written_rows() -> dict[tuple[str, str], list[str]]:
    """Return the rows that stand in kernels/README.md."""
    text = README.read_text(encoding="utf-8")
    return rows_of(text.partition(BEGIN)[2].partition(END)[0])


def changed(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of every row that is not in kernels/README.md, or whose digest there is different."""
    written = written_rows()
    now = digests(jobs)
    return [job for job in jobs if written.get(_row_of(job), [""])[-1] != now[_row_of(job)]]


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _shorten(instruction: str) -> str:
    """Return an instruction without the modifiers that all of its kind have."""
    return re.sub(r"\.(sync|aligned|row|col|satfinite)\b", "", instruction)


def write_table(text: str) -> None:
    """Put the table between its marks in kernels/README.md."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Compile everything, print what is wrong, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    parser.add_argument("--changed", action="store_true", help="compile only rows whose digest is not the written one")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--card", action="append", metavar="M.N", help="only this capability (again for more)")
    parser.add_argument("--accept", action="store_true", help="let loops be longer than the written table says")
    options = parser.parse_args()
    chosen = [tuple(map(int, text.split("."))) for text in options.card or []] or list(CAPABILITIES)
    began = time.perf_counter()
    jobs = collect([(major, minor) for major, minor in chosen])
    print(f"{len(jobs)} different kernels, found in {time.perf_counter() - began:.0f} s", flush=True)
    written, known = written_rows(), set(map(_row_of, jobs))
    if options.changed:
        jobs = changed(jobs)
        print(f"{len(jobs)} of them are in rows that have changed since they were written", flush=True)
    results = compile_all(jobs, options.processes)
    wrong = [(job, text) for job, (_, texts) in zip(jobs, results, strict=True) for text in texts]
    for job, text in wrong:
        what = job.launch
        print(f"WRONG {job.name} on {job.card.capability}: {text}\n  {dict(what.constants)} {what.warps} warps, ")
        print(f"  {what.stages} stages, arguments {[_describe(value) for value in what.arguments]}")
    compiled = set(map(_row_of, jobs))
    kept = {row: cells for row, cells in written.items() if options.changed and row in known - compiled}
    variants = len(jobs) + sum(int(cells[0]) for cells in kept.values())
    text = f"{table(jobs, results, kept)}\n\n{variants} variants, Triton {triton.__version__}"
    print(text)
    longer = [] if options.accept else longer_loops(text, written)
    for line in longer:
        print(f"LONGER {line}")
    print(f"{len(jobs)} compiled, {len(wrong)} wrong, {len(longer)} longer, {time.perf_counter() - began:.0f} s")
    if options.write and not wrong and not longer and not options.card:
        write_table(text)
    sys.exit(bool(wrong or longer))


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)


if __name__ == "__main__":
    main()
