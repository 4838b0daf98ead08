"""Files that users name are checked before they are read: FIFOs, devices, folders, sparse files of a terabyte."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path

import build
import click
import numpy as np
import pytest

from onnxsplit import files
from onnxsplit.cli import settings
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import ExportError, InputError, OnnxsplitError
from onnxsplit.export import export
from onnxsplit.export.sources import recognise
from onnxsplit.files import MOST_TEXT_BYTES, check_outputs, check_regular, open_regular, read_regular, replacing
from onnxsplit.model.source import open_model
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan_files import check_file, load_plan
from onnxsplit.session import open_session
from runtime.gateway.access import read_tokens
from runtime.node.health import write_health
from runtime.wire.keys import allow, create

TERABYTE = 1 << 40


@pytest.fixture(autouse=True)
def nothing_blocks():
    """End a test that waits for a FIFO with an error."""

    def blocked(*_):
        raise TimeoutError("a read blocks")

    before = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(TERABYTE)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


KINDS = [
    (fifo, "it is a FIFO"),
    (device, "it is a character device"),
    (folder, "it is a folder"),
    (listening, "it is a socket"),
    (sparse, "bytes or more; at most"),
]


@pytest.mark.parametrize(("make", "words"), KINDS)
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, make, words):
    make(tmp_path / "f")
    for read in (lambda path: read_regular(path, most_bytes=MOST_TEXT_BYTES), open_regular, check_regular):
        with pytest.raises(OSError, match="f") as refused:
            read(tmp_path / "f")
        assert words in refused.value.strerror


def test_a_fifo_that_takes_the_place_of_a_checked_file_does_not_block(tmp_path, monkeypatch):
    path, seen = tmp_path / "f", []
    path.write_bytes(b"x")

    def check(*arguments):
        seen.append(arguments)
        if len(seen) == 1:
            path.unlink()
            os.mkfifo(path)
        else:
            original(*arguments)

    original = files._check_regular
    monkeypatch.setattr(files, "_check_regular", check)
    with pytest.raises(OSError, match="it is a FIFO"):
        open_regular(path)


def test_a_file_whose_size_says_nothing_is_bounded_too():
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(OSError, match="at most 10 are allowed"):
        read_regular(Path("/proc/self/maps"), most_bytes=10)


def public_key(path: Path) -> None:
    create(path.parent / "keys")
    allow(path.parent / "keys", path, "node")


READERS = {
    "model.onnx": open_model,
    "session.onnx": lambda path: open_session(path, threads=1),
    "in.npz": load_npz,
    "cluster.toml": load_cluster,
    "onnxsplit.toml": settings.read,
    "public.key": public_key,
    "tokens": read_tokens,
    "model.json": lambda path: recognise(str(path)),
}


@pytest.mark.parametrize(("make", "words"), [kind for kind in KINDS if kind[0] is not folder])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_what_is_not_a_file(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises((OnnxsplitError, click.UsageError), match=name) as refused:
        READERS[name](tmp_path / name)
    assert words in str(refused.value)


@pytest.mark.parametrize(("make", "words"), KINDS)
def test_a_plan_file_and_a_stage_that_are_not_files_are_named(chain_plan, tmp_path, make, words):
    copy = shutil.copytree(chain_plan, tmp_path / "copy")
    entry = load_plan(copy).stages[0].files[0]
    (copy / entry.name).unlink()
    make(copy / entry.name)
    expected = "is a link" if make is device else words
    assert expected in check_file(copy, entry)[0]
    (copy / "plan.json").unlink()
    make(copy / "plan.json")
    with pytest.raises(OnnxsplitError, match=words):
        load_plan(copy)


@pytest.mark.parametrize(("make", "words"), KINDS)
def test_external_data_that_is_not_a_file_is_refused(tmp_path, make, words):
    proto = build.chain(1)
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = 1
    weight.external_data.add(key="location", value="w.data")
    make(tmp_path / "w.data")
    expected = "is a link" if make is device else words
    with pytest.raises(OnnxsplitError, match=expected):
        open_model(build.save(proto, tmp_path))


SPECIAL = [(fifo, "it is a FIFO"), (folder, "it is a folder"), (listening, "it is a socket")]


@pytest.mark.parametrize(("make", "words"), SPECIAL)
@pytest.mark.parametrize("by_link", [False, True])
def test_special_files_are_never_replaced(tmp_path, make, words, by_link):
    make(tmp_path / "f")
    before = (tmp_path / "f").stat().st_ino
    target = tmp_path / "f"
    if by_link:
        target = tmp_path / "link"
        target.symlink_to("f")
    with pytest.raises(OSError, match=words), replacing(target) as draft:
        draft.write_text("new")
    with pytest.raises(InputError, match=f"cannot write .*{words}"):
        check_outputs(None, target)
    with pytest.raises(InputError, match=words):
        save_npz(target, {"x": np.zeros(1)})
    write_health(target, "ready")
    with pytest.raises(ExportError, match=words):
        export("/nothing", target)
    assert (tmp_path / "f").stat().st_ino == before
    assert {path.name for path in tmp_path.iterdir()} == {"f", target.name}


def test_what_takes_the_place_of_a_target_meanwhile_is_not_replaced(tmp_path):
    written = replacing(tmp_path / "f")
    (written.__enter__()).write_text("new")
    fifo(tmp_path / "f")
    with pytest.raises(OSError, match="it is a FIFO"):
        written.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through_and_stays(tmp_path, there):
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.parent.mkdir()
    if there:
        real.write_text("old")
    link.symlink_to(real)
    with replacing(link) as draft:
        draft.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    write_health(link, "ready")
    assert link.is_symlink()
    assert real.read_text() == "ready\n"
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(InputError, match="symbolic links"):
        check_outputs(link)
