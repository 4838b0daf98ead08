"""The allow-list of a keys folder is read again when its files change, however they are changed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from onnxsplit.errors import InputError
from runtime.wire.keys import Keys, create_for


@pytest.fixture
def folder(tmp_path):
    create_for(tmp_path / "keys", ("a", "b", "c"))
    return tmp_path / "keys"


def public(folder, name: str) -> str:
    return Keys(folder / name).pair.public


def mounted(folder, volume, *names: str) -> None:
    """Fill a volume as the kubelet does: files in a new folder, to which one link is switched in one step."""
    version = Path(tempfile.mkdtemp(prefix="..", dir=volume))
    for name in names:
        shutil.copy(folder / name / "public.key", version / f"{name}.key")
        if not (volume / f"{name}.key").is_symlink():
            (volume / f"{name}.key").symlink_to(f"..data/{name}.key")
    before = (volume / "..data").resolve() if (volume / "..data").exists() else None
    (volume / "..new").symlink_to(version.name)
    (volume / "..new").rename(volume / "..data")
    for link in volume.glob("*.key"):
        if not link.exists():
            link.unlink()
    if before is not None:
        shutil.rmtree(before)


def test_a_volume_of_kubernetes_that_is_replaced_allows_who_is_in_it_now(folder, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mounted(folder, volume, "a", "b")
    coordinator = folder / "coordinator"
    shutil.rmtree(coordinator / "allowed")
    (coordinator / "allowed").symlink_to(volume)
    keys = Keys(coordinator)
    assert keys.allowed == {public(folder, "a"), public(folder, "b")}
    mounted(folder, volume, "b", "c")
    assert keys.allowed == {public(folder, "b"), public(folder, "c")}
    mounted(folder, volume)
    assert keys.allowed == frozenset()


def test_a_key_that_was_replaced_with_the_same_time_and_name_is_noticed(folder):
    keys, file = Keys(folder / "coordinator"), folder / "coordinator" / "allowed" / "a.key"
    assert public(folder, "a") in keys.allowed
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    shutil.copy(folder / "a" / "allowed" / "coordinator.key", file.with_suffix(".new"))
    os.utime(file.with_suffix(".new"), ns=times)
    file.with_suffix(".new").rename(file)
    assert keys.allowed == {public(folder, "coordinator"), public(folder, "b"), public(folder, "c")}


def test_a_file_that_is_half_written_changes_nothing_until_it_is_whole(folder, caplog):
    keys, file = Keys(folder / "coordinator"), folder / "coordinator" / "allowed" / "a.key"
    everyone, whole = keys.allowed, file.read_text()
    file.write_text(whole[:20])
    (file.parent / "d.key").write_text("")
    assert keys.allowed == everyone
    assert keys.allowed == everyone
    assert sorted("its former key stays" in record.message for record in caplog.records) == [False, True]
    file.write_text(whole)
    (file.parent / "d.key").unlink()
    assert keys.allowed == everyone
    file.unlink()
    assert keys.allowed == everyone - {public(folder, "a")}


def test_a_process_does_not_start_with_a_file_that_holds_no_key(folder):
    (folder / "coordinator" / "allowed" / "a.key").write_text("nonsense")
    with pytest.raises(InputError, match=r"a\.key holds no key"):
        Keys(folder / "coordinator")
