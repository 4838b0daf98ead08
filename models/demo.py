"""The demo: read the text in a picture with a trained network that is cut in two.

    python models/demo.py [PICTURE]

It fetches PP-OCRv4's text recogniser, cuts it in two, starts a process for each stage and sends the picture through
them. It prints the text, the comparison with the whole model, the stages and the request rates. It leaves the model,
the plan and the picture as an input in the current folder: demo.onnx, demo.plan and demo.npz.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from zoo import FetchError, fetch

from onnxsplit import Pipeline
from onnxsplit.cli.output import Output, binary, milliseconds
from onnxsplit.distance import distance
from onnxsplit.errors import OnnxsplitError
from onnxsplit.npz import save_npz
from onnxsplit.plan import Plan
from onnxsplit.planning.planner import partition
from onnxsplit.session import host_cores, open_session
from onnxsplit.tensors import Array
from runtime.bench import bench

MODEL, PLAN, INPUTS = Path("demo.onnx"), Path("demo.plan"), Path("demo.npz")
HEIGHT = 48  # pixels; the network was trained on text lines of this height


def picture(path: Path) -> Array:
    """Return a picture as the network's input: float32 [1, 3, 48, width] in [-1, 1], channels blue, green, red."""
    image = Image.open(path).convert("RGB")
    image = image.resize((max(16, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.float32)[:, :, ::-1] / 127.5 - 1.0
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def characters(model: Path) -> list[str]:
    """Return the network's classes from the model's metadata: class 0 means no character, the last one a space."""
    metadata = {entry.key: entry.value for entry in onnx.load(model, load_external_data=False).metadata_props}
    return ["", *metadata["character"].split("\n"), " "]


def read(probabilities: Array, alphabet: list[str]) -> str:
    """Return the text: the most likely class at every position, without repetitions and blanks."""
    best = probabilities[0].argmax(axis=1)
    kept = [now for before, now in zip([0, *best[:-1]], best, strict=True) if now != before]
    return "".join(alphabet[index] for index in kept if index < len(alphabet)).strip()


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, default=Path(__file__).with_name("demo.png"))
    parser.add_argument("--stages", type=int, default=2, help="number of stages to cut the model into")
    parser.add_argument("--slices", type=int, default=10, help="number of half-second slices to measure rates in")
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
    """Fetch the model, cut it, run it, compare it, measure it."""
    output.say("fetching PP-OCRv4's text recogniser (11 MB)")
    shutil.copyfile(fetch("ocr-recognizer"), MODEL)
    inputs = {"x": picture(image)}
    save_npz(INPUTS, inputs)
    plan = partition(MODEL, stages=stages, out=PLAN, inputs=INPUTS, say=output.say)
    output.say("starting nodes")
    with Pipeline.launch(PLAN) as pipeline:
        (answer,) = pipeline.run(inputs).values()
        processes = ", ".join(f"stage {node.stage} in process {node.pid}" for node in pipeline.nodes)
    (whole,) = open_session(MODEL, threads=host_cores()).run(inputs).values()
    alphabet = characters(MODEL)
    output.done()
    print(f"Picture       {image.name}, as {list(inputs['x'].shape)}")
    print(f"Ran as        {processes}")
    print(f"Text read     {read(answer, alphabet)}")
    print(f"Whole model   {read(whole, alphabet)}   (largest difference {distance(answer, whole):.1e} of the scale)\n")
    show_stages(output, plan)
    report = bench(PLAN, model=MODEL, inputs=INPUTS, slices=slices, say=output.say)
    output.done()
    print()
    output.table(
        ("requests a second", "median", f"x {report.basis}"),
        [(row.name, f"{row.per_s:.1f}", f"{row.ratio:.3f}") for row in report.rows],
    )
    print(f"\nWrote {MODEL}, {PLAN} and {INPUTS}. Next: onnxsplit verify {PLAN} {MODEL}")


def show_stages(output: Output, plan: Plan) -> None:
    """Print the time, the weights and the sent bytes of the whole model and of each stage."""
    rows = [("whole model", milliseconds(plan.costs.whole_time_ns), binary(plan.costs.whole_weight_bytes), "")]
    rows += [
        (
            f"stage {stage.index}",
            milliseconds(stage.measured_time_ns or stage.predicted_time_ns),
            binary(stage.weight_bytes),
            binary(sum(cut.bytes for cut in plan.cuts if cut.from_stage == stage.index)),
        )
        for stage in plan.stages
    ]
    output.table(("", "time", "weights", "bytes out"), rows)


if __name__ == "__main__":
    sys.exit(main())
