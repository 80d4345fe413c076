"""Tables of kernel configurations, one per GPU family, and nothing at run time.

A table is a JSON file ``tables/sm_90.json`` beside this module, written by ``python -m
qat_kernels.tune`` on such a GPU and checked in: operation, then key, then the configuration's
fields. Where a table or an entry is missing, the operation's own heuristic decides. Tables are
read once; they never depend on M within decode, so that a loaded model always computes alike.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
"""Where the tables lie."""


@functools.cache
def table(capability: tuple[int, int]) -> Mapping[str, Mapping[str, Any]]:
    """The table of a GPU family: operation to key to fields. Empty where none is checked in.

    Raises:
        ValueError: the file is not such a table.
    """
    path = TABLES / f"sm_{capability[0]}{capability[1]}.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8"))["operations"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no table of configurations ({error})") from error


def configuration(
    operation: str, key: str, capability: tuple[int, int], heuristic: Mapping[str, int]
) -> dict[str, int]:
    """The tabled configuration of ``key`` for a GPU family, else the heuristic's.

    Args:
        operation: name of the kernel module.
        key: what the configuration depends on, such as ``n=4096 k=4096 bits=4 group=128``.
        capability: compute capability, such as (9, 0).
        heuristic: fields and values to fall back on; an entry may set some of them.

    Raises:
        ValueError: an entry sets a field that the heuristic does not know.
    """
    entry = table(capability).get(operation, {}).get(key, {})
    unknown = set(entry) - set(heuristic)
    if unknown:
        raise ValueError(f"tables/sm_{capability[0]}{capability[1]}.json: {key} sets {unknown}")
    return {**heuristic, **entry}
