"""Checks the options of a run, and makes the setup of its coordinator from them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from onnxsplit.custom_ops import check_wanted, find_libraries, needed_libraries
from onnxsplit.errors import InputError, shown
from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder
from onnxsplit.plan_files import plan_id, read_plan_file
from onnxsplit.providers import providers_by_stage
from runtime.balance.replicas import first_range
from runtime.coordinator.sequence_limits import SequenceLimits, sequence_limits
from runtime.coordinator.setup import Setup
from runtime.home import private_folder
from runtime.launcher import Launcher, Rendezvous
from runtime.options import RunOptions, memory_for_requests_bytes
from runtime.wire.keys import Keys, default_folder
from runtime.wire.security import Security, check_address

_LEAST_LENGTH = 2  # one token of a prompt and a new one


def plan_folder(plan: object) -> Path:
    """The path of the plan directory that a caller has given.

    Raises:
        InputError: it is neither a string nor a path.
    """
    if isinstance(plan, str | os.PathLike):
        return Path(plan)
    raise InputError(f"the plan must be a folder, as a string or a path, not {shown(plan)}")


def security_of(bind: str, options: RunOptions) -> tuple[Security, Keys | None]:
    """The link security of a pipeline that listens at an address, and its keys if links are encrypted.

    Raises:
        PipelineError: the address may not be used this way.
    """
    folder = options.keys or (None if options.insecure else default_folder())
    keys = Keys(folder) if folder is not None and bind.startswith("tcp://") else None
    security = Security(
        pair=keys.pair if keys else None,
        allows=lambda key: keys is not None and key in keys.allowed,
        insecure=options.insecure,
        revoked=lambda: keys.revoked if keys is not None else frozenset(),
    )
    check_address(bind, security)
    return security, keys


def meeting_point(bind: str, ports: Sequence[int] | None, security: Security, keys: Keys | None) -> Rendezvous:
    """The rendezvous of a pipeline and nodes that are started by hand; makes a folder, which the caller removes.

    Args:
        bind: the address for control messages.
        ports: the ports for results and for stage files; None for any free ones.
        security: the security of the links.
        keys: the keys, if links are encrypted.

    Raises:
        InputError: ports are given for an address that has none.
    """
    host, has_ports = bind.rpartition(":")[0], bind.startswith("tcp://")
    if ports is not None and not has_ports:
        raise InputError(f"ports are for an address of tcp, and {bind} has none; leave them out")
    results, files = ports or ("*", "*")
    return Rendezvous(
        control=bind,
        data=f"{host}:{results}" if has_ports else f"{bind}.results",
        files=f"{host}:{files}" if has_ports else f"{bind}.files",
        home=private_folder(),
        security=security,
        trusted=(lambda: keys.allowed) if keys is not None else None,
    )


def beside(bind: str, ports: Sequence[int] | None) -> str:
    """The address for the coordinator of the next plan, while that of the present plan still listens.

    Args:
        bind: the present address for control messages: of tcp, or of a socket on this host.
        ports: the ports for results and for stage files; None for any free ones.

    Returns:
        The same host with any free port, or another path.

    Raises:
        InputError: the ports are fixed.
    """
    if ports is not None:
        raise InputError(
            f"the plan cannot change while it serves: results and stage files have the fixed ports {ports[0]} and "
            f"{ports[1]}, where a second coordinator cannot listen. Leave ports out, or stop, and serve the new plan"
        )
    if bind.startswith("tcp://"):
        return f"{bind.rpartition(':')[0]}:*"
    return f"{bind}.{secrets.token_hex(2)}"


def setup_of(
    folder: Path,
    plan: Plan,
    options: RunOptions,
    rendezvous: Rendezvous,
    *,
    memory_bytes: int,
    threads: int,
    launcher: Launcher | None,
    start_timeout_s: float | None,
    succeeds: bool = False,
) -> Setup:
    """The setup of a run's coordinator.

    Args:
        folder: the plan directory.
        plan: its plan.
        options: how to run it.
        rendezvous: where the nodes and the coordinator meet.
        memory_bytes: the most memory for the inputs of requests.
        threads: threads of every node's session; 0 for the plan's number.
        launcher: starts the nodes; None waits for nodes that are started by hand.
        start_timeout_s: time for all nodes to become ready; None waits for ever.
        succeeds: whether nodes of another coordinator start the nodes.
    """
    planned = [stage.provider for stage in plan.stages]
    provider, ranges = options.provider, options.ranges(plan)
    return Setup(
        folder=folder,
        plan=plan,
        plan_id=plan_id(read_plan_file(folder)),
        ranges=ranges,
        scale_up_after_s=options.scale_up_after,
        scale_down_after_s=options.scale_down_after,
        providers=tuple(planned) if provider is None else providers_by_stage(provider, len(planned), default=planned),
        threads=threads,
        trace=options.trace,
        profile=options.trace_ops,
        share_weights=tuple(
            each.most > 1 if options.share_weights is None else options.share_weights for each in ranges
        ),
        balance=options.balance,
        attempts=options.attempts,
        timings=options.timings,
        memory_bytes=memory_bytes if options.shared_memory else 0,
        elastic=options.elastic,
        rendezvous=rendezvous,
        launcher=launcher,
        start_timeout_s=start_timeout_s,
        progress=options.progress,
        sequences=limits_of(plan, options),
        succeeds=succeeds,
    )


def limits_of(plan: Plan, options: RunOptions) -> SequenceLimits | None:
    """The limits of sequences in a pipeline; None where the plan has no decoder.

    Raises:
        InputError: the model has fewer positions than the options ask for, or there is no room for such a sequence.
    """
    decoder, replicas = plan.decoder, options.most_counts(plan)
    if decoder is None:
        return None
    cache_bytes = options.cache_bytes or memory_for_requests_bytes() // max(1, sum(replicas))
    assert isinstance(cache_bytes, int), "the options were checked"
    if options.max_length is not None and options.max_length > decoder.max_length:
        raise InputError(
            f"max_length is {options.max_length}, but sequences of this model have at most {decoder.max_length} tokens"
        )
    wanted = options.max_length or decoder.max_length
    length = min([wanted, *(_length_that_fits(decoder, stage.index, cache_bytes) for stage in plan.stages)])
    if length < (options.max_length or _LEAST_LENGTH):
        needed = [decoder.fixed_bytes(stage.index) + wanted * decoder.token_bytes(stage.index) for stage in plan.stages]
        raise InputError(
            f"cache_bytes is {cache_bytes}, but a sequence of {wanted} tokens takes up to {max(needed)} bytes on a "
            "node; raise cache_bytes, or lower max_length"
        )
    return sequence_limits(
        plan,
        replicas=replicas,
        cache_bytes=cache_bytes,
        max_rows=options.max_rows,
        max_length=length,
        prefill_chunk=options.prefill_chunk,
        decode_groups=options.decode_groups,
        exact_replay=options.exact_replay,
        prefix_reuse=options.prefix_reuse,
    )


def _length_that_fits(decoder: Decoder, stage: int, cache_bytes: int) -> int:
    """The most tokens of one sequence whose states at a stage have room."""
    left = cache_bytes - decoder.fixed_bytes(stage)
    if left < 0:
        return 0
    each = decoder.token_bytes(stage)
    return left // each if each else decoder.max_length


def custom_ops_of(plan: Plan, options: RunOptions) -> dict[int, tuple[str, ...]]:
    """The libraries of custom ops that nodes on this host load, by stage.

    Raises:
        CustomOpsError: the plan needs another library, or names none of those given.
    """
    given = find_libraries(options.custom_ops)
    needed_libraries(given, plan)
    check_wanted(given, (plan,))
    stages = [stage.index for stage in plan.stages if stage.custom_ops]
    return {stage: tuple(library.path for library in needed_libraries(given, plan, stage)) for stage in stages}


def refuse_ranges(options: RunOptions, how: str) -> None:
    """Refuse ranges of replicas for nodes that do not share this host.

    Args:
        options: how to run a plan.
        how: what scales such nodes instead.

    Raises:
        InputError: a stage has a range.
    """
    if (wanted := first_range(options.replicas)) is not None:
        raise InputError(
            f"replicas {wanted} are a range, within which only nodes that this process starts on this host come and "
            f"go by load; give a number. {how}"
        )


def refuse_custom_ops(options: RunOptions, receiver: str, how: str) -> None:
    """Refuse libraries of custom ops for a pipeline that does not start its nodes itself.

    Args:
        options: how to run a plan.
        receiver: the launcher or the nodes, which must be given the libraries instead.
        how: an example of how to do so.

    Raises:
        InputError: libraries are given.
    """
    if options.custom_ops:
        raise InputError(f"give custom_ops to {receiver}, not to the pipeline: {how}")
