"""Links by tcp: only those with the right keys get through, and a link that is cut comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import build
import numpy as np
import ports
import pytest
from proxy import Proxy
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.errors import LaunchFailed, PipelineError
from runtime.timings import Timings
from runtime.wire.keys import Keys, allow, create, create_for, revoke

WIDTH = 128
QUICK = Timings(beat_s=0.2, silence_s=1.5, lost_s=2)


def given(seed: int = 0):
    return {"x": np.random.default_rng(seed).standard_normal((64, WIDTH)).astype(np.float32)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    partition(build.save(build.chain(8, WIDTH), folder), stages=2, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def wanted(plan):
    return [run_stages(plan, load_plan(plan), given(seed), threads=1)["y"] for seed in range(4)]


@pytest.fixture
def keys(tmp_path):
    create_for(tmp_path / "keys", ("a", "b"))
    return tmp_path / "keys"


@contextmanager
def nodes(address, environment, *options):
    """Nodes started by hand, each with its own options."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
    started = [
        subprocess.Popen([*command, *map(str, own)], env=environment, stderr=subprocess.PIPE, text=True)
        for own in options
    ]
    try:
        yield started
    finally:
        for node in started:
            if node.poll() is None:
                node.terminate()
            try:
                node.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                node.kill()
                node.communicate()


def ask(pipeline, wanted, count: int = 8) -> None:
    futures = [pipeline.submit(given(number % 4)) for number in range(count)]
    for number, future in enumerate(futures):
        assert np.array_equal(future.result(60)["y"], wanted[number % 4])


def test_nodes_with_their_keys_serve_and_the_wire_shows_nothing(plan, wanted, keys, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    with (
        nodes(address, python_environment, ["--keys", keys / "a"], ["--keys", keys / "b"]),
        Pipeline.listen(plan, bind=address, keys=keys / "coordinator", start_timeout=120) as pipeline,
    ):
        ask(pipeline, wanted)
        assert all(node.address.startswith("tcp://") for node in pipeline.nodes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("no key", "this process has none; pass them with --keys DIR"),
        ("a key of another", "it does not allow this process's key"),
        ("a revoked key", "it does not allow this process's key"),
        ("another coordinator's key", "other keys than allowed/coordinator.key says"),
    ],
)
def test_a_node_without_the_right_key_is_told_and_gets_nothing(
    plan, wanted, keys, free_port, python_environment, tmp_path, wrong, words
):
    address = f"tcp://127.0.0.1:{free_port}"
    create(tmp_path / "stranger")
    options = ["--keys", tmp_path / "stranger"]
    if wrong == "no key":
        options = []
    elif wrong == "a key of another":
        allow(tmp_path / "stranger", keys / "coordinator" / "public.key", "coordinator")
    elif wrong == "a revoked key":
        create_for(tmp_path / "more", ("c",))
        allow(keys / "coordinator", tmp_path / "more" / "c" / "public.key", "c")
        revoke(keys / "coordinator", "c")
        allow(tmp_path / "more" / "c", keys / "coordinator" / "public.key", "coordinator")
        options = ["--keys", tmp_path / "more" / "c"]
    else:
        allow(tmp_path / "stranger", keys / "a" / "public.key", "coordinator")
        allow(keys / "coordinator", tmp_path / "stranger" / "public.key", "stranger")
    with (
        nodes(address, python_environment, ["--keys", keys / "a"], ["--keys", keys / "b"], options) as started,
        Pipeline.listen(plan, bind=address, keys=keys / "coordinator", start_timeout=120) as pipeline,
    ):
        assert started[2].wait(60) == 1
        assert words in started[2].stderr.read()
        ask(pipeline, wanted)


