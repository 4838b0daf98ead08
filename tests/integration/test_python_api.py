"""The API that Python users expect: event loops, maps, dropped pipelines, forks, notebooks, types."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import build
import numpy as np
import psutil
import pytest
from processes import running
from waiting import wait_until

import onnxsplit
from onnxsplit import (
    Busy,
    DeadlineExceeded,
    InputError,
    LaunchFailed,
    Pipeline,
    PipelineError,
    PlanCache,
    PlanError,
)
from runtime.options import RunOptions

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
ITEMS = [X * number for number in range(60)]


@pytest.fixture(scope="module")
def pipeline(chain_plan):
    with Pipeline.launch(chain_plan, threads=1) as launched:
        yield launched


@pytest.fixture(scope="module")
def expected(pipeline):
    return [pipeline.run({"x": item})["y"] for item in ITEMS]


def same(results, expected) -> bool:
    return len(results) == len(expected) and all(
        np.array_equal(result["y"], wanted) for result, wanted in zip(results, expected, strict=True)
    )


# Maps


def test_a_map_gives_results_in_the_order_of_the_items_and_tells_progress(pipeline, expected):
    told = []
    results = list(pipeline.map(ITEMS, progress=lambda done, total: told.append((done, total))))
    assert same(results, expected)
    assert told == [(number + 1, len(ITEMS)) for number in range(len(ITEMS))]


def test_a_map_gives_results_as_they_come_with_the_positions_of_their_items(pipeline, expected):
    results = dict(pipeline.map(iter(ITEMS), ordered=False, outputs=["y"]))
    assert same([results[position] for position in range(len(ITEMS))], expected)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_slow_reader_holds_the_source_of_a_map_back(pipeline, ordered):
    taken = []
    results = pipeline.map((taken.append(number) or ITEMS[0] for number in range(10_000)), ordered=ordered)
    for _ in range(5):
        next(results)
    assert len(taken) <= 5 + pipeline.inflight
    results.close()
    wait_until(lambda: pipeline.admission.inside == 0, "the other requests are cancelled")


@pytest.mark.parametrize("ordered", [True, False])
def test_the_first_error_ends_a_map(pipeline, ordered):
    with pytest.raises(InputError, match="expected 32"):
        list(pipeline.map([ITEMS[0], np.ones((1, 3), np.float32), ITEMS[1]], ordered=ordered))
    wait_until(lambda: pipeline.admission.inside == 0, "no place is lost")


def test_a_map_needs_something_to_iterate_over(pipeline):
    with pytest.raises(TypeError):
        pipeline.map(5)


# Event loops


def test_an_event_loop_gets_the_same_results(pipeline, expected):
    async def main():
        one_by_one = [await pipeline.arun(item) for item in ITEMS[:3]]
        at_once = await asyncio.gather(*(pipeline.arun({"x": item}, outputs=["y"]) for item in ITEMS))
        in_order = [result async for result in pipeline.amap(ITEMS)]
        as_they_come = {position: result async for position, result in pipeline.amap(source(), ordered=False)}
        return one_by_one, at_once, in_order, [as_they_come[position] for position in range(len(ITEMS))]

    async def source():
        for item in ITEMS:
            await asyncio.sleep(0)
            yield item

    one_by_one, *others = asyncio.run(main())
    assert same(one_by_one, expected[:3])
    assert all(same(results, expected) for results in others)


def test_a_pipeline_is_opened_and_closed_in_an_event_loop(chain_plan, expected):
    async def main():
        async with Pipeline.open(chain_plan, threads=1) as opened:
            result, pids = await opened.arun(X), [node.pid for node in opened.nodes]
        assert opened.ended
        assert not running(pids)
        with pytest.raises(PipelineError, match="closed"):
            await opened.arun(X)
        other = await Pipeline.open(chain_plan, threads=1)
        await other.aclose()
        assert other.ended
        return result

    assert same([asyncio.run(main())], [expected[1]])


def test_a_launch_that_is_cancelled_leaves_nothing(chain_plan, monkeypatch):
    before = {child.pid for child in psutil.Process().children()}

    async def main():
        async def opened():
            async with Pipeline.open(chain_plan, threads=1):
                raise AssertionError("it was cancelled")

        task = asyncio.create_task(opened())
        while {child.pid for child in psutil.Process().children()} == before:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert {child.pid for child in psutil.Process().children()} == before


def test_errors_of_a_launch_arrive_in_the_event_loop(tmp_path, chain_plan):
    async def main():
        with pytest.raises(PlanError):
            async with Pipeline.open(tmp_path):
                pass
        with pytest.raises(InputError, match="Did you mean 'threads'"):
            await Pipeline.open(chain_plan, thread=1)
        with pytest.raises(LaunchFailed):
            await Pipeline.open(chain_plan, provider="cuda")
        with pytest.raises(InputError, match="leave out launcher"):
            Pipeline.open(chain_plan, bind="tcp://127.0.0.1:1", launcher=object())

    asyncio.run(main())


@pytest.fixture
def full(chain_plan):
    """A pipeline that admits one request, and whose first node is stopped, so that nothing is answered."""
    with Pipeline.launch(chain_plan, threads=1, inflight=1) as launched:
        launched.run(X)
        first = psutil.Process(next(node.pid for node in launched.nodes if node.stage == 0))
        first.suspend()
        try:
            yield launched
        finally:
            first.resume()


def test_tasks_that_wait_for_room_do_not_block_the_loop_and_can_be_cancelled_or_run_out_of_time(full):
    async def main():
        running = asyncio.create_task(full.arun(X))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(full.arun(X)) for _ in range(20)]
        with pytest.raises(DeadlineExceeded, match="before it was admitted"):
            await full.arun(X, timeout=0.05)
        for task in waiting[1:]:
            task.cancel()
        done = await asyncio.gather(*waiting[1:], return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done)
        assert full.admission.inside == 1
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(main())
    wait_until(lambda: full.admission.inside == 0, "every place is given back")


def test_a_place_is_given_back_when_the_loop_of_a_waiting_request_is_gone(full):
    holder = full.submit(X)
    loop = asyncio.new_event_loop()
    task = loop.create_task(full.arun(X))
    loop.run_until_complete(asyncio.sleep(0))
    assert len(full.admission._waiting) == 1
    task._log_destroy_pending = False
    loop.close()
    holder.cancel()
    wait_until(lambda: full.admission.inside == 0, "the place of the lost task is free")
    del task
    full.submit(X, block=False)  # takes the only place
    with pytest.raises(Busy):
        full.submit(X, block=False)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("make", [lambda: np.zeros((20_000, 32), np.float32), lambda: [[0.0] * 32 for _ in range(500)]])
def test_a_source_may_change_the_same_buffer_for_each_item(pipeline, make, ordered):
    buffer = make()

    def source():
        for number in range(8):
            for row in buffer:
                row[:] = X[0] * number if isinstance(row, np.ndarray) else (X[0] * number).tolist()
            yield buffer

    async def main():
        found = [result async for result in pipeline.amap(source(), ordered=ordered)]
        return found if ordered else [result for _, result in sorted(found)]

    answers = asyncio.run(main())
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(answer["y"][0], pipeline.run(X * number)["y"][0], rtol=1e-5)
        assert (answer["y"] == answer["y"][0]).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_source_may_wait_for_the_result_of_its_last_item(pipeline, ordered):
    async def main():
        results: asyncio.Queue[object] = asyncio.Queue()

        async def source():
            for number in range(3):
                yield X * number
                await results.get()

        async with asyncio.timeout(60):
            async for result in pipeline.amap(source(), ordered=ordered):
                results.put_nowait(result)
        return results.qsize()

    assert asyncio.run(main()) == 0


def test_requests_that_enter_while_the_pipeline_closes_all_end(chain_plan):
    large = np.zeros((32_768, 32), np.float32)

    async def main():
        launched = await Pipeline.open(chain_plan, threads=1, inflight=1)
        await launched.arun(X)
        tasks = [asyncio.create_task(launched.arun(large)) for _ in range(4)]
        await asyncio.sleep(0)
        launched.close()
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert launched.admission.inside == 0
        return outcomes

    assert all(isinstance(one, dict | PipelineError) for one in asyncio.run(main()))


def test_a_timeout_counts_while_inputs_are_converted(pipeline):
    slow = [[0.5] * 32 for _ in range(30_000)]
    with pytest.raises(DeadlineExceeded):
        asyncio.run(pipeline.arun(slow, timeout=1e-3))


def test_a_pipeline_is_opened_once(chain_plan):
    async def main():
        opening = Pipeline.open(chain_plan, threads=1)
        async with opening as opened:
            with pytest.raises(PipelineError, match="opened before"):
                await opening
            assert not opened.ended
        assert opened.ended

    asyncio.run(main())


# Endings


def test_a_pipeline_that_is_dropped_answers_its_requests_and_ends_its_nodes(chain_plan, expected):
    launched = Pipeline.launch(chain_plan, threads=1)
    pids, threads = [node.pid for node in launched.nodes], threading.active_count()
    futures = [launched.submit(item) for item in ITEMS[:4]]
    with pytest.warns(ResourceWarning, match=r"the pipeline of model\.plan was dropped without close\(\)"):
        del launched
    assert same([future.result() for future in futures], expected[:4])
    wait_until(lambda: not running(pids), "the nodes have ended")
    wait_until(lambda: threading.active_count() < threads, "its threads have ended")


def test_a_pipeline_that_was_closed_is_dropped_silently(chain_plan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Pipeline.launch(chain_plan, threads=1) as launched:
            launched.run(X)
        del launched
        gc.collect()


def test_a_fork_cannot_use_a_pipeline_and_its_end_hurts_nobody(pipeline, expected):
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        child = os.fork()
    if child == 0:
        said = []
        for use in (
            lambda: pipeline.run(X),
            lambda: next(pipeline.map([X])),
            lambda: asyncio.run(pipeline.arun(X)),
            lambda: pipeline.stats(),
            lambda: pipeline.nodes,
            lambda: pipeline.scale(0, 1),
            lambda: pipeline.drain(),
            lambda: pipeline.generate([1]),
            lambda: pipeline.text,
        ):
            try:
                use()
                said.append("nothing")
            except BaseException as error:
                said.append(f"{type(error).__name__} {'fork of it; launch another' in str(error)}")
        said.append(repr(pipeline))
        pipeline.close()
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        *said, shown = stream.read().splitlines()
    os.waitpid(child, 0)
    assert said == ["PipelineError True"] * 9
    assert "belongs to another process" in shown
    assert same([pipeline.run(X)], [expected[1]])


def test_a_fork_cannot_use_what_was_made_before_it(pipeline):
    more = 2 * pipeline.inflight  # than it has taken at the fork, however many of them are answered by then
    done, running = pipeline.submit(X), pipeline.map([X] * more)
    done.result()
    next(running)
    stage = psutil.Process(next(node.pid for node in pipeline.nodes if node.stage == 0))
    stage.suspend()
    waiting, read, write = pipeline.submit(X), *os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        said = []
        for use in (waiting.result, waiting.exception, waiting.cancel, lambda: list(running)):
            try:
                use()
                said.append("nothing")
            except BaseException as error:
                said.append(type(error).__name__)
        os.write(write, " ".join([*said, f"{list(done.result())}"]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    stage.resume()
    assert said == "PipelineError PipelineError PipelineError PipelineError ['y']"
    assert waiting.result(60)["y"].shape == (1, 32)
    running.close()


GARBAGE = """
import faulthandler, gc, sys, threading
import numpy as np
from onnxsplit import Pipeline
faulthandler.dump_traceback_later(100, exit=True)
x = np.ones((1, 32), np.float32)
with Pipeline.launch(sys.argv[1], threads=1) as pipeline:
    gc.set_threshold(7, 2, 2)
    for _ in range(150):
        iterator = pipeline.map([x] * 12)
        next(iterator)
        cycle = [iterator]
        cycle.append(cycle)
        del iterator, cycle
        for future in [pipeline.submit(x) for _ in range(4)]:
            future.result()
    gc.collect()
    pipeline.run(x)
