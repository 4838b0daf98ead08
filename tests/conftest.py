"""What tests share: plans made once, and the check that nothing is left behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# A folder for temporary files of this run alone, so that what is left behind is this run's.
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="t-")
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

# Started in the background, or under nohup, we would pass ignored signals on to the processes that tests end by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import build
import hypothesis
import ports
import psutil
import pytest

from onnxsplit.planning.planner import partition

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

LONGEST = ["export", "serving", "cli", "zoo", "faults", "gateway", "readme", "export_docs", "ray", "page", "keys"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give temporary folders short names without the user's: the path of a socket has 107 bytes at most."""
    config.option.basetemp = config.option.basetemp or f"{tempfile.tempdir}/p"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no worker is left with one at the end."""
    first = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def short_measurements():
    """Models are measured for a tenth of the usual time: no test is about how well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxsplit.cost.levels._LEVEL_SECONDS", 0.03)
        patch.setattr("onnxsplit.cost.measured._PROFILE_SECONDS", 0.06)
        patch.setattr("onnxsplit.planning.rounds._STAGE_SECONDS", 0.08)
        yield


@pytest.fixture(scope="session")
def chain_plan(tmp_path_factory) -> Path:
    """A chain of twelve ops in two stages."""
    return _plan(tmp_path_factory, build.chain(), 2)


@pytest.fixture(scope="session")
def diamond_plan(tmp_path_factory) -> Path:
    """One op a stage: the last one joins two branches."""
    return _plan(tmp_path_factory, build.diamond(), 4)


def _plan(factory, proto, stages: int) -> Path:
    folder = factory.mktemp("plan")
    model = build.save(proto, folder)
    partition(model, stages=stages, out=folder / "model.plan", costs="analytic")
    return folder / "model.plan"


def leftovers() -> list[str]:
    """Node processes of this test run, their folders, and shared memory of ours."""
    processes = [
        f"process {p.pid}"
        for p in psutil.Process().children(recursive=True)
        if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and "runtime.node" in " ".join(_command(p))
    ]
    folders = [
        str(path)
        for path in Path(tempfile.gettempdir()).glob("onnxsplit-*")
        if path.is_dir() and any(entry.is_socket() for entry in path.iterdir())
    ]
    memory = [str(path) for path in Path("/dev/shm").glob("onnxsplit*")]  # tests name theirs otherwise
    return processes + folders + memory


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """No module's tests may leave a process, a socket or shared memory."""
    before = leftovers()
    yield
    assert [thing for thing in leftovers() if thing not in before] == []


@pytest.fixture(scope="module")
def browser():
    """Chromium; what is expected of a page may take a minute."""
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
    """The environment for a Python that is to find this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def free_port() -> int:
    """A tcp port of the loopback that nobody uses now."""
    return ports.free_port()