def test_a_revoked_node_is_let_go_while_it_serves(plan, wanted, keys, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    create_for(keys / "more", ("c",))
    allow(keys / "more" / "c", keys / "coordinator" / "public.key", "coordinator")
    allow(keys / "coordinator", keys / "more" / "c" / "public.key", "c")
    with (
        nodes(
            address,
            python_environment,
            ["--keys", keys / "a", "--stage", "0"],
            ["--keys", keys / "b", "--stage", "1"],
        ) as started,
        Pipeline.listen(plan, bind=address, keys=keys / "coordinator", start_timeout=120) as pipeline,
    ):
        ask(pipeline, wanted)
        revoke(keys / "coordinator", "b")
        assert started[1].wait(60) == 1
        assert "had its key revoked" in pipeline.incidents[0].story
        with nodes(address, python_environment, ["--keys", keys / "more" / "c"]):
            ask(pipeline, wanted)


def test_a_link_may_leave_this_host_only_with_keys_or_when_told(plan, keys):
    with pytest.raises(PipelineError, match=r"onnxsplit keys new.*--insecure"):
        Pipeline.listen(plan, bind="tcp://0.0.0.0:7777")
    with pytest.raises(LaunchFailed, match="not ready after"):
        Pipeline.listen(plan, bind=f"tcp://0.0.0.0:{ports.free_port()}", insecure=True, start_timeout=0.1)
    with pytest.raises(LaunchFailed, match="not ready after"):
        Pipeline.listen(plan, bind=f"tcp://0.0.0.0:{ports.free_port()}", keys=keys / "coordinator", start_timeout=0.1)


def test_keys_that_others_can_read_are_refused_with_what_to_do(keys):
    (keys / "a" / "secret.key").chmod(0o644)
    with pytest.raises(InputError, match=r"mode 644.*chmod 600"):
        Keys(keys / "a")
    (keys / "b").chmod(0o755)
    with pytest.raises(InputError, match=r"mode 755.*chmod 700"):
        Keys(keys / "b")
    with pytest.raises(InputError, match="onnxsplit keys new"):
        Keys(keys / "nobody")


def test_keys_are_made_for_the_user_alone_and_never_overwritten(keys, tmp_path):
    assert (keys / "a" / "secret.key").stat().st_mode & 0o777 == 0o600
    assert (keys / "a").stat().st_mode & 0o777 == 0o700
    with pytest.raises(InputError, match="never overwritten"):
        create(keys / "a")
    with pytest.raises(InputError, match="never overwritten"):
        create_for(keys, ("c",))
    with pytest.raises(
        InputError, match=r"a holds keys since \d{4}-.*--keys \S*/a\. They allow coordinator to connect"
    ):
        create(keys / "a")
    with pytest.raises(InputError, match=r"one of: \S*/a, .*/b, .*Make others: onnxsplit keys new \S*-2 --node c$"):
        create_for(keys, ("c",))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(InputError, match="letters exists and holds no keys; nothing was touched"):
        create(tmp_path / "letters")
    with pytest.raises(InputError, match="is not a name for a key"):
        create_for(tmp_path / "other", ("../c",))
    with pytest.raises(InputError, match=r"'z' is not allowed .*allowed are: a, b"):
        revoke(keys / "coordinator", "z")
    (tmp_path / "bad.key").write_text("nonsense")
    with pytest.raises(InputError, match="holds no key"):
        allow(keys / "a", tmp_path / "bad.key", "c")
    assert "secret" not in repr(Keys(keys / "a").pair)


def test_keys_by_the_command_line(tmp_path, python_environment):
    def run(*words):
        command = [sys.executable, "-P", "-m", "onnxsplit", "keys", *map(str, words)]
        return subprocess.run(command, env=python_environment, capture_output=True, text=True, check=False)

    made = run("new", tmp_path / "k", "--node", "a", "--node", "b")
    assert made.returncode == 0
    secret = (tmp_path / "k" / "a" / "secret.key").read_text().strip()
    assert secret not in made.stdout + made.stderr
    assert run("revoke", tmp_path / "k" / "coordinator", "a").returncode == 0
    assert len(Keys(tmp_path / "k" / "coordinator").allowed) == 1
    assert (
        run("allow", tmp_path / "k" / "coordinator", tmp_path / "k" / "a" / "public.key", "--name", "a").returncode == 0
    )
    refused = run("new", tmp_path / "k")
    assert (refused.returncode, "never overwritten" in refused.stderr) == (1, True)
    assert (tmp_path / "k" / "a" / "secret.key").read_text().strip() == secret


@pytest.mark.parametrize("protected", [True, False])
def test_the_wire_shows_tensors_only_where_there_are_no_keys(plan, keys, free_port, python_environment, protected):
    fragments, behind = ports.free_port(), ports.free_port()
    proxy = Proxy(fragments, behind)
    far = ["--bind", f"tcp://127.0.0.1:{behind}", "--advertise", f"tcp://127.0.0.1:{fragments}", "--stage", "0"]
    own = [["--keys", keys / name] if protected else [] for name in ("a", "b")]
    address = f"tcp://127.0.0.1:{free_port}"
    with (
        nodes(
            address,
            python_environment,
            [*far, "--no-shared-memory", *own[0]],
            ["--stage", "1", "--no-shared-memory", *own[1]],
        ),
        Pipeline.listen(
            plan,
            bind=address,
            keys=keys / "coordinator" if protected else None,
            start_timeout=120,
            shared_memory=False,
        ) as pipeline,
    ):
        pipeline.run(given(3))
    proxy.close()
    assert len(proxy.seen) > given(3)["x"].nbytes
    assert (given(3)["x"].tobytes()[1000:1064] in proxy.seen) is not protected


@pytest.fixture
def timings():
    return QUICK


@pytest.fixture
def linked(plan, free_port, python_environment, timings):
    """A pipeline whose second node is behind proxies, for its control link and for its fragments."""
    control, fragments, behind = ports.free_port(), ports.free_port(), ports.free_port()
    proxies = [Proxy(control, free_port), Proxy(fragments, behind)]
    far = ["--connect", f"tcp://127.0.0.1:{control}", "--bind", f"tcp://127.0.0.1:{behind}", "--no-shared-memory"]
    far += ["--advertise", f"tcp://127.0.0.1:{fragments}", "--stage", "1"]
    address = f"tcp://127.0.0.1:{free_port}"
    with (
        nodes(address, python_environment, ["--stage", "0"], far),
        Pipeline.listen(plan, bind=address, start_timeout=120, timings=timings, inflight=8) as pipeline,
    ):
        yield pipeline, proxies
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize("timings", [Timings(silence_s=60)])
def test_a_slow_link_is_no_fault(linked, wanted):
    pipeline, proxies = linked
    for proxy in proxies:
        proxy.delay_s = 0.05
    ask(pipeline, wanted)
    assert pipeline.incidents == ()


@pytest.mark.parametrize("timings", [Timings(beat_s=0.2, silence_s=300)])
def test_a_control_link_that_breaks_and_soon_comes_back_is_no_loss(linked, wanted):
    """Before, the node was not recognised when it reconnected, and was told that it had been replaced."""
    pipeline, (control, _) = linked
    ask(pipeline, wanted)
    for _ in range(3):
        control.cut()
        time.sleep(0.5)
        control.mend()
        ask(pipeline, wanted)
        time.sleep(0.5)
    assert pipeline.incidents == ()
    assert [node.state for node in pipeline.nodes] == ["ready", "ready"]


def test_a_link_for_fragments_that_is_cut_and_mended_loses_nothing(linked, wanted):
    pipeline, (_, fragments) = linked
    ask(pipeline, wanted)
    futures = [pipeline.submit(given(number)) for number in range(4)]
    fragments.cut()
    futures += [pipeline.submit(given(number)) for number in range(2)]
    time.sleep(0.5)
    fragments.mend()
    for number, future in enumerate(futures):
        assert np.array_equal(future.result(60)["y"], wanted[number % 4])


def test_a_node_that_is_cut_off_for_long_is_given_up_and_comes_back(linked, wanted):
    pipeline, proxies = linked
    ask(pipeline, wanted)
    for proxy in proxies:
        proxy.cut()
    futures = [pipeline.submit(given(number)) for number in range(4)]
    wait_until(lambda: pipeline.incidents)
    assert "has been silent" in pipeline.incidents[0].story
    for proxy in proxies:
        proxy.mend()
    for number, future in enumerate(futures):
        assert np.array_equal(future.result(60)["y"], wanted[number])
    assert os.getpid() not in {node.pid for node in pipeline.nodes}
