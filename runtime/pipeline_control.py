"""What can be changed of a running plan: its nodes, where its results are received, and the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import InputError, shown
from onnxsplit.numbers import speed_problem
from onnxsplit.plan import Plan
from runtime.errors import RecutRefused
from runtime.launching import plan_folder
from runtime.options import check_scale
from runtime.pipeline_status import PipelineStatus
from runtime.recut.change import PlanWish
from runtime.recut.door import Door
from runtime.recut.phases import RecutPhase
from runtime.recut.rebalancer import Rebalancer
from runtime.recut.recutter import Recutter
from runtime.recut.result import Recut


@dataclass(frozen=True)
class Recuts:
    """How the plan of a pipeline was changed.

    Attributes:
        generation: the number of the plan that runs: 1 for the one that the pipeline was launched with.
        phase: what is being done: steady, planning, loading, warming, swapped, proving or ended.
        results: how often a change ended in each way: kept, rolled_back, no_gain, refused or failed.
        last: what became of the last change; empty before the first.
        advice: what would be gained by another cut, or why nothing is known; empty where that is not watched.
        drift: the time of each device's stages over their usual time; empty where that is not watched.
    """

    generation: int
    phase: str
    results: Mapping[str, int]
    last: str
    advice: str
    drift: Mapping[str, float]


class PipelineControl(PipelineStatus):
    """The controls of a running plan. :class:`~runtime.pipeline.Pipeline` adds requests.

    Args:
        door: as for :class:`.PipelineStatus`.
    """

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self._recutter = Recutter(door)
        options = door.current.options
        self._rebalancer = (
            Rebalancer(door, self._recutter, options.rebalance, options.rebalance_gain)
            if options.rebalance != "off"
            else None
        )
        self._stops = [self._recutter.stop, *([self._rebalancer.stop] if self._rebalancer is not None else [])]

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Receive results and run callbacks in an event loop, instead of a thread of this pipeline.

        Returns:
            A descriptor and a function. The caller watches the descriptor until :meth:`close` and calls the function
            whenever it is readable, then closes the descriptor. From now on, only these calls answer requests.
        """
        self.entrance.check_process()
        return self.entrance.take_in_loop()

    def scale(self, stage: int, replicas: int) -> None:
        """Set the number of a stage's nodes while requests continue.

        New nodes take requests as soon as they are ready. Nodes no longer needed finish their requests and end: those
        that are not ready yet first, then the newest. Where the stage has a range, the load goes on from this number.
        The number stays when the plan changes to one of as many stages.

        Raises:
            InputError: there is no such stage, it would have no node, the number is outside its range, or the pipeline
                would have too many nodes.
            RecutRefused: the plan is being changed.
            PipelineClosed: the pipeline was closed.
        """
        if (phase := self._recutter.phase) not in (RecutPhase.STEADY, RecutPhase.ENDED):
            raise RecutRefused(f"the plan of this pipeline is being changed ({phase}); scale it when that is over")
        check_scale(self._coordinator.ranges, self._coordinator.planned, stage, replicas)
        self._coordinator.scale(int(stage), int(replicas))

    def recut(self, plan: str | Path | None = None, *, devices: Mapping[str, float] | None = None) -> Future[Recut]:
        """Change to another plan of the same model while requests continue. Returns at once.

        The nodes of the new plan are started beside those that run. A few requests are sent to both plans, and where
        the answers are the same, new requests enter the new plan. The nodes of the old plan end when they have answered
        theirs; sequences stay with the nodes that they began on. If anything fails, the old plan serves on.

        Args:
            plan: the directory of the new plan. When None, the model is planned anew from the costs in the present
                plan, and changed to if that is better.
            devices: for planning anew: the speeds of devices or hosts, by name, relative to when the plan was made. For
                a plan without a cluster the names are the numbers of the devices, from ``"0"``.

        Returns:
            A future of what became of it. It fails with RecutRefused (the plan is of another model, or its nodes have
            no room), RecutFailed, or PipelineClosed; it cannot be cancelled.

        Raises:
            InputError: an argument is invalid.
            RecutRefused: the plan is being changed already, or does not carry the costs that planning anew needs.
            PipelineClosed: the pipeline was closed.
        """
        self.entrance.check_open()
        if plan is not None and devices:
            raise InputError("devices are for planning anew; leave out plan, or leave out devices")
        folder = None if plan is None else plan_folder(plan)
        given = _speeds(devices)
        _check_devices(self.plan, given)
        present = self._rebalancer.present() if self._rebalancer is not None else None
        if folder is not None or given or present is None:
            return self._recutter.start(PlanWish(folder, given or None))
        return self._recutter.start(PlanWish(None, present.speeds, present.stage_times_ns))

    @property
    def recuts(self) -> Recuts:
        """How the plan was changed so far."""
        recutter = self._recutter
        return Recuts(
            generation=self.entrance.current.number,
            phase=str(recutter.phase),
            results=dict(recutter.counts),
            last=recutter.last,
            advice=self._rebalancer.advice if self._rebalancer is not None else "",
            drift=self._rebalancer.drift if self._rebalancer is not None else {},
        )

    def on_recut(self, call: Callable[[], None]) -> None:
        """Call a function, in any thread, each time that requests begin to enter another plan."""
        self._recutter.on_change(call)


def _check_devices(plan: Plan, names: Iterable[str]) -> None:
    """Refuse speeds of devices that a plan does not have.

    Raises:
        InputError: it names one, and says which there are.
    """
    devices = plan.target.devices if plan.target is not None else ()
    known = dict.fromkeys([*(device.name for device in devices), *(device.host for device in devices)])
    unknown = [name for name in names if name not in known]
    if devices and unknown:
        raise InputError(
            f"{shown(unknown[0])} is neither a device nor a host of the plan; these are {', '.join(known)}"
        )


def _speeds(devices: object) -> dict[str, float]:
    """The speeds of devices, checked.

    Raises:
        InputError: they are not speeds by name.
    """
    if devices is None:
        return {}
    if not isinstance(devices, Mapping):
        raise InputError(f"devices must map names to speeds, as in {{'host-a': 0.5}}, not {shown(devices)}")
    for name, speed in devices.items():
        if not isinstance(name, str):
            raise InputError(f"devices are named by text, as in {{'0': 0.5}}, not by {shown(name)}")
        if problem := speed_problem(name, speed):
            raise InputError(problem)
    return {name: float(speed) for name, speed in devices.items()}
