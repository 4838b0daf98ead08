"""Nodes on the hosts of a Ray cluster: Ray places and watches processes, tensors stay on our own links.

    placement group   a bundle a node: processors, GPU and memory as the plan says
    actor             one a node, in its bundle; starts the node's process, and ends with it or it with the actor
    process           a node like any other, with keys that were made where it runs: only public halves travel

A process that ends is started again by its actor. When an actor is lost with its host, or its host is silent, the next
try is made elsewhere, outside of the bundle; Ray moves bundles of hosts it knows to be dead, so that is tried in turn.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any, Literal, get_args

from onnxsplit.custom_ops import named
from onnxsplit.errors import InputError, MissingDependency
from onnxsplit.plan import Plan, Stage
from onnxsplit.session import host_cores
from runtime.errors import LaunchFailed
from runtime.home import private_folder
from runtime.launch.ray_node import NodeActor
from runtime.launcher import Rendezvous
from runtime.topology import ReplicaKey
from runtime.wire.security import Security, new_key_pair

Placement = Literal["spread", "strict-spread", "pack"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_UP_S = 60.0  # for an actor to come up, before another place is tried
_GROUP_S = 30.0
_PROBE_S = 3.0
_END_S = 15.0  # for nodes to end in order, before their actors are killed
_PROCESS_BYTES = 256 << 20  # of a node beside its stage: Python, ONNX Runtime
_log = logging.getLogger("runtime.launch")


class RayLauncher:
    """Starts nodes on a Ray cluster: on the one that runs (``RAY_ADDRESS``, or on this host), else on one of its own.

    Args:
        plan: says what each node needs, and where it is to be.
        placement: ``spread`` nodes over hosts as far as there are some; ``strict-spread``: each on a host of its own;
            ``pack``: on few.
        replicas: nodes of every stage; the plan's when None.
        memory_bytes: of shared memory for a node's outputs at most; 0 for none.
        custom_ops: libraries of custom ops that nodes may load: ``onnxruntime-extensions``, or files by paths that are
            good on every host. Only nodes of stages that need some are told of them.

    Raises:
        MissingDependency: Ray is not installed.
        InputError: there is no such placement.
        LaunchFailed: no cluster answers, or it has no room.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        placement: Placement = "spread",
        replicas: tuple[int, ...] | None = None,
        memory_bytes: int = 1 << 30,
        custom_ops: object = (),
    ) -> None:
        if placement not in PLACEMENTS:
            raise InputError(f"placement {placement!r} is unknown; allowed: {', '.join(PLACEMENTS)}")
        self._ray = _import_ray()
        self._plan = plan
        self._memory_bytes = memory_bytes
        self._custom_ops = {stage.index: named(custom_ops) for stage in plan.stages if stage.custom_ops}
        self._pair = new_key_pair()
        self._allowed: set[str] = set()
        self._lock = threading.Lock()
        self._actors: dict[ReplicaKey, Any] = {}
        self._avoided: dict[ReplicaKey, str] = {}  # the Ray node where the slot's actor was lost
        self._tries: dict[ReplicaKey, int] = {}
        counts = replicas or tuple(stage.replicas for stage in plan.stages)
        processors = sum(stage.threads * count for stage, count in zip(plan.stages, counts, strict=True))
        self._connection = _Connection.shared(self._ray, processors)
        try:
            self._slots = [(stage, replica) for stage, count in enumerate(counts) for replica in range(count)]
            self._group = self._reserve(placement)
        except BaseException:
            self._connection.release()
            raise
        address = "127.0.0.1" if self._connection.is_own else self._ray.util.get_node_ip_address()
        self.folder = private_folder()
        self.rendezvous = Rendezvous(
            control=f"tcp://{address}:*",
            data=f"tcp://{address}:*",
            files=f"tcp://{address}:*",
            home=self.folder,
            security=Security(pair=self._pair, allows=self._allowed.__contains__),
            trusted=lambda: frozenset(self._allowed),
        )

    def start(self, *, connect: str, stage: int, replica: int, number: int) -> RayHandle:
        """Begin to start one node; the handle tells what becomes of it."""
        return RayHandle(self, connect, (stage, replica), number)

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """Profiles stay on their hosts."""
        return []

    def close(self, *, keep_logs: bool) -> None:  # noqa: ARG002  logs are on the hosts, in Ray's session folder
        """End all actors, and leave the cluster; one that was started here ends."""
        with self._lock:
            actors, self._actors = list(self._actors.values()), {}
        ending = [actor.close.remote() for actor in actors]
        if ending:
            self._ray.wait(ending, num_returns=len(ending), timeout=_END_S)
        for actor in actors:
            self._ray.kill(actor)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        self._connection.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Where nodes are

    def _reserve(self, placement: Placement) -> Any:
        """The placement group with a bundle for each node."""
        if not self._slots:
            return None
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        bundles = [self._needs(self._plan.stages[stage], nodes) for stage, _ in self._slots]
        selectors = [self._selector(slot, nodes) for slot in self._slots]
        group = self._ray.util.placement_group(
            bundles,
            strategy=placement.upper().replace("-", "_"),
            bundle_label_selector=selectors if any(selectors) else None,
        )
        if not group.wait(_GROUP_S):
            self._ray.util.remove_placement_group(group)
            raise LaunchFailed(
                f"the Ray cluster has no room for {len(bundles)} nodes as {placement}: they need "
                f"{_words(bundles)}; it has {_words([node['Resources'] for node in nodes])}. Add hosts, or ask for less"
            )
        return group

    def _needs(self, stage: Stage, nodes: list[dict[str, Any]]) -> dict[str, float]:
        """What a node of a stage takes of its host."""
        most = max((node["Resources"].get("CPU", 0) for node in nodes), default=1)
        needs = {"CPU": float(min(stage.threads, max(1, most)))}
        needs["memory"] = float(stage.peak_memory_bytes + _PROCESS_BYTES)
        if stage.provider.startswith("cuda"):
            needs["GPU"] = 1.0
        return needs

    def _selector(self, slot: ReplicaKey, nodes: list[dict[str, Any]]) -> dict[str, str]:
        """The Ray node that the plan's host of a slot is; empty where the plan or the cluster names none."""
        hosts = self._plan.stages[slot[0]].hosts
        host = hosts[slot[1]] if slot[1] < len(hosts) else None
        for node in nodes:
            if host in (node["NodeName"], node["NodeManagerHostname"], node["NodeManagerAddress"]):
                return {"ray.io/node-id": node["NodeID"]}
        return {}

    # Actors; called from the threads of handles

    def actor(self, slot: ReplicaKey) -> Any:
        """The actor of a slot; a new one where there is none. It need not be up yet."""
        with self._lock:
            if slot in self._actors:
                return self._actors[slot]
            tries = self._tries[slot] = self._tries.get(slot, -1) + 1
            actor = self._actors[slot] = self._new_actor(slot, elsewhere=slot not in self._slots or tries % 2 == 1)
            return actor

    def _new_actor(self, slot: ReplicaKey, *, elsewhere: bool) -> Any:
        stage = self._plan.stages[slot[0]]
        needs = self._needs(stage, [node for node in self._ray.nodes() if node["Alive"]])
        options: dict[str, Any] = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0.0),
            "memory": needs["memory"],
            "max_concurrency": 4,
        }
        if elsewhere:
            options["scheduling_strategy"] = "SPREAD"
            if slot in self._avoided:
                options["label_selector"] = {"ray.io/node-id": f"!in({self._avoided[slot]})"}
        else:
            strategies = self._ray.util.scheduling_strategies
            options["scheduling_strategy"] = strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=self._slots.index(slot)
            )
        return self._ray.remote(NodeActor).options(**options).remote(self._memory_bytes, self._custom_ops)

    def begin(self, actor: Any, slot: ReplicaKey) -> str:
        """Have an actor make its keys, and let their owner in; the name of the Ray node it is on.

        Raises:
            Exception: Ray's, when it does not come up.
        """
        public, node_id = self._ray.get(actor.begin.remote(self._pair.public), timeout=_UP_S)
        with self._lock:
            self._allowed.add(public)
            self._tries[slot] = -1
        self._avoided[slot] = node_id  # should it be lost
        names = {node["NodeID"]: str(node["NodeName"]) for node in self._ray.nodes()}
        return names.get(node_id, str(node_id))

    def ended(self, slot: ReplicaKey, actor: Any) -> None:
        """A node came to its end: its actor stays for the next in its bundle; without a bundle it lets its host go."""
        if slot not in self._slots:
            self.forget(slot, actor)

    def forget(self, slot: ReplicaKey, actor: Any) -> None:
        """An actor does not answer, or is gone; the next try makes another, elsewhere."""
        with self._lock:
            if self._actors.get(slot) is actor:
                del self._actors[slot]
                self._tries[slot] = max(0, self._tries.get(slot, 0))
        self._ray.kill(actor)


