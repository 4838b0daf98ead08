"""Connects this process to a Ray cluster: the one that runs, or a new one."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from onnxsplit.errors import MissingDependency
from onnxsplit.session import host_cores
from runtime.errors import LaunchFailed

_PROBE_S = 3.0  # longest wait for an answer of the cluster


class RayConnection:
    """This process's connection to Ray, in a thread of its own, because Ray ties its processes to the thread.

    Use :meth:`shared`, not the constructor.

    Attributes:
        is_own: whether the cluster was started here.

    Raises:
        LaunchFailed: the cluster does not answer or cannot be started.
    """

    _present: RayConnection | None = None
    _guard = threading.Lock()

    def __init__(self, ray: Any, processors: int) -> None:
        self._ray = ray
        self._processors = processors
        self._users = 0
        self._ready, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.is_own = False
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    @classmethod
    def shared(cls, ray: Any, processors: int) -> RayConnection:
        """The connection that all launchers of this process share; the first one makes it.

        Args:
            ray: the module.
            processors: the number of CPUs of a cluster that is started here, at least.
        """
        with cls._guard:
            if cls._present is None:
                cls._present = cls(ray, processors)
            cls._present._users += 1
            return cls._present

    def release(self) -> None:
        """Release the connection; the last user disconnects from Ray."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            type(self)._present = None
        self._over.set()
        self._thread.join()

    def _hold(self) -> None:
        ray = self._ray
        given = ray.is_initialized()  # the calling program has connected, and stays connected
        try:
            if not given:
                address = _cluster_address()
                self.is_own = address is None
                own = {} if address else {"include_dashboard": False, "num_cpus": max(self._processors, host_cores())}
                ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
                _quiet(ray)
        except BaseException as error:
            self._error = LaunchFailed(f"cannot start or reach a Ray cluster: {error}")
            self._error.__cause__ = error
            self._ready.set()
            return
        self._ready.set()
        self._over.wait()
        if not given:
            ray.shutdown()


def import_ray() -> Any:
    """The module ``ray``.

    Raises:
        MissingDependency: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise MissingDependency("the launcher ray needs Ray: pip install 'onnxsplit[ray]'") from error
    return ray


def _cluster_address() -> str | None:
    """The address of the running cluster, by the rules of Ray; None when there is none.

    Raises:
        LaunchFailed: ``RAY_ADDRESS`` names a cluster that does not answer. (Ray itself would try for minutes.)
    """
    named = os.environ.get("RAY_ADDRESS")
    if named == "local":
        return None
    if named and "://" not in named and named != "auto":
        _probe(named, "RAY_ADDRESS")
    if named:
        return named
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"  # noqa: S108  where Ray has it
    try:
        address = noted.read_text().strip()
        _probe(address, str(noted))
    except (OSError, LaunchFailed):
        return None
    return address


def _probe(address: str, named_in: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, ValueError) as error:
        raise LaunchFailed(
            f"no Ray cluster answers at {address!r} ({named_in}): {error}. "
            "Start one with `ray start --head`, or unset it"
        ) from error


def _quiet(ray: Any) -> None:
    """Keep Ray's messages about dead hosts off standard output, which is for results; they are in Ray's log too."""
    worker: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None