print("done")
"""


def test_the_garbage_collector_may_end_an_iterator_at_any_place(chain_plan, python_environment):
    """It once ran within a submit, and waited for the lock that this held."""
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE, chain_plan], env=python_environment, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


def test_what_a_terminal_and_a_notebook_show(pipeline):
    pipeline.run(X)
    assert "2 of 2 nodes ready" in repr(pipeline)
    assert repr(pipeline.plan).startswith("<Plan of model.onnx: 2 stages, bottleneck ")
    stats = pipeline.stats()
    head, *rows = repr(stats).splitlines()
    assert head.split()[:4] == ["node", "state", "provider", "requests"]
    assert [row.split()[0] for row in rows] == ["0.0", "1.0"] == [f"{one.stage}.{one.replica}" for one in stats]
    for shown in (pipeline, pipeline.plan):
        drawing = shown._repr_html_()
        assert drawing.count("<rect ") == 2
        assert drawing.count("stage 1") == 1
    assert stats._repr_html_().count("<tr>") == 3


# A model in one call


def test_a_model_is_cut_once_and_kept_in_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = build.save(build.chain(), tmp_path)
    cut = {"costs": "analytic"}
    with Pipeline.from_model(model, stages=2, cut=cut, threads=1) as first:
        answer = first.run(X)["y"]
    (folder,) = plans = [path for path in (tmp_path / "cache/onnxsplit/plans").iterdir() if path.is_dir()]
    made = (folder / "plan.json").stat().st_mtime_ns
    with Pipeline.from_model(model, stages=2, cut=cut, threads=1) as second:
        assert np.array_equal(second.run(X)["y"], answer)
    assert (folder / "plan.json").stat().st_mtime_ns == made
    (folder / "stage1.onnx").write_bytes(b"damaged")
    with Pipeline.from_model(model, stages=2, cut=cut, threads=1) as third:
        assert np.array_equal(third.run(X)["y"], answer)
    build.save(build.chain(length=4), tmp_path)  # the same name, and another model
    with Pipeline.from_model(model, stages=2, cut=cut, threads=1) as fourth:
        assert not np.array_equal(fourth.run(X)["y"], answer)
    assert len([path for path in folder.parent.iterdir() if path.is_dir()]) == len(plans) + 1


def test_a_wrong_option_is_refused_before_a_model_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = build.save(build.chain(), tmp_path)
    with pytest.raises(InputError, match=r"no option 'thread'\. Did you mean 'threads'"):
        Pipeline.from_model(model, thread=1)
    with pytest.raises(InputError, match=r"no option 'stage'\. Did you mean 'stages'"):
        Pipeline.from_model(model, cut={"stage": 2})
    assert not list((tmp_path / "cache").glob("onnxsplit/plans/*.plan"))


def test_the_files_beside_a_model_are_part_of_what_its_plan_is_known_by(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, folders = build.save(build.chain(), tmp_path), []
    for name in ("", "tokenizer_config.json", "genai_config.json"):
        if name:
            (tmp_path / name).write_text("{}")
        with PlanCache() as cache:
            folders.append(cache.plan(model, stages=2, costs="analytic"))
    assert len(set(folders)) == 3


def test_an_error_of_the_launch_does_not_cut_the_model_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, cut = build.save(build.chain(), tmp_path), {"costs": "analytic"}
    for _ in range(2):
        with pytest.raises(PlanError, match="replicas for stage 7"):
            Pipeline.from_model(model, stages=2, cut=cut, replicas={7: 2})
        (folder,) = [path for path in (tmp_path / "cache/onnxsplit/plans").iterdir() if path.is_dir()]
        (folder / "mark").touch()
    assert (folder / "mark").exists()


@pytest.mark.parametrize("cut", [{"out": "x"}, {"model": "y"}, {"say": print}, "abc", [1]])
def test_a_cut_that_is_none_is_refused(tmp_path, cut):
    with pytest.raises(InputError, match=r"there is no option|cut must map"):
        Pipeline.from_model(build.save(build.chain(), tmp_path), cut=cut)


FORKS = """
import os, sys
from onnxsplit import Pipeline
with Pipeline.from_model(sys.argv[1], stages=2, cut={"costs": "analytic"}, threads=1) as pipeline:
    if (child := os.fork()) == 0:
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_ends_after_a_model_was_taken_from_the_cache(tmp_path, python_environment):
    """ONNX Runtime keeps a fork from ending; a plan from the cache needs it in the nodes only."""
    model = build.save(build.chain(), tmp_path)
    environment = {**python_environment, "XDG_CACHE_HOME": str(tmp_path)}
    make = "import sys; from onnxsplit import PlanCache; PlanCache().plan(sys.argv[1], stages=2, costs='analytic')"
    subprocess.run([sys.executable, "-c", make, model], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, model], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout == "7\n", done.stderr


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PlanError, match="Set XDG_CACHE_HOME"):
        Pipeline.from_model(build.save(build.chain(), tmp_path), stages=2, cut={"costs": "analytic"})


