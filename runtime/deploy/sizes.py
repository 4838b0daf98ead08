"""Memory and disk of the containers that run a plan. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxsplit.plan import Plan, Stage

_MIB = 1 << 20
_PROCESS_BYTES = 512 << 20  # of a process apart from its stage
_RAM_VOLUME_BYTES = 2 << 20  # of the volumes in memory: keys, and the health file
_VOLUME_MARGIN_BYTES = 128 << 20  # the plan itself, locks, and the rounding of the file system
_TMP_BYTES = 256 << 20  # sockets and other small files
_LOG_BYTES = 128 << 20  # what the kubelet keeps of a container's output
_SEQUENCES = 4  # of the greatest length, whose states fit a node
_LOAD_BYTES_PER_S = 50 << 20  # a slow disk
_RESTART_S = 60  # a new container, Python, and the search for the coordinator


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a container, in bytes.

    Attributes:
        memory: Memory: the stages, the states of sequences, and the processes.
        cache: What is cached: the files of a node's stage, or copies of the weights that the nodes of a pod share.
        cache_volume: Limit of the volume that holds the cache. It is larger: a pod that exceeds it is evicted.
        disk: Ephemeral storage: all volumes on disk, and logs.
    """

    memory: int
    cache: int
    cache_volume: int
    disk: int


def node_sizes(plan: Plan, stage: Stage) -> Sizes:
    """The sizes of the container of a stage's node."""
    memory = stage.peak_memory_bytes + states_bytes(plan) + _PROCESS_BYTES + _RAM_VOLUME_BYTES
    return _sizes(memory, _files_bytes([stage]))


def plan_sizes(plan: Plan) -> Sizes:
    """The sizes of a container that runs the gateway and all nodes of a plan."""
    states = states_bytes(plan)
    nodes = sum(stage.replicas * (stage.peak_memory_bytes + states + _PROCESS_BYTES) for stage in plan.stages)
    memory = nodes + 2 * _PROCESS_BYTES  # the second is for requests that wait
    shared = [stage for stage in plan.stages if stage.replicas > 1]
    return _sizes(memory * 4 // 3, 2 * _files_bytes(shared))  # requests in flight may have a quarter of the memory


def _sizes(memory: int, cache: int) -> Sizes:
    volume = rounded(cache) + _VOLUME_MARGIN_BYTES
    disk = volume + _TMP_BYTES + _LOG_BYTES
    return Sizes(memory=memory, cache=rounded(cache), cache_volume=volume, disk=disk)


def states_bytes(plan: Plan) -> int:
    """Bytes of the states of a few sequences of the greatest length, on the node with the largest; 0 without a decoder.

    It is the value for ``--cache-bytes``.
    """
    decoder = plan.decoder
    if decoder is None:
        return 0
    longest = (decoder.fixed_bytes(s.index) + decoder.max_length * decoder.token_bytes(s.index) for s in plan.stages)
    return rounded(_SEQUENCES * max(longest))


def restart_s(plan: Plan) -> int:
    """Seconds in which a node is back that was killed once: a new container, and loading the largest stage."""
    largest = max((_files_bytes([stage]) for stage in plan.stages), default=0)
    return _RESTART_S + -(-largest // _LOAD_BYTES_PER_S)


def _files_bytes(stages: Iterable[Stage]) -> int:
    return sum(entry.size_bytes for stage in stages for entry in stage.files)


def rounded(size_bytes: int) -> int:
    """A size, rounded up to whole MiB."""
    return -(-size_bytes // _MIB) * _MIB


def quantity(size_bytes: int) -> str:
    """A size in Kubernetes' unit, rounded up."""
    return f"{rounded(size_bytes) // _MIB}Mi"
