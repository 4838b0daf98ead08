"""Requests enter the pipeline when it has room, without a timer."""

from __future__ import annotations

import asyncio
import os
import threading

import numpy as np
import pytest

from runtime.errors import Busy, PipelineClosed
from runtime.gateway.batcher import Batcher
from runtime.gateway.counters import Counters
from runtime.gateway.queue import Limits
from runtime.requests.admission import Admission
from runtime.requests.request import Answering, OutputSelection


class Echo:
    """A pipeline that answers admitted requests at once; a place is taken until the test gives it back."""

    inflight = 4
    trouble = None

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.refusals = 0
        self.entrance = self

    def take_in_loop(self):
        self._end, self._other_end = os.pipe()
        return self._end, lambda: None

    def check(self, inputs, outputs):
        return OutputSelection(outputs, outputs, (), frozenset(), (), None)

    def enter(self, arrays, selection, *, deadline_ns, block):
        if not self.admission.enter(object(), 1, block=block):
            self.refusals += 1
            raise Busy("the pipeline is full")
        future = Answering()
        future.set_result({"y": arrays["x"]})
        return future

    def close(self):
        os.close(self._other_end)


def run(batcher, x):
    """Run a request with one input."""
    return batcher.run({"x": x}, batcher.check({"x": x}, ("y",)), 0, None)


@pytest.mark.parametrize("size", [4, 8 << 20], ids=["small", "copied in a thread"])
def test_a_queued_request_enters_as_soon_as_the_pipeline_has_room(size):
    x = np.zeros(size, np.uint8)
    admission = Admission(1, 100)
    pipeline = Echo(admission)

    def no_timer(*_):
        raise AssertionError("the batcher set a timer")

    async def scene():
        admission.enter("another caller's", 1)
        batcher = Batcher(pipeline, Limits(), Counters())
        asyncio.get_running_loop().call_later = no_timer
        asked = asyncio.ensure_future(run(batcher, x))
        while not pipeline.refusals or not len(batcher.queue):
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (pipeline.refusals, len(batcher.queue)) == (1, 1), "it waits, and does not try again and again"
        threading.Thread(target=admission.leave, args=("another caller's",)).start()
        outputs, _ = await asked
        assert outputs["y"] is x or np.array_equal(outputs["y"], x)
        assert pipeline.refusals == 1
        await batcher.empty()
        batcher.close()

    asyncio.run(scene())
    pipeline.close()


def test_a_release_between_the_refusal_and_the_wait_is_not_missed():
    """The place is given back while the pipeline still reports that it is full."""
    admission = Admission(1, 100)
    pipeline = Echo(admission)
    enter = pipeline.enter

    def enter_late(*args, **keywords):
        try:
            return enter(*args, **keywords)
        except Busy:
            admission.leave("another caller's")
            raise

    async def scene():
        admission.enter("another caller's", 1)
        pipeline.enter = enter_late
        batcher = Batcher(pipeline, Limits(), Counters())
        outputs, _ = await run(batcher, np.ones(3))
        assert outputs["y"].tolist() == [1, 1, 1]
        assert pipeline.refusals == 1
        batcher.close()

    asyncio.run(scene())
    pipeline.close()


def test_one_release_leads_to_one_more_try_however_many_requests_were_refused():
    admission = Admission(1, 100)
    pipeline = Echo(admission)

    async def scene():
        admission.enter("another caller's", 1)
        batcher = Batcher(pipeline, Limits(), Counters())
        asked = [asyncio.ensure_future(run(batcher, np.ones(3))) for _ in range(20)]
        while len(batcher.queue) < len(asked):
            await asyncio.sleep(0)
        refusals = pipeline.refusals
        for number in range(5):  # no room remains, because another caller is faster each time
            admission.leave(number or "another caller's")
            admission.enter(number + 1, 1)
            for _ in range(20):
                await asyncio.sleep(0)
        assert pipeline.refusals == refusals + 5
        batcher.refuse(PipelineClosed("the test is over"))
        await asyncio.gather(*asked, return_exceptions=True)
        await batcher.empty()
        batcher.close()

    asyncio.run(scene())
    pipeline.close()
