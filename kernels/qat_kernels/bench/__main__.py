"""Command line: ``python -m qat_kernels.bench [NAME ...]``; see `qat_kernels.bench.timing`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from qat_kernels.bench import report
from qat_kernels.bench.case import Case
from qat_kernels.bench.cases import BENCHMARKS
from qat_kernels.bench.timing import Floor, floor, measure


def rows_of(case: Case, device: torch.device, limit: Floor, seconds: float) -> list[report.Row]:
    """Measure one case and compare its contestants with the first, the baseline."""
    times = measure(case.contestants, device, seconds)
    least = limit.seconds(case.moved, case.operations)
    baseline = next(iter(times.values())).p50
    return [
        report.Row(
            kernel=case.kernel,
            case=case.name,
            m=case.m,
            contestant=name,
            p20_us=found.p20 * 1e6,
            p50_us=found.p50 * 1e6,
            p80_us=found.p80 * 1e6,
            floor_us=least * 1e6,
            speed_up=baseline / found.p50,
            of_floor=least / found.p50,
            device=report.device_name(device),
            threads=torch.get_num_threads(),
            versions=report.versions(),
            commit=report.commit(),
            date=report.today(),
        )
        for name, found in times.items()
    ]


def run(
    names: Sequence[str], device: torch.device, seconds: float, small: bool
) -> list[report.Row]:
    """Measure all cases of the named kernels.

    Args:
        names: kernel modules; all if empty.
        device: cpu or cuda.
        seconds: to spend on each case.
        small: tiny shapes, for trying the command out.
    """
    limit = floor(device)
    print(
        f"{report.device_name(device)}, {torch.get_num_threads()} threads; floor: copy "
        f"{limit.bandwidth / 1e9:.1f} GB/s, bf16 matmul {limit.operations / 1e12:.2f} TFLOP/s"
    )
    rows = []
    for name in names or BENCHMARKS:
        for case in tqdm(list(BENCHMARKS[name](device, small)), desc=name, disable=None):
            # data is made here, one case at a time
            rows += rows_of(case(), device, limit, seconds)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print, append, plot; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qat_kernels.bench",
        description="Measure kernels beside the peers that are installed, in one run.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the CSVs")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no kernel named {unknown[0]}: {', '.join(BENCHMARKS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device here; use --device cpu")
    with torch.no_grad():
        rows = run(options.names, device, options.seconds, options.small)
    print(report.table(rows))
    paths = report.append(rows, options.results)
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        path = options.results / f"{kernel}-{device.type}.png"
        report.plot(own, path)
        paths.append(path)
    print("\n".join(f"written: {path}" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
