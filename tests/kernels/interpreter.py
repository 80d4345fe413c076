"""Tests of kernels in Triton's interpreter, which is chosen when triton is imported.

A test file marks what runs there with `interpreted` and the rest with `compiled`, and one compiled
test starts the file again in such a process and says how many tests must pass in it.
"""

import os
import re
import subprocess
import sys

import pytest

from qat_kernels import support

INTERPRETED = support.interpreted()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="does not run in the interpreter's process")


def passed_in_the_interpreter(file: str) -> int:
    """Run a test file with TRITON_INTERPRET=1: how many tests passed; none may fail."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"^(\d+) passed", done.stdout, re.M)
    assert found is not None, done.stdout
    return int(found.group(1))
