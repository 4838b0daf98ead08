"""Does a pipeline of the CPU and a GPU give the model's answers, and at the predicted rate?

It uses `cuda` if ONNX Runtime has it and finds a GPU, and the plugin `webgpu` otherwise. Each model is cut in two, for
one stage on the CPU and one on the GPU. The pipeline is measured in turns with two stages on the CPU and with sessions
of the whole model. Without a GPU, it says what it found and ends with 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness, unlike_providers
from onnxsplit.providers import provider_problem, runtime_version

TAKES = "4 min"

DEFAULT = ["chain-1ms", "ocr-classifier", "basic-pitch"]


def main() -> None:
    """Print a row for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=8, metavar="N", help="slices of each contender")
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="length of a slice")
    parser.add_argument("--provider", help="the GPU's provider. Default: cuda, or else webgpu")
    given = parser.parse_args()
    wanted = [given.provider] if given.provider else ["cuda", "webgpu"]
    problems = {text: provider_problem(text) for text in wanted}
    usable = [text for text, problem in problems.items() if problem is None]
    if not usable:
        found = "\n".join(f"  {text}: {problem}" for text, problem in problems.items())
        sys.exit(f"No GPU was found, so nothing was measured:\n{found}")
    report = harness.Report(given, **unlike_providers.COLUMNS)
    report.note(f"ONNX Runtime {runtime_version()}; the GPU's provider is {usable[0]}.")
    if not unlike_providers.compare(given, report, usable[0]):
        sys.exit("Some answers differ, or a model could not be cut.")


if __name__ == "__main__":
    main()
