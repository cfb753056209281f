"""What a GPU kernel's hot loop costs, read off its machine code: issue slots, special functions and loads an element.

The hot loop is the innermost one with the most wide loads from global memory; where a row is copied to shared memory
ahead, from there, of the loops that write nothing to global memory. The path through it that counts is the shortest of
those that make all of its wide loads and at least `special` special functions (MUFU) an element: neither a row's edges,
which load less, nor a new maximum and the target's columns, which are seldom and take more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WIDE = 16  # bytes of the widest load that sm_80 and sm_90 have
REGISTERS, THREADS = 65536, 2048  # of an SM
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


class Instruction(NamedTuple):
    address: int
    op: str
    operands: str
    predicated: bool

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.op.split(".")[0] in ("BRA", "BRX") else None
        return int(found[1], 16) if found else None

    @property
    def bytes(self) -> int:
        """Of a load or a store."""
        bits = re.search(r"\.(?:[US]?(8|16|64|128|256))(?:\.|$)", self.op)
        return int(bits[1]) // 8 if bits else 4

    def loaded(self, memory: str = "LDG") -> int:
        """Bytes of a load from global memory, or from shared memory ("LDS")."""
        return self.bytes if self.op.split(".")[0] == memory else 0


class Loop(NamedTuple):
    """The hot loop of a kernel. slots, special: an element; width: bytes of its widest load; flight: bytes that are
    loaded at a time on an SM, by as many threads as its registers let be there."""

    slots: float
    special: float
    width: int
    flight: int


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton's package carries it too."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if os.access(path, os.X_OK) else None


def functions(file: Path) -> dict[str, list[Instruction]]:
    """Kernels for sm_90 or sm_90a in an object file or cubin, by (mangled) name; none where there is no cuobjdump."""
    program = tool("cuobjdump")
    if program is None:
        return {}
    path = f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # nvdisasm lies beside it
    command = [program, "--dump-sass", str(file)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\s*code for ", done.stdout, flags=re.MULTILINE)[1:]:
        if re.match(r"sm_90a?\b", part):
            _, *texts = re.split(r"^\s+Function : (\S+)$", part, flags=re.MULTILINE)
            found |= {name: [*instructions(body)] for name, body in zip(texts[::2], texts[1::2], strict=True)}
    return found


def instructions(text: str) -> Iterator[Instruction]:
    for match in LINE.finditer(text):
        yield Instruction(int(match[1], 16), match[2], match[3].strip(), "@" in match[0])


# ---- blocks and loops ------------------------------------------------------------------------------------------------


class Graph:
    """Straight pieces of a kernel's code, by the address each begins at, and where each may go on."""

    def __init__(self, code: list[Instruction]):
        starts = {code[0].address}
        for at, one in enumerate(code[:-1]):
            if one.target is not None or one.op.split(".")[0] in ("EXIT", "RET"):
                starts.add(code[at + 1].address)
                starts |= {one.target} if one.target is not None else set()
        self.blocks: dict[int, list[Instruction]] = {}
        for one in code:
            if one.address in starts:
                block = self.blocks[one.address] = []
            block.append(one)
        self.next: dict[int, list[int]] = {}
        order = [*self.blocks]
        for start, following in zip(order, [*order[1:], None], strict=True):
            last = self.blocks[start][-1]
            ends = last.op.split(".")[0] in ("BRA", "EXIT", "RET") and not last.predicated and "P" not in last.operands
            goes = [] if last.target is None else [last.target]
            self.next[start] = goes + ([following] if following is not None and not ends else [])

    def loops(self) -> list[tuple[int, set[int]]]:
        """(first block, all blocks) of every natural loop."""
        before: dict[int, set[int]] = {start: set() for start in self.blocks}
        for start, following in self.next.items():
            for other in following:
                before[other].add(start)
        dominators = self.dominators(before)
        found: dict[int, set[int]] = {}
        for start, following in self.next.items():
            for head in following:
                if head not in dominators[start]:
                    continue
                body, todo = found.setdefault(head, {head}), [start]
                while todo:
                    if (one := todo.pop()) not in body:
                        body.add(one)
                        todo += before[one]
        return [*found.items()]

    def dominators(self, before: dict[int, set[int]]) -> dict[int, set[int]]:
        first, *others = self.blocks
        every = set(self.blocks)
        found = {first: {first}} | dict.fromkeys(others, every)
        changed = True
        while changed:
            changed = False
            for start in others:
                of_all = [found[other] for other in before[start]]
                new = {start} | (set.intersection(*of_all) if of_all else set())
                changed |= new != found[start]
                found[start] = new
        return found

    def rounds(self, head: int, body: set[int], memory: str = "LDG") -> dict[tuple[int, int], int]:
        """(wide loads, special functions) of a way round the loop -> its fewest issue slots."""
        ways: dict[int, dict[tuple[int, int], int]] = {head: {(0, 0): 0}}
        whole: dict[tuple[int, int], int] = {}
        for start in self.sorted(head, body):
            for (loads, special), slots in ways.get(start, {}).items():
                block = self.blocks[start]
                so_far = (
                    loads + sum(one.loaded(memory) >= WIDE for one in block),
                    special + sum(one.op.startswith("MUFU") for one in block),
                )
                for other in self.next[start]:
                    table = whole if other == head else ways.setdefault(other, {}) if other in body else {}
                    table[so_far] = min(table.get(so_far, 1 << 30), slots + len(block))
        return whole

    def sorted(self, head: int, body: set[int]) -> list[int]:
        """The blocks of a loop, each after those it can be come to from; loops inside are gone through once."""
        seen: set[int] = {head}
        done: list[int] = []
        stack = [(head, iter(self.next[head]))]
        while stack:
            start, following = stack[-1]
            for other in following:
                if other in body and other not in seen:
                    seen.add(other)
                    stack.append((other, iter(self.next[other])))
                    break
            else:
                done.append(start)
                stack.pop()
        return done[::-1]


def hot_loop(code: list[Instruction], registers: int, threads: int, item: int, rows: int = 1, special: int = 1) -> Loop:
    """item: bytes of an element; rows: of what an element is read from (2: with a reference).

    Raises ValueError where no loop has wide loads and that many special functions an element."""
    graph = Graph(code)
    for memory in ("LDG", "LDS"):

        def count(op: str, body: set[int]) -> int:
            return sum(one.op.startswith(op) and one.bytes >= WIDE for start in body for one in graph.blocks[start])

        loops = sorted(graph.loops(), key=lambda loop: (count(memory, loop[1]), -len(loop[1])))
        for head, body in reversed(loops):
            if memory == "LDS" and count("STG", body):
                continue
            ways = graph.rounds(head, body, memory)
            loads = max((loads for loads, _ in ways), default=0)
            elements = loads * WIDE // (item * rows)
            enough = {slots: mufu for (n, mufu), slots in ways.items() if n == loads > 0 and mufu >= special * elements}
            if enough:
                slots = min(enough)
                blocks = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads)
                width = max(one.loaded(memory) for start in body for one in graph.blocks[start])
                return Loop(slots / elements, enough[slots] / elements, width, loads * WIDE * threads * blocks)
    raise ValueError(f"no loop with wide loads and {special} special functions an element")
