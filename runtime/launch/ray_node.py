"""The actor that owns a node's process on a host of a Ray cluster."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping, Sequence

from runtime.home import hold
from runtime.launch.local import LocalHandle, LocalLauncher
from runtime.wire.keys import create


class NodeActor:
    """Starts a node's process, and starts it again when it has ended. A process never outlives its actor.

    Args:
        memory_bytes: the largest size of the node's outputs in shared memory at once.
        custom_ops: for each stage, the libraries of custom ops that its nodes may load.
        background_s: how long the first process loads at idle priority at most; 0 for not at all.
    """

    def __init__(self, memory_bytes: int, custom_ops: Mapping[int, Sequence[str]], background_s: float = 0.0) -> None:
        self._launcher = LocalLauncher(memory_bytes=memory_bytes, custom_ops=custom_ops, background_s=background_s)
        self._held = hold(self._launcher.folder)  # lets other processes remove it when this actor is killed
        self._keys = self._launcher.folder / "keys"
        self._public = ""
        self._handles: dict[int, LocalHandle] = {}
        self._lock = threading.Lock()

    def begin(self, coordinator: str) -> tuple[str, str]:
        """Make keys for the node, if there are none yet.

        Args:
            coordinator: the coordinator's public key.

        Returns:
            The node's public key, and the id of the Ray node that this actor is on.
        """
        import ray

        with self._lock:
            if not self._public:
                create(self._keys)
                (self._keys / "allowed" / "coordinator.key").write_text(coordinator + "\n")
                self._public = (self._keys / "public.key").read_text().strip()
        return self._public, ray.get_runtime_context().get_node_id()

    def start(self, connect: str, stage: int, replica: int, number: int, host: str) -> int:
        """Start the process; returns its pid. The arguments are those of a launcher and the name of this host."""
        more = ("--keys", str(self._keys), "--host", host)
        handle = self._launcher.start(connect=connect, stage=stage, replica=replica, number=number, more=more)
        self._handles[number] = handle
        return handle.pid

    def close(self) -> None:
        """Kill the processes that are running, and remove all files."""
        for handle in list(self._handles.values()):
            handle.kill()
        self._launcher.close(keep_logs=False)
        os.close(self._held)

    def wait(self, number: int) -> str:
        """Wait until the process of node ``number`` has ended; returns how it ended."""
        handle = self._handles[number]
        select.select([handle], [], [])
        story = handle.story()
        del self._handles[number]
        handle.end(0.0)
        return story
