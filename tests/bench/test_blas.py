"""The product for few rows that learning runs on a Linux CPU may use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = """
import json
from bench.blas.check import ROWS, SHAPES, error
errors = {f"{m} {k} {n}": error(m, k, n) for m in ROWS for k, n in SHAPES if n < 10_000}
maps = open("/proc/self/maps").read()
print(json.dumps({"errors": errors, "loaded": ".cache/blas/short.so" in maps}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of a Linux CPU")
def test_it_is_loaded_before_openblas_and_as_exact() -> None:
    with_it = ["sh", str(ROOT / "bench" / "blas" / "with.sh")]
    done = subprocess.run(
        [*with_it, sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["loaded"]
    assert {name: e for name, e in found["errors"].items() if e > 2e-6} == {}
