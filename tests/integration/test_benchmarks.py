"""Every benchmark starts, says which question it answers and how long that takes, and is listed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELP = """
import contextlib, io, runpy, sys
for file in sys.argv[1:]:
    sys.argv, said = [file, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    assert "Takes about " in said.getvalue() and "--json" in said.getvalue(), file
print("all")
"""


def listed() -> list[str]:
    lines = subprocess.run(
        [sys.executable, "benchmarks"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.splitlines()
    return [line.split()[0] for line in lines if line.split("   ")[0].count("/") == 1 and not line.startswith("Run")]


def test_every_file_that_measures_is_listed_with_a_question():
    files = {str(file.relative_to(ROOT / "benchmarks")) for file in ROOT.glob("benchmarks/*/*.py")}
    measuring = {name for name in files if "harness.parser(" in (ROOT / "benchmarks" / name).read_text()}
    assert {f"{name}.py" for name in listed()} == measuring
    for name in measuring:
        question = (ROOT / "benchmarks" / name).read_text().partition("\n")[0]
        assert "?" in question, name


def test_every_benchmark_starts(python_environment):
    files = [f"benchmarks/{name}.py" for name in listed()]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *files], env=python_environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "all", done.stderr[-2000:]
