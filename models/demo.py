"""The demo: read the text in a picture with a trained network that is cut in two.

    python models/demo.py [PICTURE]

Fetches PP-OCRv4's text recogniser, cuts it on the picture, starts a process for every stage, sends the picture through
them, and prints the text, the comparison with the whole model, the stages, and the speed beside what is possible.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from zoo import FetchError, fetch

from onnxsplit.cli.output import Output, binary, milliseconds
from onnxsplit.errors import OnnxsplitError
from onnxsplit.npz import save_npz
from onnxsplit.planning.planner import partition
from onnxsplit.session import host_cores, open_session
from onnxsplit.stages.verify import distance
from onnxsplit.tensors import Array
from runtime import Pipeline
from runtime.bench import bench

HEIGHT = 48  # of the pictures the network was trained on


def picture(path: Path) -> Array:
    """A picture as the network takes it: [1, 3, 48, width], blue green red, -1 to 1."""
    image = Image.open(path).convert("RGB")
    image = image.resize((max(16, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.float32)[:, :, ::-1] / 127.5 - 1.0
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def characters(model: Path) -> list[str]:
    """The network's alphabet, kept in the model's metadata: class 0 is no character, the last one a space."""
    metadata = {entry.key: entry.value for entry in onnx.load(model, load_external_data=False).metadata_props}
    return ["", *metadata["character"].split("\n"), " "]


def read(probabilities: Array, alphabet: list[str]) -> str:
    """The likeliest class at every place, repetitions and blanks taken out."""
    best = probabilities[0].argmax(axis=1)
    kept = [now for before, now in zip([0, *best[:-1]], best, strict=True) if now != before]
    return "".join(alphabet[index] for index in kept if index < len(alphabet)).strip()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, default=Path(__file__).with_name("demo.png"))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--slices", type=int, default=10, help="slices of the speed measurement")
    given = parser.parse_args()
    output = Output(as_json=False)
    try:
        show(output, given.picture, given.stages, given.slices)
    except (OnnxsplitError, FetchError) as error:
        output.done()
        print(error, file=sys.stderr)
        return 1
    return 0


def show(output: Output, image: Path, stages: int, slices: int) -> None:
    """Fetch, cut, run, compare, measure."""
    output.say("fetching PP-OCRv4's text recogniser (11 MB)")
    model = fetch("ocr-recognizer")
    inputs = {"x": picture(image)}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-demo-") as folder:
        plan = partition(model, stages=stages, out=Path(folder) / "ocr.plan", inputs=inputs, say=output.say)
        output.say("starting nodes")
        with Pipeline.launch(Path(folder) / "ocr.plan") as pipeline:
            (answer,) = pipeline.run(inputs).values()
            processes = ", ".join(f"stage {node.stage} in process {node.pid}" for node in pipeline.nodes)
        (whole,) = open_session(model, threads=host_cores()).run(inputs).values()
        output.done()
        alphabet = characters(model)
        print(f"Picture       {image.name}, as {list(inputs['x'].shape)}")
        print(f"Ran as        {processes}")
        print(f"Text read     {read(answer, alphabet)}")
        print(
            f"Whole model   {read(whole, alphabet)}   (largest difference {distance(answer, whole):.1e} of the scale)\n"
        )
        rows = [
            (
                f"stage {stage.index}",
                milliseconds(stage.measured_time_ns or stage.predicted_time_ns),
                binary(stage.weight_bytes),
                binary(sum(cut.bytes for cut in plan.cuts if cut.from_stage == stage.index)),
            )
            for stage in plan.stages
        ]
        costs = plan.costs
        rows.insert(0, ("whole model", milliseconds(costs.whole_time_ns), binary(costs.whole_weight_bytes), ""))
        output.table(("", "time", "weights", "bytes out"), rows)
        example = Path(folder) / "picture.npz"
        save_npz(example, inputs)
        report = bench(Path(folder) / "ocr.plan", model=model, inputs=example, slices=slices, say=output.say)
        output.done()
    print()
    output.table(
        ("requests a second", "median", "pipeline over it"),
        [(row.name, f"{row.per_s:.1f}", f"{row.ratio:.3f}") for row in report.rows],
    )


if __name__ == "__main__":
    sys.exit(main())
