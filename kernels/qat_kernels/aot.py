"""Compile every shipped kernel configuration without a GPU, and hold the binaries to their gates.

``python -m qat_kernels.aot [NAME ...] [--sm 90]`` compiles for sm_80, sm_90 and sm_100, prints one
line per binary and ends with 1 if a gate is missed. Gates:

spills        no local memory and no stack
loads         at least one global load of 16 bytes, where the configuration's layout allows it
instructions  SASS instructions of one trip through the main loop, times threads, per value that
              the trip handles (of the whole program, where there is no loop): issue slots are what
              a kernel on low-bit weights runs out of before bandwidth

Each kernel module lists what it launches in ``shipped()``; the launcher reads the same constants.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qat_kernels.support import triton

MODULES = (
    "fake_quant_launch",
    "nf4_launch",
    "w4a16_launch",
    "activation_quant",
    "scaled_matmul",
    "kv_cache_triton",
    "kv_cache_write",
)
"""Kernel modules, each with a function ``shipped()``."""
CAPABILITIES = (80, 90, 100)
"""Architectures: Ampere, Hopper, Blackwell."""


@dataclass(frozen=True)
class Shipped:
    """One configuration that a launcher uses, with the gates that its binary must pass."""

    name: str
    """Module and configuration, such as ``w4a16 int4 g128 safe``."""
    kernel: Any
    """The `triton.jit` function."""
    types: Mapping[str, str]
    """Triton type of every run-time argument: ``*bf16``, ``*i32``, ``i32``, ``fp32`` ..."""
    constants: Mapping[str, Any]
    """Value of every constexpr argument."""
    num_warps: int
    """Warps per program."""
    num_stages: int = 3
    """Depth of the software pipeline."""
    fp_fusion: bool = True
    """Whether a product and a sum may become one rounding (fused multiply-add)."""
    divisible: Sequence[str] = ()
    """Integer arguments that are multiples of 16 whenever this configuration is launched."""
    unaligned: Sequence[str] = ()
    """Pointers that need not be aligned to 16 bytes."""
    values: int = 0
    """Values (weights ...) that one program handles per trip of its main loop; 0: not counted."""
    most_instructions: Mapping[int, float] = field(default_factory=dict)
    """Capability to the most thread-instructions per value; no gate for others."""
    wide_loads: bool = True
    """Whether the layout allows global loads of 16 bytes."""
    capabilities: Sequence[int] = CAPABILITIES
    """Architectures for which this configuration is launched."""
    forbidden: Sequence[str] = ()
    """Operations that must not be in the binary, such as HGMMA (wgmma)."""


@dataclass(frozen=True)
class Binary:
    """What the compiler made of one configuration for one architecture."""

    name: str
    capability: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of local memory and stack per thread."""
    shared: int
    """Bytes of shared memory per program."""
    wide: int
    """Global loads of 16 bytes."""
    instructions: float | None
    """Thread-instructions per value; None where values are not counted."""
    tensor_core: str
    """The matrix instruction in the binary: HMMA, HGMMA, IMMA ..., or an empty string."""
    problems: tuple[str, ...]
    """Gates that were missed."""


def all_shipped(names: Sequence[str] = ()) -> list[Shipped]:
    """Every shipped configuration, of the modules ``names`` only if any are given."""
    modules = [importlib.import_module(f"qat_kernels.{name}") for name in names or MODULES]
    return [item for module in modules for item in module.shipped()]


def compile_shipped(item: Shipped, capability: int) -> Any:
    """Triton's compiled kernel (``.asm`` holds PTX and cubin) for sm_``capability``, no GPU needed.

    Raises:
        RuntimeError: Triton is not installed, or interprets kernels (TRITON_INTERPRET).
    """
    if triton is None or not isinstance(item.kernel, triton.runtime.JITFunction):
        raise RuntimeError("compiling kernels takes Triton, and TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names
    given = {*item.types, *item.constants}
    assert set(names) == given, f"{item.name}: arguments {set(names) ^ given}"
    signature = {n: item.types.get(n, "constexpr") for n in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if name in item.divisible
        or (item.types.get(name, "").startswith("*") and name not in item.unaligned)
    ]
    source = ASTSource(
        fn=item.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in item.constants.items()},
        # without this there are no vector loads
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": item.num_warps,
        "num_stages": item.num_stages,
        "enable_fp_fusion": item.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(item: Shipped, capability: int) -> Binary:
    """Compile, disassemble and judge one configuration."""
    compiled = compile_shipped(item, capability)
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage).group(1))  # type: ignore[union-attr]
        for key in ("REG", "STACK", "LOCAL")
    )
    code = parse_sass(sass)
    wide = sum(
        bool(re.match(r"(LDG|LDGSTS)\b.*\.128|UBLKCP|UTMALDG", op)) for op in code.operations
    )
    kinds = ("UTCHMMA", "UTCIMMA", "UTCQMMA", "HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA")
    used = [kind for kind in kinds if any(op.startswith(kind) for op in code.operations)]
    per_value = None
    if item.values:
        per_value = code.loop_length() * item.num_warps * 32 / item.values
    binary = Binary(
        item.name,
        capability,
        registers,
        stack + local,
        compiled.metadata.shared,
        wide,
        per_value,
        used[0] if used else "",
        (),
    )
    return Binary(**{**binary.__dict__, "problems": tuple(_problems(item, binary))})