class RayHandle:
    """A node process on some host: a thread follows it from its actor's start to its end."""

    def __init__(self, launcher: RayLauncher, connect: str, slot: ReplicaKey, number: int) -> None:
        self.pid = 0
        self._launcher, self._ray = launcher, launcher._ray
        self._connect, self._slot, self._number = connect, slot, number
        self._actor: Any = None
        self._story = "did not start"
        self._killed = False
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"ray-{slot[0]}.{slot[1]}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._descriptor

    def story(self) -> str:
        """How it ended."""
        return self._story

    def kill(self) -> None:
        """End it and its actor: where it is may be out of reach."""
        self._killed = True
        if self._actor is not None:
            self._launcher.forget(self._slot, self._actor)

    def end(self, grace_s: float) -> None:
        """Give it time, then kill it."""
        if not self._ended.wait(grace_s):
            self.kill()
        if self._ended.wait(_PROBE_S):  # else the thread still needs it, and Ray will end the process with the actor
            os.close(self._descriptor)

    def _follow(self) -> None:
        try:
            self._actor = self._launcher.actor(self._slot)
            if self._killed:
                self._launcher.forget(self._slot, self._actor)
            host = self._launcher.begin(self._actor, self._slot)
            stage, replica = self._slot
            started = self._actor.start.remote(self._connect, stage, replica, self._number, host)
            self.pid = self._ray.get(started, timeout=_UP_S)
            self._story = self._ray.get(self._actor.wait.remote(self._number))
            self._launcher.ended(self._slot, self._actor)
        except BaseException as error:  # Ray ends threads that wait for it by SystemExit
            if self._actor is not None and not self._killed:
                self._launcher.forget(self._slot, self._actor)
            self._story = (
                f"was lost with its actor: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
            )
        finally:
            os.eventfd_write(self._descriptor, 1)
            self._ended.set()


