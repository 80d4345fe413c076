"""Find the fastest configurations on this GPU and write them into its family's table.

``python -m qat_kernels.tune [--shape N,K ...] [--bits 4] [--group 128]`` measures every candidate
configuration of the W4A16 matmul, at 1 and at 16 rows, drops those whose result is not exact on
integers, and writes the winner to ``tables/sm_XX.json`` (see `tuning`). The file is meant to be
checked in; nothing is tuned at run time. A configuration holds for every M.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qat_kernels import tuning
from qat_kernels.bench.report import device_name, today, versions
from qat_kernels.bench.timing import Call, measure
from qat_kernels.w4a16_launch import Config, config_of, fast_is_safe, matmul
from qat_kernels.w4a16_planes import Layout, layout, to_planes

SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (14336, 4096),
    (28672, 4096),
    (4096, 14336),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
)
"""(N, K) of the layers of 1 to 8 billion parameter models, fused projections included."""


def candidates(plan: Layout, k: int, fast: bool) -> Iterator[Config]:
    """Every configuration worth measuring; tiles that become wgmma only where ``fast``."""
    tiles = [(16, 1), (32, 1), (32, 2)] + [(64, 4), (128, 4)] * fast
    trips = -(-k // plan.step)
    for block_n, num_warps in tiles:
        for num_stages in (3, 4, 6):
            for splits in (1, 2, 4, 8):
                if splits <= trips:
                    yield Config(block_n, num_warps, num_stages, splits)


class Problem:
    """One weight shape with data: x [16, K] of -1, 0 and 1, random codes, one scale.

    Sums are integers below 2^7 K times the scale 2^-6: exact in every order for K up to 2^17.
    """

    def __init__(self, n: int, k: int, plan: Layout, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(n + k)
        low = -(1 << (plan.bits - 1))
        codes = torch.randint(low, -low, (n, k), generator=generator).to(torch.int8)
        words, high = to_planes(codes, plan)
        groups = words.shape[1] * plan.fields // plan.group
        self.scale = torch.full((n, groups), 2.0**-6, dtype=torch.bfloat16, device=device)
        self.words = words.to(device)
        self.high = None if high is None else high.to(device)
        x = torch.randint(-1, 2, (16, k), generator=generator).float()
        self.x = x.to(device, torch.bfloat16)
        self.expected = (x @ codes.float().T * 2.0**-6).to(torch.bfloat16)
        self.plan = plan

    def run(self, m: int, config: Config) -> Tensor:
        """The result for the first m rows."""
        arguments = (self.words, self.high, self.scale, None, None, None, self.plan, config)
        return matmul(self.x[:m], *arguments)

    def call(self, m: int, config: Config) -> Call:
        """One launch, to be timed."""
        return lambda: self.run(m, config)

    def is_exact(self, config: Config) -> bool:
        """Whether a configuration compiles here and computes the right integers."""
        try:
            got = self.run(16, config).cpu()
        except Exception as error:  # too many registers or too much shared memory, by any name
            tqdm.write(f"{config}: {(str(error) or type(error).__name__).splitlines()[0]}")
            return False
        return torch.equal(got, self.expected)


def best(n: int, k: int, plan: Layout, device: torch.device, seconds: float) -> Config:
    """The fastest exact configuration for a weight [n, k], by the time of 1 row plus that of 16.

    Raises:
        RuntimeError: none is exact.
    """
    capability = torch.cuda.get_device_capability(device)
    problem = Problem(n, k, plan, device)
    tried = [config_of(n, k, plan, capability)]
    tried += candidates(plan, k, fast_is_safe(capability))
    found = [config for config in dict.fromkeys(tried) if problem.is_exact(config)]
    if not found:
        raise RuntimeError(f"n={n} k={k}: no configuration computes right here")
    total = dict.fromkeys(found, 0.0)
    for m in (1, 16):
        calls = {str(config): [problem.call(m, config)] for config in found}
        times = measure(calls, device, seconds)
        for config in found:
            total[config] += times[str(config)].p50
    return min(total, key=lambda config: total[config])


def write(entries: dict[str, Any], capability: tuple[int, int], about: str) -> Path:
    """Merge entries for the W4A16 matmul into the family's table; returns its path."""
    tuning.TABLES.mkdir(exist_ok=True)
    path = tuning.TABLES / f"sm_{capability[0]}{capability[1]}.json"
    old = json.loads(path.read_text("utf-8")) if path.is_file() else {"operations": {}}
    operations = old["operations"]
    operations["w4a16"] = {**operations.get("w4a16", {}), **entries}
    content = {"measured": about, "operations": operations}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition(",")
    return int(n), int(k)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qat_kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", type=_shape, action="append", metavar="N,K", default=[])
    parser.add_argument("--bits", type=int, default=4, help="width of the codes (default 4)")
    parser.add_argument("--group", type=int, action="append", default=[], help="default 32 and 128")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each shape and M")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning takes the GPU that it tunes for, and there is none here")
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    entries = {}
    for group in options.group or (32, 128):
        plan = layout(options.bits, group)
        if plan is None:
            parser.error(f"--group {group}: the kernel takes multiples of 16")
        for n, k in tqdm(options.shape or SHAPES, desc=f"group {group}"):
            winner = best(n, k, plan, device, options.seconds)
            entries[f"n={n} k={k} bits={plan.bits} group={plan.group}"] = asdict(winner)
    about = f"{device_name(device)}, {versions()}, {today()}"
    path = write(entries, capability, about)
    print(f"{len(entries)} entries written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
