"""Is the pick of `onnxsplit advise` as good as the best of all candidates?

For each model, `advise` is asked for the highest rate at which 99 % of requests are answered within some times of what
one run takes. Then all candidates are run in turns, which takes long. If the best of these is not the pick, both are
run again, in turns and longer. The columns are the highest rates of the two that keep the p99, in requests per second,
and by how much the pick is below the best.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import msgspec

from benchmarks import example_models, harness
from onnxsplit.cli.advise import contender_of
from onnxsplit.planning.advice import AdviceOptions, Advisor
from onnxsplit.planning.candidates import DEFAULT_SHARE, Choice, Wishes
from onnxsplit.views.advice import Advice
from runtime.advise import LoadPlan, load_in_turns

TAKES = "40 min"

DEFAULT = ["resnet50", "bert", "ocr-classifier", "silero-vad", "smart-turn", "centerface"]


def advised(model: Path, dims: dict[str, int], p99_ms: float, effort: str) -> Advice:
    """What the command says."""
    words = [word for name, size in dims.items() for word in ("--dim", f"{name}={size}")]
    words += ["--p99", f"{p99_ms}ms", "--effort", effort, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "onnxsplit", "advise", model, *words],
        stdout=subprocess.PIPE,
        check=True,
    )
    return msgspec.convert(json.loads(done.stdout)["advice"], Advice)


def load(wishes: Wishes, *, turns: int, steps: int, seconds: float) -> LoadPlan:
    """How candidates are loaded."""
    return LoadPlan(
        rate_per_s=None,
        p99_ns=wishes.p99_ns,
        share=DEFAULT_SHARE,
        turns=turns,
        closed_s=seconds / 2,
        open_s=seconds,
        steps=steps,
    )


def whole_ms(choices: list[Choice]) -> float:
    """About the time of one run of the whole model in its fastest session, by the prediction."""
    return min(1e3 / c.predicted.limit_per_s for c in choices if c.predicted and c.candidate.kind == "session")


def main() -> None:
    """Print a row for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--times", type=float, default=5.0, help="the p99 that is asked for, in times of one run")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a slice at a rate")
    parser.add_argument("--effort", default="normal", help="effort of advise")
    given = parser.parse_args()
    report = harness.Report(
        given, model="16", p99_ms="8.1f", pick="28", best="28", pick_per_s="11.1f", best_per_s="11.1f", below="7.1%",
        candidates="11",
    )  # fmt: skip
    for name in given.names:
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
            model, dims = example_models.named(name, Path(folder))
            options = AdviceOptions(examined={"dims": dims})
            first = Advisor(model, Path(folder), Wishes(), options)
            p99_ms = given.times * whole_ms(first.choices())
            wishes = Wishes(p99_ns=round(p99_ms * 1e6))
            advice = advised(model, dims, p99_ms, given.effort)
            picked = advice.rows[0].choice.candidate
            advisor = Advisor(model, Path(folder) / "all", wishes, options)
            (Path(folder) / "all").mkdir()
            choices = [c for c in advisor.choices() if not c.left_out]
            contenders = {c.candidate.name: contender_of(c, advisor) for c in choices}
            every = load_in_turns(
                list(contenders.values()), advisor.inputs(), load(wishes, turns=2, steps=8, seconds=given.seconds)
            )
            best = max(zip(contenders, every, strict=True), key=lambda pair: pair[1].rate_per_s)[0]
            rates = {name: result.rate_per_s for name, result in zip(contenders, every, strict=True)}
            if picked.name != best:
                both = [contenders[picked.name], contenders[best]]
                again = load(wishes, turns=3, steps=12, seconds=2 * given.seconds)
                results = load_in_turns(both, advisor.inputs(), again)
                rates |= {one.name: result.rate_per_s for one, result in zip(both, results, strict=True)}
            report.row(
                {
                    "model": name,
                    "p99_ms": p99_ms,
                    "pick": picked.name,
                    "best": best,
                    "pick_per_s": rates[picked.name],
                    "best_per_s": rates[best],
                    "below": 1 - rates[picked.name] / rates[best] if rates[best] else None,  # where no way keeps it
                    "candidates": len(choices),
                }
            )


if __name__ == "__main__":
    main()
