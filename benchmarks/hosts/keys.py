"""How much does encryption slow a pipeline whose nodes are on a network?

Two stages do almost nothing, with tensors of 64 KiB and of 4 MiB between them, over loopback and without shared memory,
so that all tensors pass through the link. One pipeline has keys and one has none; both run at once and take turns.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.example_models import one_tensor
from onnxsplit.session import quiet_environment
from runtime import Pipeline
from runtime.wire.keys import create_for

TAKES = "1 min"


def launched(stack: ExitStack, plan: Path, keys: Path | None) -> Pipeline:
    """Start a pipeline whose nodes are on tcp."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    for name in ("a", "b"):
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--no-shared-memory"]
        command += ["--threads", "1"] + (["--keys", str(keys / name)] if keys is not None else [])
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=quiet_environment())
        stack.callback(process.wait, 20)
    own = keys / "coordinator" if keys is not None else None
    return stack.enter_context(Pipeline.listen(plan, bind=address, keys=own, shared_memory=False, start_timeout=60))


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a slice")
    given = parser.parse_args()
    report = harness.Report(given, bytes="8", with_keys_per_s="15.1f", plain_per_s="11.1f", ratio="19")
    for size in (64 << 10, 4 << 20):
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
            create_for(scratch / "keys", ("a", "b"))
            plan = one_tensor(size, scratch)
            inputs = harness.example(plan)
            both = {"with_keys": launched(stack, plan, scratch / "keys"), "plain": launched(stack, plan, None)}
            contenders = {name: lambda p=p, x=inputs: harness.rate(p, x, given.seconds) for name, p in both.items()}
            rates = harness.in_turns(contenders, given.slices)
            medians = {f"{name}_per_s": statistics.median(values) for name, values in rates.items()}
            report.row({"bytes": size, **medians, "ratio": str(harness.ratio(rates["with_keys"], rates["plain"]))})


if __name__ == "__main__":
    main()
