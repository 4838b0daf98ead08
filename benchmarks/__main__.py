"""List the benchmarks and about how long each takes, or run one.

python benchmarks                          list them
python benchmarks data_path/hop [OPTION ...]   run one
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def listed() -> dict[str, tuple[str, str]]:
    """The name of each benchmark (``FOLDER/FILE``), about how long it takes, and the question that it answers."""
    benchmarks = {}
    for file in sorted(FOLDER.glob("*/*.py")):
        tree = ast.parse(file.read_text())
        for statement in tree.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="TAKES")], value=ast.Constant(value=str(takes))):
                    question = (ast.get_docstring(tree) or "").partition("\n")[0]
                    benchmarks[f"{file.parent.name}/{file.stem}"] = takes, question
    return benchmarks


def main() -> None:
    """List the benchmarks, or run the one that is named."""
    name, *words = sys.argv[1:] or [""]
    if name not in listed():
        for known, (takes, question) in listed().items():
            print(f"{known:26} {takes:>14}   {question}")
        print("\nRun one with: make bench BENCH=FOLDER/FILE   or: python benchmarks FOLDER/FILE [OPTION ...]")
        sys.exit(f"There is no benchmark {name}." if name else 0)
    os.execv(sys.executable, [sys.executable, str(FOLDER / f"{name}.py"), *words])


if __name__ == "__main__":
    main()