# Names and types


def test_every_public_name_is_there_and_importing_the_package_loads_nothing_heavy():
    listed = {name for names in onnxsplit._HOMES.values() for name in names} | {"__version__"}
    assert listed == set(onnxsplit.__all__) == set(dir(onnxsplit))
    assert all(getattr(onnxsplit, name) is not None for name in onnxsplit.__all__)
    heavy = {"numpy", "onnx", "zmq", "runtime"}
    code = f"import onnxsplit, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_named_runtime_is_named_in_the_error(tmp_path, kind, python_environment):
    other = tmp_path / "runtime.py" if kind == "file" else tmp_path / "runtime" / "__init__.py"
    other.parent.mkdir(exist_ok=True)
    other.write_text("mine = 1\n")
    for before in ("", "import runtime\n"):
        done = subprocess.run(
            [sys.executable, "-c", f"{before}from onnxsplit import InputError, Pipeline"],
            cwd=tmp_path, env=python_environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        named = other if kind == "file" else other.parent
        assert f"ImportError: onnxsplit needs its package 'runtime', but {named} has the same name" in done.stderr


def test_the_help_of_the_package_begins_with_what_there_is():
    import pydoc

    text = pydoc.render_doc(onnxsplit, renderer=pydoc.plaintext)
    beginning = text[: text.index("PACKAGE CONTENTS") if "PACKAGE CONTENTS" in text else 4000]
    for word in ("Pipeline", "partition", "OnnxsplitError", "to_torch"):
        assert word in beginning


USER = """
import numpy as np
from onnxsplit import Pipeline, ReplicaRange, partition

partition("m.onnx", stages=2, out="p", strategy="layer", inputs={"x": np.ones(2)})
Pipeline.launch("p", replicas=ReplicaRange(least=1, most=4)).close()
counts: dict[int, int] = {0: 2}
Pipeline.launch("p", replicas=counts).close()
with Pipeline.launch("p", threads=1, replicas={0: 2, 1: ReplicaRange(least=1, most=4)}, balance="task") as pipeline:
    outputs = pipeline.run({"x": [[1.0]]}, timeout=3)
    outputs["y"].sum()
    for one in pipeline.map([np.ones(2)]):
        one["y"]
    for position, two in pipeline.map([np.ones(2)], ordered=False, timeout=2.0):
        two["y"], position + 1
    for either in pipeline.map([np.ones(2)], ordered=bool(position)):
        print(either)


class Array:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self) -> object:
        return object()


pipeline.run({"x": Array()})
pipeline.run(Array())
"""
WRONG = {
    'Pipeline.launch("p", thread=1)': "call-arg",
    'Pipeline.launch("p", threads="two")': "arg-type",
    'Pipeline.launch("p", mode="slow")': "arg-type",
    'Pipeline.launch("p", replicas="1:4")': "arg-type",
    'Pipeline.launch("p", replicas=(1, 4))': "arg-type",
    'Pipeline.launch("p", replicas={0: "1:4"})': "dict-item",
    "ReplicaRange(1, 4)": "call-arg",
    'Pipeline.listen("p", bind="tcp://*:1", elastik=True)': "call-arg",
    'partition("m.onnx", stage=2)': "call-arg",
    'partition("m.onnx", strategy="diagonal")': "arg-type",
    "pipeline.generate([1], max_token=2)": "call-arg",
    "pipeline.map([np.ones(2)], order=True)": "call-overload",
}


def test_a_type_checker_accepts_right_options_and_refuses_wrong_ones(tmp_path, python_environment):
    pytest.importorskip("mypy", reason="needs the extra test")
    file = tmp_path / "user.py"
    file.write_text(USER + "\n".join(WRONG) + "\n")
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    done = subprocess.run(
        [*checker, "--cache-dir", str(tmp_path / "cache"), file],
        cwd=tmp_path, env=python_environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    first = USER.count("\n") + 1
    found = {
        int(line.split(":")[1]): line.rsplit("[", 1)[1].rstrip("]")
        for line in done.stdout.splitlines()
        if ": error:" in line
    }
    assert found == {first + number: code for number, code in enumerate(WRONG.values())}, done.stdout


def test_typed_options_are_those_that_there_are():
    from typing import get_type_hints

    from onnxsplit.planning.examine import ModelArguments, ModelOptions
    from onnxsplit.planning.options import CutArguments, CutOptions
    from runtime.options import RunArguments
    from runtime.requests.generate_options import GenerateArguments, GenerateOptions
    from runtime.text.options import TextArguments, TextOptions

    for typed, real in (
        (RunArguments, RunOptions),
        (CutArguments, CutOptions),
        (ModelArguments, ModelOptions),
        (GenerateArguments, GenerateOptions),
        (TextArguments, TextOptions),
    ):
        assert get_type_hints(typed) == get_type_hints(real), typed
