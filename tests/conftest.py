"""Fixtures that tests share: plans made once, and the check that tests leave nothing behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

# The folder for temporary files is separate for each run, so that leftovers belong to this run.
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="t-")
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

# A run in the background or under nohup would pass ignored signals on to processes that tests end by signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import build
import hypothesis
import ports
import pytest
from processes import children_of

from onnxsplit.effort import EFFORTS
from onnxsplit.plan import TYPICAL_HOST
from onnxsplit.planning.planner import partition

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

LONGEST = [
    "export",
    "serving",
    "cli",
    "zoo",
    "faults",
    "gateway",
    "readme",
    "doc_texts",
    "doc_pages",
    "export_docs",
    "ray",
    "page",
    "keys",
    "deployed",
]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give temporary folders short names without the user's: the path of a socket has 107 bytes at most."""
    config.option.basetemp = config.option.basetemp or f"{tempfile.tempdir}/p"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first, so that no worker runs one of them at the end."""
    first = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def short_measurements():
    """Measure models for a tenth of the usual time: no test depends on the precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "normal", replace(EFFORTS["normal"], sample_s=0.01, samples=3))
        patch.setattr("onnxsplit.planning.target.host_costs", lambda: TYPICAL_HOST)  # not those of the user's cache
        yield


@pytest.fixture(scope="session")
def chain_plan(tmp_path_factory) -> Path:
    """A plan of a chain of twelve ops in two stages."""
    return _plan(tmp_path_factory, build.chain(), 2)


@pytest.fixture(scope="session")
def diamond_plan(tmp_path_factory) -> Path:
    """A plan with one op per stage; the last stage joins two branches."""
    return _plan(tmp_path_factory, build.diamond(), 4)


def _plan(factory, proto, stages: int) -> Path:
    folder = factory.mktemp("plan")
    model = build.save(proto, folder)
    partition(model, stages=stages, out=folder / "model.plan", costs="analytic")
    return folder / "model.plan"


def leftovers() -> list[str]:
    """Return the node processes of this test run, their folders, and their shared memory."""
    processes = [f"process {child.pid}" for child in children_of(os.getpid(), "runtime.node", recursive=True)]
    folders = [
        str(path)
        for path in Path(tempfile.gettempdir()).glob("onnxsplit-*")
        if path.is_dir() and any(entry.is_socket() for entry in path.iterdir())
    ]
    memory = [str(path) for path in Path("/dev/shm").glob("onnxsplit*")]  # regions of tests have other names
    return processes + folders + memory


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """Check that the tests of a module leave no process, socket or shared memory."""
    before = leftovers()
    yield
    assert [thing for thing in leftovers() if thing not in before] == []


@pytest.fixture(scope="module")
def browser():
    """Chromium; expectations of a page may take up to a minute."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here; install it with: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=120_000)
        yield opened
        opened.close()


@pytest.fixture
def python_environment() -> dict[str, str]:
    """The environment for a Python process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def free_port() -> int:
    """A free TCP port of the loopback."""
    return ports.free_port()
