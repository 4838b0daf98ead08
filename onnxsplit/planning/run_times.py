"""Times of runs of the whole model: by threads, with several requests in a run, and on all cores at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxsplit.effort import EFFORTS
from onnxsplit.memory import free_memory_bytes
from onnxsplit.npz import save_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.sampling import take_samples
from onnxsplit.planning.subject import Subject
from onnxsplit.providers import provider_here, threads_on_cores
from onnxsplit.session import host_cores
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel

_FREE_SHARE = 0.8  # the share of the free memory that sessions may take while they are timed


@dataclass(frozen=True)
class RunTimes:
    """Times of runs of the whole model on this host.

    Attributes:
        alone_ns: time of a run by the number of threads and of requests in it, with one session on the host.
        crowded: how many times longer a run takes with a session on every core.
    """

    alone_ns: Mapping[tuple[int, int], int]
    crowded: float

    def factor(self, threads: int, base: int, rows: int, nodes: int, cores: int) -> float:
        """How many times longer a run takes than one with ``base`` threads, of one request, alone on the host."""
        base_ns = self.alone_ns.get((base, 1)) or self.alone_ns.get((1, 1), 1)
        ratio = self.alone_ns.get((threads, 1), base_ns) / base_ns
        batch = self.alone_ns.get((1, rows), 1) / self.alone_ns.get((1, 1), 1) if rows > 1 else 1.0
        busy = min(1.0, nodes * threads / cores)
        return ratio * batch * (1 + (self.crowded - 1) * busy if nodes > 1 else 1.0)


def time_runs(subject: Subject, folder: Path, threads: Sequence[int], rows: Sequence[int], *, copies: int) -> RunTimes:
    """Time sessions of the whole model.

    Args:
        subject: the model.
        folder: its plan of one stage.
        threads: the numbers of threads to time a run with.
        rows: the numbers of requests to join into one run, with one thread.
        copies: the largest number of sessions to run at once.
    """
    plan = load_plan(folder)
    stage = plan.stages[0]
    provider = provider_here(stage.provider)
    fits = max(1, int(_FREE_SHARE * free_memory_bytes() // max(1, stage.peak_memory_bytes)))
    with ExitStack() as stack:

        def session(count: int, batch: int = 1) -> TimedModel:
            feed = folder.parent / f"in{batch}.npz"
            save_npz(feed, joined(subject, plan, batch))
            timed = TimedModel(
                folder / stage.file,
                feed,
                threads=count,
                level=stage.optimization_level,
                provider=provider,
                custom_ops=subject.custom_ops,
            )
            return stack.enter_context(timed)

        kinds = list(dict.fromkeys([(1, 1), *((count, 1) for count in threads), *((1, size) for size in rows)]))[:fits]
        groups = [[session(*kind)] for kind in kinds]
        copies = min(host_cores(), copies, fits - len(kinds) + 1)
        if copies > 1 and threads_on_cores(provider, 1):
            groups.append([groups[0][0], *(session(1) for _ in range(copies - 1))])
        taken = take_samples(groups, EFFORTS["quick"], again=False)
    alone = {kind: taken.typical_ns(number)[0] for number, kind in enumerate(kinds)}
    crowded = max(taken.typical_ns(len(kinds))) / alone[1, 1] if len(groups) > len(kinds) else 1.0
    return RunTimes(alone, max(1.0, crowded))


def joined(subject: Subject, plan: Plan, rows: int) -> dict[str, Array]:
    """The example inputs of several requests as one."""
    axes = {name: plan.tensors[name].batch_axis for name in plan.inputs}
    return {
        name: array if (axis := axes.get(name)) is None or rows == 1 else np.concatenate([array] * rows, axis)
        for name, array in subject.inputs.items()
    }