class _Connection:
    """This process's connection to Ray, held by a thread that lives as long: what Ray starts ends with the thread."""

    _present: _Connection | None = None
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
    def shared(cls, ray: Any, processors: int) -> _Connection:
        """The one connection; made when nobody has it, with room for so many processors if it starts a cluster."""
        with cls._guard:
            if cls._present is None:
                cls._present = cls(ray, processors)
            cls._present._users += 1
            return cls._present

    def release(self) -> None:
        """One user less; the last one disconnects."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            type(self)._present = None
        self._over.set()
        self._thread.join()

    def _hold(self) -> None:
        ray = self._ray
        given = ray.is_initialized()  # by the calling program: it stays
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


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise MissingDependency("the launcher ray needs Ray: pip install 'onnxsplit[ray]'") from error
    return ray


def _cluster_address() -> str | None:
    """Of the cluster that runs, as Ray looks for it; None when there is none.

    Raises:
        LaunchFailed: one is named, and nobody is there. (Ray itself would try for minutes.)
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
    """Keep what Ray says of dead hosts off standard output, which is for results; it is in the log all the same."""
    worker: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _words(resources: list[dict[str, float]]) -> str:
    """As ``CPU 1, memory 0.4 GiB; CPU 1, ...``."""
    shown = []
    for one in resources:
        parts = [f"{kind} {one[kind]:g}" for kind in ("CPU", "GPU") if one.get(kind)]
        shown.append(", ".join([*parts, f"memory {one.get('memory', 0) / (1 << 30):.1f} GiB"]))
    return "; ".join(shown) or "nothing"
