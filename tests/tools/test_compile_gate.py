"""The gate: what has changed since the committed table is compiled; every fault that it must find is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A change of more variants than that is compiled by the tool, which a failing test asks for: 919 take a quarter of an
# hour on two cores.
MOST_COMPILED = 120
# The gate needs Triton's compiler, and these tests its interpreter: so each runs in a process of its own.
PRELUDE = """
import sys
sys.path[:0] = ["tools", "kernels", "."]
import compile_gate as gate
import torch
from lowvram_kernels.dispatch import Card, Launch
ADA = Card("cuda", (8, 9))
def meta(n, dtype=torch.float32):
    return torch.empty(n, dtype=dtype, device="meta")
def encode(block=1024, native=True, expected_mma="", warps=4):
    constants = {"BLOCK": block, "NATIVE": native}
    given = meta(4096), meta(4096, torch.uint8), 4096
    return Launch("quant.e4m3_triton", "encode_kernel", (4,), given, constants, warps, 3, expected_mma)
"""


def ask(script: str, *arguments: str) -> str:
    """Run a script beside the gate, with Triton's compiler; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRELUDE + script, *arguments]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cuobjdump comes with Triton's wheels for Linux")


@pytest.mark.nightly
def test_what_has_changed_since_the_committed_table_compiles_to_the_same_figures() -> None:
    printed = ask(
        """
most = int(sys.argv[1])
jobs = gate.collect(gate.CAPABILITIES)
known = set(gate.digests(jobs))
print("gone", sorted(set(gate.written_rows()) - known))
chosen = gate.changed(jobs)
print("changed", len(chosen))
if len(chosen) <= most:
    results = gate.compile_all(chosen, 2)
    wrong = [(job.name, job.card.capability, text) for job, (_, texts) in zip(chosen, results) for text in texts]
    print("wrong", wrong)
    written = gate.written_rows()
    made = gate.rows_of(gate.table(chosen, results))
    print("other", [row for row, cells in made.items() if cells[:-1] != written.get(row, [])[:-1]])
    print("longer", gate.longer_loops(gate.table(chosen, results), written))
""",
        str(MOST_COMPILED),
    )
    counts = re.search(r"^changed (\d+)$", printed, re.MULTILINE)
    assert counts is not None, printed
    assert int(counts[1]) <= MOST_COMPILED, "many kernels have changed: run python tools/compile_gate.py --write"
    assert "\nwrong []\n" in printed, printed
    assert "gone []\n" in printed, printed
    assert "\nlonger []\n" in printed, printed
    assert "\nother []\n" in printed, f"run python tools/compile_gate.py --write\n{printed}"


def test_only_a_row_that_another_source_card_or_promise_decides_has_changed() -> None:
    printed = ask(
        """
jobs = list(gate.jobs_of(ADA, [encode(), encode(warps=8)]).values())
other = list(gate.jobs_of(ADA, [encode(), encode(warps=2)]).values())
fine = gate.compile_all(jobs, 1)
written = gate.rows_of(gate.table(jobs, fine))
gate.written_rows = lambda: written
print(len(gate.changed(jobs)), len(gate.changed(jobs[::-1])), len(gate.changed(other)))
print(written["e4m3: encode_kernel", "8.9"][0])
smaller = [job._replace(card=job.card._replace(capability=(8, 6))) for job in jobs]
print(len(gate.changed(smaller)))
gate.INSTRUCTIONS[""] = "mma"
print(len(gate.changed(jobs)))
"""
    )
    assert printed.split() == ["0", "0", "2", "2", "2", "2"]


def test_a_type_that_a_card_refuses_is_a_fault() -> None:
    printed = ask(
        """
gate.CACHE.mkdir(parents=True, exist_ok=True)
for capability in ((8, 0), (8, 6), (8, 9)):
    (job,) = gate.jobs_of(Card("cuda", capability), [encode()]).values()
    print(gate.compile_job(job)[1])
"""
    )
    *old, fine = printed.strip().splitlines()
    assert ["refused" in line for line in old] == [True, True]
    assert fine == "[]"


def test_shared_memory_spills_missing_instructions_and_longer_loops_are_faults() -> None:
    printed = ask(
        """
found = gate.compile_launch(encode(expected_mma="e4m3"), ADA)
print(found.registers > 0, found.stack_bytes, found.instruction == "")
print(gate.judge(encode(expected_mma="e4m3"), ADA, found))
print(gate.judge(encode(), ADA, found._replace(shared_bytes=101_377, stack_bytes=8)))
jump = "/*{}*/ @!P0 BRA{} 0x{} ; /* 0x94 */"
lines = [f"/*{16 * n:04x}*/ IADD3 R1, R2 ; /* 0x00 */" for n in range(40)]
print(gate.loop_length("\\n".join(lines)))
lines[9], lines[20] = jump.format("0090", "", "1f0"), jump.format("0140", ".U", "050")
lines[30] = jump.format("01e0", "", "040")
lines[39] = "/*0270*/ BRA 0x270;"
print(gate.loop_length("\\n".join(lines)))
jobs = list(gate.jobs_of(ADA, [encode()]).values())
tables = [gate.table(jobs, [(found._replace(loop_length=length), [])]) for length in (100, 105, 106)]
written = gate.rows_of(tables[0])
print([len(gate.longer_loops(table, written)) for table in tables], gate.longer_loops(tables[2], {}))
print(gate.longer_loops(tables[2], written))
"""
    )
    facts, promised, resources, straight, inner, grown, longer = printed.strip().splitlines()
    assert (straight, inner, grown) == ("40", "16", "[0, 0, 1] []")
    assert longer == "['e4m3: encode_kernel on 8.9: loops of 106 instructions, 100 before']"
    assert facts == "True 0 True"
    assert promised == "['no tensor-core instruction for e4m3']"
    assert "101377 bytes of shared memory; the card has 101376" in resources
    assert "8 bytes of stack: registers spill" in resources


def test_a_kernel_is_specialised_as_triton_does_it_at_a_launch() -> None:
    printed = ask(
        """
from triton.compiler import ASTSource
sizes = [(meta(4096), meta(4096, torch.uint8), count) for count in (4096, 100)]
whole, odd = (gate.source_of(encode()._replace(arguments=given)) for given in sizes)
print(whole.signature["x_ptr"], whole.signature["code_ptr"], whole.signature["count"], whole.signature["BLOCK"])
print(sorted(whole.attrs), sorted(odd.attrs))
one = gate.source_of(encode()._replace(arguments=(meta(4096)[1:], meta(4096, torch.uint8), 1)))
print(one.signature["count"], sorted(one.attrs))
"""
    )
    assert printed.splitlines() == [
        "*fp32 *u8 i32 constexpr",
        "[(0,), (1,), (2,)] [(0,), (1,)]",
        "constexpr [(1,)]",
    ]


def test_what_was_compiled_is_remembered_and_a_change_of_anything_is_another_kernel() -> None:
    printed = ask(
        """
launches = [encode(), encode(), encode(block=512), encode(warps=8), encode(native=False)]
print(len(gate.jobs_of(ADA, launches)))
(job,) = gate.jobs_of(ADA, [encode()]).values()
gate.CACHE.mkdir(parents=True, exist_ok=True)
first = gate.compile_job(job)
gate.compile_launch = None
print(first == gate.compile_job(job))
"""
    )
    assert printed.split() == ["4", "True"]
