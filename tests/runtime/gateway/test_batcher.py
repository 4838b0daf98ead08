"""Requests enter the pipeline when it has room, without a timer."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


def run(batcher, x, arrived_ns=0):
    """Run a request with one input."""
    return batcher.run({"x": x}, batcher.check({"x": x}, ("y",)), arrived_ns, None)


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


def test_a_request_that_is_given_up_while_its_batch_is_copied_leaves_the_others_alone():
    """The batch is copied in a thread, which has all inputs although one request does not wait any longer."""
    x = np.arange(8 << 20, dtype=np.uint8).reshape(1, -1)
    go_on = threading.Event()

    class Joining(Echo):
        def check(self, inputs, outputs):
            return OutputSelection(outputs, outputs, (), frozenset(), (), {"x": 0, "y": 0})

    pipeline = Joining(Admission(2, 1 << 30))

    async def scene():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, go_on.wait, 10)
        batcher = Batcher(pipeline, Limits(max_batch=2, max_delay_ns=10**9), Counters())
        given_up, other = (asyncio.ensure_future(run(batcher, x, time.monotonic_ns())) for _ in range(2))
        while not batcher.executing:
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait((given_up,))
        go_on.set()
        outputs, inference = await other
        assert np.array_equal(outputs["y"], x)
        assert inference.checked.rows == 1
        await asyncio.gather(busy, batcher.empty())
        batcher.close()

    asyncio.run(scene())
    pipeline.close()


def test_an_answer_that_was_there_at_once_and_one_that_comes_later_go_to_their_requests():
    """Answers are given in the pipeline's callback; one that is there before the callback is set comes later."""
    late: list[Answering] = []

    class Sometimes(Echo):
        inflight = 1

        def enter(self, arrays, selection, *, deadline_ns, block):
            future = Answering()
            future.arrays = arrays
            if arrays["x"][0] % 2:
                future.set_result({"y": arrays["x"]})
            else:
                late.append(future)
            return future

    pipeline = Sometimes(Admission(1, 100))

    async def scene():
        batcher = Batcher(pipeline, Limits(), Counters())
        asked = [asyncio.ensure_future(run(batcher, np.full(3, number))) for number in range(20)]
        for _ in range(10):
            while not late:
                await asyncio.sleep(0)
            future = late.pop()
            future.set_result({"y": future.arrays["x"]})
        for number, (outputs, _) in enumerate(await asyncio.gather(*asked)):
            assert outputs["y"].tolist() == [number] * 3
        await batcher.empty()
        batcher.close()

    asyncio.run(scene())
    pipeline.close()
