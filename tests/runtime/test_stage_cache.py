"""Stage files are fetched once, complete, and kept up to a limit."""

from __future__ import annotations

import hashlib
import os
import threading
import time

import msgspec.structs
import pytest

from onnxsplit.file_cache import LockedCache
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_files import load_plan, plan_id, read_plan_file
from runtime.errors import PipelineError
from runtime.files.client import FileClient
from runtime.files.server import FileServer
from runtime.files.stage_cache import StageCache
from runtime.wire.security import Security

BODY = bytes(range(256)) * 20_000  # five pieces


def stage_of(plan, *bodies: bytes, name: str = "stage0.onnx"):
    """Return a stage whose files hold these bytes."""
    files = tuple(
        FileEntry(name=f"{name}{n or ''}", sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body))
        for n, body in enumerate(bodies)
    )
    return msgspec.structs.replace(plan.stages[0], file=name, files=files)


@pytest.fixture
def plan(chain_plan):
    return load_plan(chain_plan)


@pytest.fixture
def served(tmp_path, plan):
    """A server of a plan whose stage 0 is one file, and a client of it."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "stage0.onnx").write_bytes(BODY)
    stage = stage_of(plan, BODY)
    plan = msgspec.structs.replace(plan, stages=(stage, *plan.stages[1:]))
    (folder / "plan.json").write_bytes(plan.to_json())
    identity = plan_id(read_plan_file(folder))
    address = f"ipc://{tmp_path}/files"
    with (
        FileServer(address, folder, plan, identity, security=Security()) as server,
        FileClient(address, security=Security()) as client,
    ):
        yield server, client, stage, identity, folder


def test_a_file_comes_whole_and_the_plan_by_its_identity(served, tmp_path):
    server, client, stage, identity, folder = served
    assert server.idle_s == float("inf")
    told = []
    client.file(stage.files[0], tmp_path / "got", told.append)
    assert (tmp_path / "got").read_bytes() == BODY
    assert told == sorted(told)
    assert told[-1] == len(BODY)
    assert server.idle_s < 60
    assert client.plan(identity) == (folder / "plan.json").read_bytes()


def test_what_came_before_is_not_fetched_again(served, tmp_path):
    _, client, stage, _, _ = served
    (tmp_path / "got").write_bytes(BODY[: 2 << 20])
    told = []
    client.file(stage.files[0], tmp_path / "got", told.append)
    assert (tmp_path / "got").read_bytes() == BODY
    assert told[0] == 3 << 20


def test_a_file_that_went_wrong_on_the_way_is_refused_and_begun_anew(served, tmp_path):
    _, client, stage, _, _ = served
    (tmp_path / "got").write_bytes(b"?" * (2 << 20))
    with pytest.raises(PipelineError, match="its SHA-256 differs"):
        client.file(stage.files[0], tmp_path / "got")
    client.file(stage.files[0], tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == BODY


def test_only_what_the_plan_names_is_given(served, tmp_path):
    _, client, stage, _, folder = served
    secret = hashlib.sha256(b"secret").hexdigest()
    (folder / "secret").write_bytes(b"secret")
    entry = FileEntry(name="secret", sha256=secret, size_bytes=6)
    with pytest.raises(PipelineError, match="the plan names no such file"):
        client.file(entry, tmp_path / "got")
    larger = msgspec.structs.replace(stage.files[0], size_bytes=len(BODY) - 1)
    with pytest.raises(PipelineError, match="bytes of the file"):
        client.file(larger, tmp_path / "got2")


def copy_of(body: bytes):
    return lambda entry, target: target.write_bytes(body)


def refuse(entry, target):
    raise AssertionError("fetched again")


def test_a_stage_is_fetched_once_for_all_who_want_it(tmp_path, plan):
    stage, fetched = stage_of(plan, BODY), []
    started, go_on = threading.Event(), threading.Event()

    def slowly(entry, target):
        started.set()
        go_on.wait(60)
        fetched.append(entry.name)
        target.write_bytes(BODY)

    caches = [StageCache(tmp_path, 1 << 30) for _ in range(2)]
    threads = [threading.Thread(target=cache.obtain, args=(stage.files, slowly), daemon=True) for cache in caches]
    for thread in threads:
        thread.start()
    started.wait(60)
    time.sleep(0.1)  # the other process is waiting now
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert fetched == ["stage0.onnx"]
    for cache in caches:
        cache.close()


def test_the_cache_stays_within_its_bound_and_keeps_what_is_run(tmp_path, plan):
    stages = [stage_of(plan, bytes([n]) * 1000) for n in range(4)]
    running, passing = StageCache(tmp_path, 2500), StageCache(tmp_path, 2500)
    held = running.obtain(stages[0].files, copy_of(b"\0" * 1000))
    folders = []
    for number in (1, 2, 3):
        folders.append(passing.obtain(stages[number].files, copy_of(bytes([number]) * 1000)))
        passing.close()
    assert held.is_dir(), "a node runs it"
    assert [folder.is_dir() for folder in folders] == [False, False, True]
    assert running.obtain(stages[0].files, refuse) == held
    running.close()


def test_a_fetch_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path, plan):
    stage, cache = stage_of(plan, BODY), StageCache(tmp_path, 1 << 30)

    def broken(entry, target):
        target.write_bytes(BODY[:100])
        raise PipelineError("gone")

    with pytest.raises(PipelineError, match="gone"):
        cache.obtain(stage.files, broken)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".making", ".partial"]
    cache.close()
    assert cache.obtain(stage.files, copy_of(BODY)).is_dir()
    cache.close()


def test_entries_that_are_long_unused_are_evicted_and_a_failed_one_leaves_no_draft(tmp_path):
    def make(folder):
        (folder / "file").touch()

    def fail(folder):
        make(folder)
        raise OSError("no room")

    with LockedCache(tmp_path) as cache, LockedCache(tmp_path) as other:
        held, old, new = cache.obtain("held", make), other.obtain("old", make), other.obtain("new", make)
        other.close()
        for entry in (held, old):
            os.utime(entry, (0, 0))
        other.evict(unused_s=3600)
        assert [entry.is_dir() for entry in (held, old, new)] == [True, False, True]
        with pytest.raises(OSError, match="no room"):
            cache.obtain("failed", fail)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"held", "new"}
