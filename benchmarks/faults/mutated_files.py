"""Do broken models and plans cause a traceback, a crash, a hang, or files in other folders?

Each case changes, removes, repeats or inserts bytes in a small model (partitioned with analytic costs) or in a plan
(loaded and run stage by stage), in a separate process with limits of 20 s and 4 GB. Only errors of onnxsplit are
allowed.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import build
import onnx

from benchmarks import harness
from onnxsplit.errors import OnnxsplitError
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify

TAKES = "5 min"

LIMIT_S, LIMIT_BYTES = 20, 4 << 30


def mutate(content: bytes, source: random.Random) -> bytes:
    """Change a few bytes, short runs of them, or the length."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 4, 16])):
        place = source.randrange(len(data) or 1)
        kind = source.randrange(5)
        if kind == 0 and data:
            data[place] = source.randrange(256)
        elif kind == 1 and data:
            data[place] ^= 1 << source.randrange(8)
        elif kind == 2:
            del data[place : place + source.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = data[place : place + source.randrange(1, 40)]
        else:
            data[place:place] = source.choice(
                [b"\xff\xff\xff\xff\x7f", b"\x80" * 8, b"../..", b"\0" * 9, b"/etc/passwd"]
            )
    return bytes(data)


def attempt(case: int, seed: int, models: list[bytes], plan: Path, model: Path, folder: Path) -> str:
    """Run one case in this process and return its outcome."""
    source = random.Random(f"{seed}-{case}")
    try:
        if case % 2:
            target = folder / "model.onnx"
            target.write_bytes(mutate(source.choice(models), source))
            partition(target, stages=2, out=folder / "out.plan", costs="analytic")
        else:
            copy = Path(shutil.copytree(plan, folder / "copy.plan"))
            victim = source.choice(["plan.json", "plan.json", "plan.json", "stage0.onnx", "example.npz"])
            (copy / victim).write_bytes(mutate((copy / victim).read_bytes(), source))
            verify(copy, model)
    except OnnxsplitError:
        return "refused"
    except BaseException:
        return "TRACEBACK " + traceback.format_exc().strip()[-600:]
    return "accepted"


def isolated(case: int, seed: int, models: list[bytes], plan: Path, model: Path, scratch: Path) -> str:
    """Run one case in a child process with limits, and look for files that it left outside its folder."""
    folder = scratch / "case"
    folder.mkdir()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(LIMIT_S)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        os.write(write, attempt(case, seed, models, plan, model, folder).encode()[:4000])
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    verdict = os.read(read, 4000).decode()
    os.close(read)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict = "HANG" if number == signal.SIGALRM else f"CRASH {signal.Signals(number).name}"
    allowed = {"model.onnx", "out.plan", "copy.plan"}
    outside = {p.name for p in folder.iterdir()} - allowed | {p.name for p in scratch.iterdir()} - {"case", "base"}
    half = verdict == "refused" and (folder / "out.plan").exists()
    shutil.rmtree(folder)
    return f"LEFT {sorted(outside)} {half}" if outside or half else verdict or "CRASH silent"


def main() -> None:
    """Print the counts and every bad case."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    bad = []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-fuzz-") as place:
        scratch = Path(place)
        base = scratch / "base"
        base.mkdir()
        model = build.save(build.chain(), base)
        partition(model, stages=2, out=base / "m.plan", costs="analytic")
        onnx.save(build.chain(2), base / "e.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        protos = [build.chain(), build.diamond(), build.with_if(), *(build.random_dag(n) for n in range(6))]
        models = [p.SerializeToString() for p in protos] + [(base / "e.onnx").read_bytes()]
        for case in range(given.cases):
            verdict = isolated(case, given.seed, models, base / "m.plan", model, scratch)
            counts[verdict.split(" ")[0]] += 1
            if verdict not in ("refused", "accepted"):
                bad.append((case, verdict))
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    text = [f"{given.cases} cases: {said}", *(f"  case {case}: {verdict}" for case, verdict in bad)]
    harness.Report(given).row({"cases": given.cases, "counts": counts, "bad": bad}, "\n".join(text))


if __name__ == "__main__":
    main()
