"""Nodes whose stages sleep: each op takes a given time on a device of speed 1, and the speeds can change meanwhile."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper, save_model

from onnxsplit.cluster import Cluster, Device
from onnxsplit.plan import Plan
from onnxsplit.planning.planner import partition
from runtime.launch.local import LocalHandle, LocalLauncher
from runtime.node import serve
from runtime.node.stage_runner import StageRunner
from runtime.recut.watching import device_of

_starting = threading.Lock()


class Devices:
    """The speeds of devices, which processes read from files.

    Args:
        folder: an empty folder for the files.
        names: the names of the devices.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        for name in names:
            self.set(name, 1.0)

    def set(self, name: str, speed: float) -> None:
        """Change the speed of a device."""
        draft = self.folder / f".{name}"
        draft.write_text(str(speed))
        draft.rename(self.folder / name)

    def plan(self, folder: Path, ops: int = 12) -> Path:
        """A plan of a row of ops, with one stage for each device."""
        save_model(_row(ops), str(folder / "row.onnx"))
        cluster = folder / "cluster.toml"
        cluster.write_text(Cluster(tuple(Device(name=name, host=name) for name in self.names), {}).to_toml())
        partition(
            folder / "row.onnx", out=folder / "row.plan", cluster=cluster, stages=len(self.names), costs="analytic"
        )
        return folder / "row.plan"


def _row(ops: int) -> Any:
    nodes = [helper.make_node("Neg", [f"t{n}"], [f"t{n + 1}"]) for n in range(ops)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("t0", f"t{ops}")]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


class SleepingLauncher(LocalLauncher):
    """Starts nodes that sleep.

    Args:
        plan: their plan.
        devices: the speeds of its devices.
        op_s: the time of one op on a device of speed 1.
        background_s: as for :class:`LocalLauncher`.
    """

    module = "sleeping"

    def __init__(self, plan: Plan, devices: Devices, op_s: float = 0.02, background_s: float = 0.0) -> None:
        super().__init__(memory_bytes=64 << 20, background_s=background_s)
        self._plan, self._devices, self._op_s = plan, devices, op_s

    def start(self, *, stage: int, replica: int, **words: Any) -> LocalHandle:
        file = self._devices.folder / device_of(self._plan, stage, replica)
        with _starting:
            os.environ["SLEEPING"] = json.dumps([self._plan.stages[stage].ops * self._op_s, str(file)])
            return super().start(stage=stage, replica=replica, **words)

    def beside(self, plan: Plan, *, background_s: float = 0.0, **_: Any) -> SleepingLauncher:
        return SleepingLauncher(plan, self._devices, self._op_s, background_s)


def main() -> int:
    """Patch the session's run, then start a node."""
    seconds, file = json.loads(os.environ["SLEEPING"])
    run, bound = StageRunner.run, StageRunner.bound

    def sleep() -> None:
        time.sleep(seconds / float(Path(file).read_text()))

    def sleep_and_run(self: Any, inputs: Any, into: Any) -> Any:
        sleep()
        return run(self, inputs, into)

    def bind(self: Any, inputs: Any, into: Any) -> Callable[[], None]:
        once = bound(self, inputs, into)

        def sleep_once() -> None:
            sleep()
            once()

        return sleep_once

    StageRunner.run, StageRunner.bound = sleep_and_run, bind
    return serve.main()


if __name__ == "__main__":
    sys.exit(main())