def _problems(item: Shipped, binary: Binary) -> Iterator[str]:
    if binary.spilled:
        yield f"spills {binary.spilled} bytes"
    if item.wide_loads and not binary.wide:
        yield "no 16-byte loads"
    if binary.tensor_core in item.forbidden:
        yield f"holds {binary.tensor_core}"
    limit = item.most_instructions.get(binary.capability)
    if limit is not None and (binary.instructions is None or binary.instructions > limit):
        yield f"over {limit:g} instructions per value"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) as cuobjdump, which is part of Triton's wheel, prints them."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        outputs = []
        for option in ("-res-usage", "-sass"):
            command = [tool, option, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            outputs.append(done.stdout + done.stderr)
    return outputs[0], outputs[1]


@dataclass(frozen=True)
class Sass:
    """Disassembled machine code: operations in order, and the loops as index ranges."""

    operations: list[str]
    loops: list[tuple[int, int]]

    def loop_length(self) -> int:
        """Instructions of the longest innermost loop; without loops, those of the program."""
        inner = [
            (a, b)
            for a, b in self.loops
            if not any((a, b) != (c, d) and a <= c and d <= b for c, d in self.loops)
        ]
        longest = max((b - a + 1 for a, b in inner), default=0)
        return longest or len([op for op in self.operations if not op.startswith("NOP")])


def parse_sass(text: str) -> Sass:
    """Read cuobjdump's listing: ``/*0a10*/  @P0 BRA 0x920 ;`` and the like."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", text, re.M)
    index = {int(address, 16): i for i, (address, _) in enumerate(found)}
    operations = [operation for _, operation in found]
    loops = []
    for i, operation in enumerate(operations):
        target = re.search(r"^BRA\b.*?0x([0-9a-f]+)", operation)
        # a jump to itself is the padding after the end
        if target and index.get(int(target.group(1), 16), i) < i:
            loops.append((index[int(target.group(1), 16)], i))
    return Sass(operations, loops)


def table(binaries: Sequence[Binary]) -> str:
    """The report: one line per binary."""
    width = max([len(binary.name) for binary in binaries] + [6])
    lines = [
        f"{'kernel':{width}}   sm  regs  spill  shared  16B loads  mma    instr/value  result",
    ]
    for b in binaries:
        counted = "-" if b.instructions is None else f"{b.instructions:.2f}"
        result = ", ".join(b.problems) or "ok"
        lines.append(
            f"{b.name:{width}}  {b.capability:3}  {b.registers:4}  {b.spilled:5}  {b.shared:6}  "
            f"{b.wide:9}  {b.tensor_core or '-':7}{counted:>10}  {result}"
        )
    return "\n".join(lines)


def _inspect_one(place: tuple[str, int, int]) -> Binary:
    """One entry of `all_shipped([module])`, found again in another process."""
    module, i, capability = place
    return inspect(all_shipped([module])[i], capability)


def inspect_all(names: Sequence[str] = (), capabilities: Sequence[int] = ()) -> list[Binary]:
    """Compile and judge all shipped configurations, one process per core, with a progress bar."""
    places = [
        (module, i, capability)
        for module in names or MODULES
        for i, item in enumerate(all_shipped([module]))
        for capability in item.capabilities
        if not capabilities or capability in capabilities
    ]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(os.cpu_count() or 1, len(places)))
    with ProcessPoolExecutor(mp_context=context, max_workers=workers) as pool:
        done = pool.map(_inspect_one, places)
        return list(tqdm(done, total=len(places), desc="compiling", disable=None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qat_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], help="kernel modules")
    parser.add_argument("--sm", type=int, action="append", choices=CAPABILITIES, default=[])
    options = parser.parse_args(arguments)
    binaries = inspect_all(options.names, options.sm)
    print(table(binaries))
    missed = [binary for binary in binaries if binary.problems]
    print(f"{len(binaries)} binaries, {len(missed)} miss a gate")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
