"""Watches a pipeline for drift, and changes its plan, or says what another plan would gain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

from onnxsplit.errors import one_line
from runtime.errors import PipelineError
from runtime.logs import log_event
from runtime.options import Rebalance
from runtime.recut.change import PlanWish
from runtime.recut.decision import CutNow, Rebalancing, RecutAdvice, RecutSettings, WantPlan
from runtime.recut.door import Door
from runtime.recut.gain import NewPlan
from runtime.recut.offline import Replan, replan
from runtime.recut.recutter import Recutter
from runtime.recut.result import Recut
from runtime.recut.running_plan import RunningPlan
from runtime.recut.watching import PlanWatch

_LOOK_S = 1.0
_SAMPLE_S = 0.1
_log = logging.getLogger("runtime.recut")


class Rebalancer:
    """Watches the plan that runs, in a thread of its own.

    Args:
        door: the door of the pipeline.
        recutter: changes the plan.
        mode: whether it changes the plan, or only advises.
        least_gain: the predicted gain in percent from which the plan is changed.
    """

    def __init__(self, door: Door, recutter: Recutter, mode: Rebalance, least_gain: float) -> None:
        self._door = door
        self._recutter = recutter
        self._settings = RecutSettings(least_gain=least_gain / 100, acts=mode == "auto")
        self._deciding = Rebalancing(self._settings)
        self._stopped = threading.Event()
        self._planning: Future[Replan] | None = None
        self._wanted: WantPlan | None = None
        self._made: Replan | None = None  # the plan that the decision is about
        self._recut: Future[Recut] | None = None
        self._left: RunningPlan | None = None  # the plan that the last change begun here was to replace
        self._thread = threading.Thread(target=self._watch, name="rebalancer", daemon=True)

    @property
    def advice(self) -> str:
        """What another plan would gain, or why nothing is done, in one sentence."""
        return self._deciding.why

    @property
    def drift(self) -> Mapping[str, float]:
        """The time of each device's stages over their usual time, compared with the other devices."""
        return self._deciding.slowness

    def present(self) -> WantPlan | None:
        """What a plan for the present speeds would be made for; None before the usual times are known."""
        return self._deciding.present()

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End soon. This waits for nothing."""
        self._stopped.set()

    def close(self) -> None:
        """End, and remove a plan that was made and is not used."""
        self.stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._drop()

    def _watch(self) -> None:
        try:
            watch = self._begin()
            while not self._stopped.wait(_SAMPLE_S):
                watch.sample()
                if watch.running is not self._door.current:
                    watch = self._begin()
                    self._swapped()
                elif watch.seconds >= _LOOK_S:
                    self._look(watch)
        except PipelineError:
            _log.debug("the pipeline has ended", exc_info=True)
        except Exception:
            _log.exception("drift is not watched any more")

    def _begin(self) -> PlanWatch:
        """Watch the plan that runs; warn if its model cannot be cut again."""
        running = self._door.current
        if (problem := running.plan.why_fixed()) is not None:
            log_event(_log, logging.WARNING, "no cut of this plan can be advised", why=f"{running.folder} {problem}")
        return PlanWatch(running)

    def _swapped(self) -> None:
        """Requests enter another plan now."""
        if self._recut is None:  # somebody else has changed it
            self._drop()
            self._deciding = Rebalancing(self._settings)
        elif self._door.current is not self._left:  # else the old plan has come back, which the result will say
            self._deciding.swapped(time.monotonic_ns())

    def _look(self, watch: PlanWatch) -> None:
        deciding, now_ns = self._deciding, time.monotonic_ns()
        if self._recut is not None and self._recut.done():
            recut, self._recut = self._recut, None
            if recut.exception() is not None:
                deciding.failed(now_ns)
            else:
                deciding.proved(recut.result().kept, now_ns)
        if self._planning is not None and self._planning.done():
            planning, self._planning = self._planning, None
            if (failure := planning.exception()) is not None:
                deciding.planned(None, now_ns, one_line(failure))
            else:
                deciding.planned(self._planned(planning.result()), now_ns)
        action = deciding.look(watch.window(), now_ns)
        if isinstance(action, WantPlan):
            self._plan(action)
        elif isinstance(action, RecutAdvice):
            log_event(_log, logging.INFO, "advice", why=action.text)
        elif isinstance(action, CutNow):
            self._cut(action)

    def _plan(self, wanted: WantPlan) -> None:
        """Plan in a thread, which waits for a process of low priority."""
        self._drop()
        future: Future[Replan] = Future()
        running = self._door.current
        self._planning, self._wanted = future, wanted

        def plan() -> None:
            try:
                future.set_result(
                    replan(
                        running.folder,
                        running.plan_id,
                        speeds=wanted.speeds,
                        stage_times_ns=wanted.stage_times_ns,
                        stopped=self._stopped.is_set,
                    )
                )
            except Exception as error:
                log_event(_log, logging.WARNING, "no new plan", why=error)
                future.set_exception(error)

        threading.Thread(target=plan, name="planning", daemon=True).start()

    def _planned(self, made: Replan) -> NewPlan | None:
        wanted = self._wanted
        assert wanted is not None
        if made.folder is None:
            made.close()
            return None
        self._made = made
        return NewPlan(
            plan=str(made.folder),
            speeds=wanted.speeds,
            old_ns=made.old_ns,
            new_ns=made.new_ns,
            old=made.old_stages,
            new=made.new_stages,
        )

    def _cut(self, action: CutNow) -> None:
        made, self._made = self._made, None
        assert made is not None
        self._left = self._door.current
        log_event(_log, logging.INFO, "changing the plan", why=self._deciding.why)
        wish = PlanWish(made=made, before=action.before)
        try:
            self._recut = self._recutter.start(wish)
        except PipelineError as error:  # the caller changes the plan just now
            log_event(_log, logging.INFO, "plan not changed", why=error)
            made.close()
            self._deciding.failed(time.monotonic_ns())

    def _drop(self) -> None:
        """Remove a plan that was made and is not used."""
        made, self._made = self._made, None
        if self._planning is not None:
            self._planning.add_done_callback(_close_made)
            self._planning = None
        if made is not None:
            made.close()


def _close_made(planning: Future[Replan]) -> None:
    if planning.exception() is None:
        planning.result().close()
