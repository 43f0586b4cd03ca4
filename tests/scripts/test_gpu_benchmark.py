"""`benchmarks/gpu.py --quick`, which runs where there is no GPU: what it prints is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.py"


@pytest.mark.parametrize(("limit", "status"), [("300", 0), ("0.1", 1)], ids=["whole", "stopped"])
def test_every_part_has_its_rows(limit, status):
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--parts", "volume", "--limit", limit]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == status, done.stderr
    assert {row["part"] for row in rows} == {"volume"}
    if status:
        assert [row["failed"] for row in rows] == ["stopped after 0.1 s"]
    else:
        assert len(rows) == 3 and all(row["measured"] > 0 for row in rows)
    assert done.stdout.count("| ") >= len(rows)
