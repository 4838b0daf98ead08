"""Changes a pipeline to another plan while it serves: plan, load, compare, swap, then keep the plan or go back."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from onnxsplit.errors import OnnxsplitError, PlanError, one_line
from onnxsplit.plan_files import load_plan, plan_id, read_plan_file
from runtime.errors import LaunchFailed, PipelineClosed, PipelineError, RecutFailed, RecutRefused
from runtime.logs import log_event
from runtime.recut.beside import PlanBeside, take_over
from runtime.recut.change import Change, PlanWish
from runtime.recut.door import Door
from runtime.recut.gain import verdict
from runtime.recut.offline import ComparedModels, replan, require_unchanged
from runtime.recut.phases import TRANSITIONS, RecutChange, RecutPhase
from runtime.recut.plan_folder import remove_left_plans
from runtime.recut.result import Recut
from runtime.recut.running_plan import RunningPlan
from runtime.recut.same_model import why_another_model
from runtime.recut.warming import AnswersDiffer, RequestSamples, compare
from runtime.recut.watching import measured, watched
from runtime.recut.window import DriftSettings
from runtime.transition_table import Machine

_log = logging.getLogger("runtime.recut")
_SETTINGS = DriftSettings()
_WATCH_S = 10.0  # the most seconds to look at what a plan does, where that decides
_LOOK_S = 0.1
_GLANCE_S = 4.0  # the same where it is only told
RESULTS = ("kept", "rolled_back", "no_gain", "refused", "failed")


class Recutter:
    """Changes the plan behind a door, one change at a time, each in a thread of its own.

    Args:
        door: the door of the pipeline.

    Attributes:
        counts: how often each of :data:`RESULTS` was the result.
        last: what became of the last change; empty before the first.
    """

    def __init__(self, door: Door) -> None:
        self.counts = dict.fromkeys(RESULTS, 0)
        self.last = ""
        self._door = door
        self._machine = Machine("recut", TRANSITIONS, RecutPhase.STEADY)
        self._lock = threading.Lock()
        self._phase_lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._remove_plan: dict[RunningPlan, Callable[[], None]] = {}  # for plans that were made here
        self._changed: list[Callable[[], None]] = []
        remove_left_plans()

    @property
    def phase(self) -> RecutPhase:
        """What is being done now."""
        return self._machine.state

    def on_change(self, call: Callable[[], None]) -> None:
        """Call a function, in any thread, each time that requests begin to enter another plan."""
        self._changed.append(call)

    def start(self, wish: PlanWish) -> Future[Recut]:
        """Begin a change.

        Raises:
            RecutRefused: another one is under way, or the model cannot be planned anew.
            PipelineClosed: the pipeline is closed.
        """
        with self._lock:
            if self._stopped.is_set():
                raise PipelineClosed("the pipeline was closed")
            if self._machine.state is not RecutPhase.STEADY:
                self.counts["refused"] += 1
                raise RecutRefused(f"the plan of this pipeline is being changed already ({self.phase}); wait for that")
            anew, running = wish.folder is None and wish.made is None, self._door.current
            if anew and (problem := running.plan.why_fixed()) is not None:
                self.counts["refused"] += 1
                raise RecutRefused(f"no new plan can be made: {running.folder} {problem}")
            self._go(RecutChange.PLAN if anew else RecutChange.LOAD)
            future: Future[Recut] = Future()
            future.set_running_or_notify_cancel()
            self._thread = threading.Thread(target=self._change, args=(wish, future), name="recut", daemon=True)
            self._thread.start()
        return future

    def stop(self) -> None:
        """Give up a change that is under way, soon, and start no other. This waits for nothing."""
        self._stopped.set()

    def close(self) -> None:
        """Give up a change that is under way, and start no other. Call it before the door is closed."""
        with self._lock:
            self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._go(RecutChange.CLOSE)

    def remove_plans(self) -> None:
        """Remove the plan directories that were made here. Call it when the nodes have ended."""
        for remove in self._remove_plan.values():
            remove()
        self._remove_plan.clear()

    def _change(self, wish: PlanWish, future: Future[Recut]) -> None:
        """Carry out a change, in its thread."""
        change = Change(wish, old=self._door.current)
        try:
            recut = self._carried_out(change)
        except BaseException as problem:
            error = self._given_up(change, problem)
            self.counts["refused" if isinstance(error, RecutRefused) else "failed"] += 1
            self.last = str(error)
            log_event(_log, logging.WARNING, "plan not changed", why=error)
            future.set_exception(error)
        else:
            result = "kept" if recut.kept else "rolled_back" if change.swapped else "no_gain"
            self.counts[result] += 1
            self.last = recut.why
            log_event(_log, logging.INFO, "plan changed" if recut.kept else "plan not changed", why=recut.why)
            future.set_result(recut)

    def _given_up(self, change: Change, problem: BaseException) -> PipelineError:
        """End what was begun, and go on with the old plan; returns the error for the caller."""
        try:
            self._drop(change)
        except Exception:
            _log.exception("a plan could not be ended")
        if self._machine.state is not RecutPhase.STEADY:
            differs = isinstance(problem, AnswersDiffer)
            back = self._machine.state in (RecutPhase.SWAPPED, RecutPhase.PROVING)
            self._go(RecutChange.ROLL_BACK if back else RecutChange.DIFFER if differs else RecutChange.FAIL)
        if self._stopped.is_set():
            return PipelineClosed("the pipeline was closed")
        if isinstance(problem, RecutRefused | RecutFailed | PipelineClosed):
            return problem
        if isinstance(problem, OSError):
            where = f": {os.fsdecode(problem.filename)}" if isinstance(problem.filename, str | bytes) else ""
            why = f"{problem.strerror or problem}{where}"
        elif isinstance(problem, OnnxsplitError):
            why = one_line(problem)
        else:
            _log.error("a change of the plan failed", exc_info=problem)
            why = repr(problem)
        failed = RecutFailed(f"the plan was not changed, and the present one serves on: {why}")
        failed.__cause__ = problem
        return failed

    def _drop(self, change: Change) -> None:
        """End the new plan, if it was begun. Where it takes requests already, they are answered first."""
        new = change.new
        if new is not None and self._door.current is new:
            if self._stopped.is_set():
                return  # it is ended with the pipeline
            self._swap(change.old)
            if not new.wait_until_idle(lambda: self._stopped.is_set() or new.why_broken):
                if self._stopped.is_set():
                    return
                new.move_requests(change.old)
        if new is not None:
            self._remove_plan.pop(new, None)
            self._door.remove(new)
        change.remove_plan()

    def _go(self, change: RecutChange) -> None:
        """Note a change of the phase, unless the pipeline was closed meanwhile."""
        with self._phase_lock:
            if self._machine.state is not RecutPhase.ENDED or change is RecutChange.CLOSE:
                self._machine.go(change)

    def _swap(self, running: RunningPlan) -> bool:
        """Let requests enter another plan."""
        swapped = self._door.swap(running)
        for call in self._changed:
            try:
                call()
            except Exception:
                _log.exception("a function that was to be called when the plan changes has failed")
        return swapped

    def _carried_out(self, change: Change) -> Recut:
        """Plan, load, compare, swap, drain and prove.

        Raises:
            PipelineError: the change was given up.
        """
        old, stopped = change.old, self._stopped.is_set
        change.before = change.wish.before or watched(old, _SETTINGS, _patience_s(change), stopped)
        folder = change.wish.folder or self._planned(change)
        if folder is None:
            self._go(RecutChange.NO_GAIN)
            return change.result(kept=False, why="no cut of the model is better at the present speeds")
        try:
            plan = load_plan(folder)
        except PlanError as error:
            raise RecutRefused(str(error)) from error
        change.new_id = plan_id(read_plan_file(folder))
        if change.wish.folder is not None:
            require_unchanged(old.folder, old.plan_id)
        if (problem := why_another_model(old.plan, plan)) is not None:
            raise RecutRefused(f"{folder} is a plan of another model: {problem}")
        with change.timed("loading"), RequestSamples(old) as samples:
            beside = PlanBeside(old, folder, plan, self._door, stopped)
            change.new = new = beside.running
            if not self._door.add(new):
                raise PipelineClosed("the pipeline was closed")
            log_event(_log, logging.INFO, "loading a plan", folder=folder, stages=len(plan.stages))
            with ComparedModels(old.folder, folder, stopped) if change.wish.folder is not None else nullcontext():
                beside.start()
        self._remove_plan[new] = change.remove_plan
        self._go(RecutChange.READY)
        with change.timed("warming"):
            compared = compare(old, new, samples.taken(), stopped)
            log_event(_log, logging.INFO, "answers are the same", requests=compared)
        self._go(RecutChange.SAME)
        self._swap(new)
        self._require(new)
        change.swapped = True
        with change.timed("draining"):
            if not old.wait_until_idle(lambda: stopped() or new.why_broken or old.why_broken):
                self._require(new)
                old.move_requests(new)  # a stage of the old plan has no node
                if not old.wait_until_idle(lambda: stopped() or new.why_broken):
                    self._require(new)
        self._go(RecutChange.DRAINED)
        return self._proven(change, new)

    def _require(self, new: RunningPlan) -> None:
        """Check that a change can go on.

        Raises:
            PipelineError: the pipeline closes, or a stage of the new plan has no node any more.
        """
        if self._stopped.is_set():
            raise PipelineClosed("the pipeline was closed")
        if problem := new.why_broken:
            raise LaunchFailed(f"the new plan cannot serve: {problem}")

    def _planned(self, change: Change) -> Path | None:
        """The plan that was made, or that is made now; None where no plan is better."""
        wish, old, made = change.wish, change.old, change.wish.made
        if made is None:
            speeds, times = wish.speeds, wish.stage_times_ns
            if speeds is None:
                assert change.before is not None
                speeds, times = measured(old.plan, change.before, _SETTINGS)
            made = replan(old.folder, old.plan_id, speeds=speeds, stage_times_ns=times, stopped=self._stopped.is_set)
        change.remove_plan = made.close
        change.seconds = replace(change.seconds, planning=made.seconds)
        change.predicted_gain = made.gain
        if made.folder is None:
            made.close()
            return None
        if wish.made is None:
            self._go(RecutChange.GAIN)
        return made.folder

    def _proven(self, change: Change, new: RunningPlan) -> Recut:
        """Keep the new plan, or go back to the old one, whose nodes have waited.

        Raises:
            PipelineError: the pipeline closes, or the new plan does not run any more.
        """

        def ended() -> bool:
            return self._stopped.is_set() or bool(new.why_broken)

        after = watched(new, _SETTINGS, _patience_s(change), ended)
        while not (new.is_whole or ended()):  # a node that was lost comes back, or fails again and again
            time.sleep(_LOOK_S)
        self._require(new)
        assert change.before is not None
        proof = verdict(change.before, after, _SETTINGS)
        change.measured_gain = proof.gain
        if change.wish.must_gain and not proof.kept:
            self._drop(change)
            self._go(RecutChange.ROLL_BACK)
            return change.result(kept=False, why=proof.why)
        self._door.remove(change.old)
        try:
            take_over(new, self._door.address)
        except PipelineError as error:
            log_event(_log, logging.WARNING, "further nodes cannot join", why=error)
        if (remove := self._remove_plan.pop(change.old, None)) is not None:
            remove()
        self._go(RecutChange.KEEP)
        return change.result(kept=True, why=proof.why if proof.kept else "the plan that was asked for stays")


def _patience_s(change: Change) -> float:
    return _WATCH_S if change.wish.must_gain else _GLANCE_S


def end_dropped(stops: Sequence[Callable[[], None]], door: Door, name: str, owner: int) -> None:
    """End a pipeline that nobody refers to any more, when its requests are answered.

    It may run in any thread, inside any function, so it waits for nothing.

    Args:
        stops: end what may change its plan, soon.
        door: its door.
        name: the name of the plan directory.
        owner: the process that has launched it.
    """
    if os.getpid() != owner or door.current.coordinator.ended:
        return
    for stop in stops:
        stop()
    door.close_when_drained()
    warnings.warn(
        f"the pipeline of {name} was dropped without close(); its nodes end now. Use a with statement, or close it",
        ResourceWarning,
        stacklevel=2,
    )
