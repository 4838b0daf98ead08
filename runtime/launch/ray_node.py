"""What runs on a host of a Ray cluster: an actor that owns one node's process."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping, Sequence

from runtime.home import hold
from runtime.launch.local import LocalHandle, LocalLauncher
from runtime.wire.keys import create


class NodeActor:
    """Starts a node's process, and again when it ended; a process never outlives its actor.

    Args:
        memory_bytes: of shared memory for the node's outputs at most.
        custom_ops: by stage, the libraries of custom ops that its nodes may load.
    """

    def __init__(self, memory_bytes: int, custom_ops: Mapping[int, Sequence[str]]) -> None:
        self._launcher = LocalLauncher(memory_bytes=memory_bytes, custom_ops=custom_ops)
        self._held = hold(self._launcher.folder)  # or nobody could remove it when this actor is killed
        self._keys = self._launcher.folder / "keys"
        self._public = ""
        self._handles: dict[int, LocalHandle] = {}
        self._lock = threading.Lock()

    def begin(self, coordinator: str) -> tuple[str, str]:
        """Make keys for the node, once; its public key, and the Ray node this is.

        Args:
            coordinator: the public key of the coordinator.
        """
        import ray

        with self._lock:
            if not self._public:
                create(self._keys)
                (self._keys / "allowed" / "coordinator.key").write_text(coordinator + "\n")
                self._public = (self._keys / "public.key").read_text().strip()
        return self._public, ray.get_runtime_context().get_node_id()

    def start(self, connect: str, stage: int, replica: int, number: int, host: str) -> int:
        """Start the process; its id."""
        more = ("--keys", str(self._keys), "--host", host)
        handle = self._launcher.start(connect=connect, stage=stage, replica=replica, number=number, more=more)
        self._handles[number] = handle
        return handle.pid

    def close(self) -> None:
        """End what still runs, and leave no file."""
        for handle in list(self._handles.values()):
            handle.kill()
        self._launcher.close(keep_logs=False)
        os.close(self._held)

    def wait(self, number: int) -> str:
        """Wait until a process has ended; its story."""
        handle = self._handles[number]
        select.select([handle], [], [])
        story = handle.story()
        del self._handles[number]
        handle.end(0.0)
        return story
