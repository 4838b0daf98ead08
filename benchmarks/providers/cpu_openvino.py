"""Is a pipeline of the CPU and OpenVINO faster than the CPU alone, and are its answers the same?

Each model is cut in two for one thread on the CPU and one on OpenVINO, by which ops OpenVINO takes and by how fast it
runs the model. The pipeline is measured in turns with two stages on the CPU and with sessions of the whole model. It
needs OpenVINO: `pip install 'onnxsplit[openvino]'` on a CPU of Intel; on another one, the package
`onnxruntime-openvino` in place of `onnxruntime`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness, unlike_providers
from onnxsplit.providers import provider_problem, runtime_version

TAKES = "7 min"

DEFAULT = ["ocr-classifier", "ocr-recognizer", "basic-pitch", "table"]


def main() -> None:
    """Print a row for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=12, metavar="N", help="slices of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="length of a slice")
    parser.add_argument("--provider", default="openvino", help="the provider with its options")
    given = parser.parse_args()
    problem = provider_problem(given.provider)
    if problem is not None:
        sys.exit(f"Nothing was measured: {problem}")
    report = harness.Report(given, **unlike_providers.COLUMNS)
    report.note(f"ONNX Runtime {runtime_version()}, provider {given.provider}")
    if not unlike_providers.compare(given, report, given.provider):
        sys.exit("Some answers differ, or a model could not be cut.")


if __name__ == "__main__":
    main()
