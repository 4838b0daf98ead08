"""Starts nodes on the hosts of a Ray cluster. Ray places and supervises processes; tensors use our own links.

    placement group   one bundle for each node, with the processors, GPU and memory that the plan states
    actor             one for each node, in its bundle; it starts the node's process, which ends with the actor
    process           a node like any other; its keys are made on its host, and only the public keys are sent

When a process ends, its actor starts it again. When an actor is lost with its host, or its host does not answer, the
next attempt is made on another host, outside the bundle. Ray moves the bundles of hosts that it knows to be dead, so
attempts inside and outside the bundle alternate.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from typing import Any, Literal, get_args

from onnxsplit.custom_ops import named
from onnxsplit.errors import InputError
from onnxsplit.plan import Plan, Stage
from runtime.errors import LaunchFailed
from runtime.home import private_folder
from runtime.launch.ray_cluster import RayConnection, import_ray
from runtime.launch.ray_node import NodeActor
from runtime.launcher import PROCESS_BYTES, Rendezvous
from runtime.topology import ReplicaKey
from runtime.wire.security import Security, new_key_pair

Placement = Literal["spread", "strict-spread", "pack"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_UP_S = 60.0  # longest wait for an actor to start, before another host is tried
_GROUP_S = 30.0  # longest wait for a placement group
_KILL_S = 3.0  # longest wait for a killed process to end
_END_S = 15.0  # longest wait for nodes to end, before their actors are killed
_log = logging.getLogger("runtime.launch")


class RayLauncher:
    """Starts nodes on a Ray cluster: the one that ``RAY_ADDRESS`` names or that runs on this host, else a new one.

    Args:
        plan: states what each node needs, and on which host it is to run.
        placement: ``spread`` puts nodes on different hosts if there are enough, ``strict-spread`` always, and ``pack``
            on as few hosts as possible.
        replicas: number of nodes of every stage; the plan's when None.
        memory_bytes: the largest size of a node's outputs in shared memory at once; 0 for no shared memory.
        custom_ops: libraries of custom ops that nodes may load: ``onnxruntime-extensions``, or paths that are valid on
            every host. They are passed only to nodes of stages that need some.
        background_s: how long the first node of each slot loads at idle priority at most; 0 for not at all.

    Attributes:
        folder: a private folder on this host.
        rendezvous: where the nodes and the coordinator meet.

    Raises:
        MissingDependency: Ray is not installed.
        InputError: there is no such placement.
        LaunchFailed: no cluster answers, or it has too few resources.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        placement: Placement = "spread",
        replicas: tuple[int, ...] | None = None,
        memory_bytes: int = 1 << 30,
        custom_ops: object = (),
        background_s: float = 0.0,
    ) -> None:
        if placement not in PLACEMENTS:
            raise InputError(f"placement {placement!r} is unknown; allowed: {', '.join(PLACEMENTS)}")
        self._ray = import_ray()
        self._plan = plan
        self._memory_bytes = memory_bytes
        self._placement = placement
        self._given_ops = named(custom_ops)
        self._background_s = background_s
        self._custom_ops = {stage.index: self._given_ops for stage in plan.stages if stage.custom_ops}
        self._pair = new_key_pair()
        self._allowed: set[str] = set()
        self._lock = threading.Lock()
        self._actors: dict[ReplicaKey, Any] = {}
        self._avoided: dict[ReplicaKey, str] = {}  # the Ray node on which the slot's actor was last
        self._tries: dict[ReplicaKey, int] = {}
        counts = replicas or tuple(stage.replicas for stage in plan.stages)
        processors = sum(stage.threads * count for stage, count in zip(plan.stages, counts, strict=True))
        self._connection = RayConnection.shared(self._ray, processors)
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
        """Start one node in the background; the handle tells whether it has ended."""
        return RayHandle(self, connect, (stage, replica), number)

    def beside(self, plan: Plan, *, replicas: tuple[int, ...] | None = None, background_s: float = 0.0) -> RayLauncher:
        """A launcher with a second placement group, which holds the other plan's resources beside those of this one."""
        return RayLauncher(
            plan,
            placement=self._placement,
            replicas=replicas,
            memory_bytes=self._memory_bytes,
            custom_ops=self._given_ops,
            background_s=background_s,
        )

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """Always empty: profiles stay on the hosts of the nodes."""
        return []

    def close(self, *, keep_logs: bool) -> None:  # noqa: ARG002  logs are on the hosts, in Ray's session folder
        """End all actors and disconnect from the cluster; a cluster that was started here ends too."""
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

    # Placement of nodes

    def _reserve(self, placement: Placement) -> Any:
        """Reserve a placement group with a bundle for each node."""
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
                f"the Ray cluster has no room for {len(bundles)} nodes as {placement}: they need {_listed(bundles)}; "
                f"it has {_listed([node['Resources'] for node in nodes])}, of which "
                f"{_listed([self._ray.available_resources()])} are free. Add hosts, or ask for less"
            )
        return group

    def _needs(self, stage: Stage, nodes: list[dict[str, Any]]) -> dict[str, float]:
        """The Ray resources that a node of a stage needs."""
        most = max((node["Resources"].get("CPU", 0) for node in nodes), default=1)
        needs = {"CPU": float(min(stage.threads, max(1, most)))}
        needs["memory"] = float(stage.peak_memory_bytes + PROCESS_BYTES)
        if stage.provider.startswith("cuda"):
            needs["GPU"] = 1.0
        return needs

    def _selector(self, slot: ReplicaKey, nodes: list[dict[str, Any]]) -> dict[str, str]:
        """A label selector for the host that the plan names for a slot; empty when there is no such Ray node."""
        hosts = self._plan.stages[slot[0]].hosts
        host = hosts[slot[1]] if slot[1] < len(hosts) else None
        for node in nodes:
            if host in (node["NodeName"], node["NodeManagerHostname"], node["NodeManagerAddress"]):
                return {"ray.io/node-id": node["NodeID"]}
        return {}

    # Actors. These methods are called from the threads of handles.

    def actor(self, slot: ReplicaKey) -> Any:
        """The actor of a slot, which is made if there is none; it may not have started yet."""
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
        background_s = self._background_s if slot not in self._avoided else 0.0  # a lost node is missed
        actor = self._ray.remote(NodeActor).options(**options)
        return actor.remote(self._memory_bytes, self._custom_ops, background_s)

    def begin(self, actor: Any, slot: ReplicaKey) -> str:
        """Wait for an actor to start and to make its keys, and allow them.

        Returns:
            The name of the Ray node that the actor is on.

        Raises:
            Exception: any error of Ray's, when the actor does not start.
        """
        public, node_id = self._ray.get(actor.begin.remote(self._pair.public), timeout=_UP_S)
        with self._lock:
            self._allowed.add(public)
            self._tries[slot] = -1
        self._avoided[slot] = node_id  # if the actor is lost, it is started on another one
        names = {node["NodeID"]: str(node["NodeName"]) for node in self._ray.nodes()}
        return names.get(node_id, str(node_id))

    def ended(self, slot: ReplicaKey, actor: Any) -> None:
        """A node has ended. Its actor stays if it is in the slot's bundle; else it ends, to free its host."""
        if slot not in self._slots:
            self.forget(slot, actor)

    def forget(self, slot: ReplicaKey, actor: Any) -> None:
        """Kill an actor that does not answer; the next attempt makes another one on another host."""
        with self._lock:
            if self._actors.get(slot) is actor:
                del self._actors[slot]
                self._tries[slot] = max(0, self._tries.get(slot, 0))
        self._ray.kill(actor)


class RayHandle:
    """A node process on some host. A thread follows it from the start of its actor to its end."""

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
        """A descriptor that is readable when the process has ended."""
        return self._descriptor

    def story(self) -> str:
        """How the process ended."""
        return self._story

    def kill(self) -> None:
        """Kill the process together with its actor, because its host may not answer."""
        self._killed = True
        if self._actor is not None:
            self._launcher.forget(self._slot, self._actor)

    def end(self, grace_s: float) -> None:
        """Wait for the process to end, and kill it after ``grace_s`` seconds."""
        if not self._ended.wait(grace_s):
            self.kill()
        if self._ended.wait(_KILL_S):  # else the thread still uses it, and Ray ends the process with the actor
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


def _listed(resources: list[dict[str, float]]) -> str:
    """Resources as text: ``CPU 1, memory 0.4 GiB; CPU 1, ...``."""
    entries = []
    for one in resources:
        parts = [f"{kind} {one[kind]:g}" for kind in ("CPU", "GPU") if one.get(kind)]
        entries.append(", ".join([*parts, f"memory {one.get('memory', 0) / (1 << 30):.1f} GiB"]))
    return "; ".join(entries) or "nothing"
