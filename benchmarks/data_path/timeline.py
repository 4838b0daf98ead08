"""When does each stage run, wait and send? Writes docs/trace.json and docs/trace.svg.

The JSON has the format of ``onnxsplit run --trace`` and opens in https://ui.perfetto.dev. The picture shows the same
events: a row for each node with its runs by request, below it the requests that wait or are on their way, and arrows
from stage to stage.
"""

from __future__ import annotations

import json
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from runtime import Pipeline

TAKES = "1 min"

WIDTH, LEFT, ROW, RUN, WAIT = 1100, 130, 74, 24, 7
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b"]
STYLE = (
    "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#333}.tick{text-anchor:middle;fill:#777}"
    ".in{text-anchor:middle;fill:#fff}.axis{stroke:#ccc}.arrow{stroke:#555;stroke-width:0.7}"
)


def picture(trace: dict[str, Any]) -> str:
    """Draw the events of a trace as SVG."""
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    start = min(event["ts"] for event in events if "ts" in event)
    end = max(event["ts"] + event.get("dur", 0) for event in events if "ts" in event)

    def x(time_us: float) -> float:
        return round(LEFT + (time_us - start) / (end - start) * (WIDTH - LEFT - 10), 2)

    def y(process: int) -> int:
        return 40 + process * ROW

    parts, arrows, bars = [], {}, {}
    for process, name in names.items():
        parts.append(f'<text x="6" y="{y(process) + 17}">{escape(name)}</text>')
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(process) + RUN}" y2="{y(process) + RUN}" class="axis"/>'
        )
    depth: dict[int, list[float]] = {}
    for event in events:
        process, request = event["pid"], event.get("args", {}).get("request")
        if event["ph"] == "X" and event["name"] in ("run", "send"):
            left, right = x(event["ts"]), x(event["ts"] + event["dur"])
            colour = COLOURS[request % len(COLOURS)]
            title = f"<title>request {request}: {event['name']} {event['dur'] / 1e3:.2f} ms</title>"
            parts.append(
                f'<rect x="{left}" y="{y(process)}" width="{max(0.6, right - left):.2f}" height="{RUN}" '
                f'fill="{colour}">{title}</rect>'
            )
            if event["name"] == "run" and right - left > 14:
                parts.append(f'<text x="{(left + right) / 2:.1f}" y="{y(process) + 16}" class="in">{request}</text>')
        elif event["ph"] == "b":
            bars[process, event["name"], request] = event["ts"]
        elif event["ph"] == "e":
            begun = bars.pop((process, event["name"], request))
            rows = depth.setdefault(process, [])
            free = next((n for n, until in enumerate(rows) if until <= begun), len(rows))
            rows[free : free + 1] = [event["ts"]]
            if free < 4:
                at = y(process) + RUN + 3 + free * (WAIT + 1)
                parts.append(
                    f'<rect x="{x(begun)}" y="{at}" width="{max(0.5, x(event["ts"]) - x(begun)):.2f}" height="{WAIT}" '
                    f'fill="{COLOURS[request % len(COLOURS)]}" opacity="0.45">'
                    f"<title>request {request}: {event['name']}</title></rect>"
                )
        elif event["ph"] == "s":
            arrows[event["id"]] = (x(event["ts"]), y(process) + RUN)
        elif event["ph"] == "f":
            from_x, from_y = arrows[event["id"]]
            parts.append(f'<line x1="{from_x}" y1="{from_y}" x2="{x(event["ts"])}" y2="{y(process)}" class="arrow"/>')
    height = y(max(names)) + ROW
    ticks = [start + (end - start) * step / 10 for step in range(11)]
    parts += [f'<text x="{x(tick)}" y="18" class="tick">{(tick - start) / 1e3:.0f} ms</text>' for tick in ticks]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def main() -> None:
    """Run, write and draw."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("name", nargs="?", default="resnet50", metavar="NAME|MODEL.onnx")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--models", type=Path, help="folder that keeps exported models")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "docs", help="folder to write to")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        plan = example_models.named_plan(given.name, Path(scratch), models=given.models)
        inputs = harness.example(plan)
        with Pipeline.launch(plan, trace=True) as pipeline:
            for _ in range(3):
                pipeline.run(inputs)
            pipeline.traced.clear()
            for future in [pipeline.submit(inputs) for _ in range(given.requests)]:
                future.result()
        trace = pipeline.trace()
    (given.out / "trace.json").write_text(json.dumps(trace))
    (given.out / "trace.svg").write_text(picture(trace))
    report = harness.Report(given)
    written = [str(given.out / name) for name in ("trace.json", "trace.svg")]
    report.row({"written": written}, f"Wrote {' and '.join(written)}")


if __name__ == "__main__":
    main()
