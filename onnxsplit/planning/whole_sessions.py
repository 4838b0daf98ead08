"""The whole model in sessions of its own, timed beside the stages: what a plan is compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.cluster import Device
from onnxsplit.effort import SLOW_S, TimeBudget
from onnxsplit.errors import OnnxsplitError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.model.in_memory import runnable
from onnxsplit.npz import save_npz
from onnxsplit.planning.sampling import spread, take_samples
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say
from onnxsplit.providers import provider_here
from onnxsplit.session import host_cores
from onnxsplit.stages.parts import peak_memory_bytes, whole_parts
from onnxsplit.timed import TimedModel

_FREE_SHARE = 0.8  # the share of the free memory that sessions for a comparison may take


@dataclass(frozen=True)
class SessionTimes:
    """Times of sessions of the whole model on this host.

    Attributes:
        one_ns: time of a run in a session with the threads of a stage, alone.
        wide_threads: the threads of a session that has all cores.
        wide_ns: time of a run in that session.
        copies: how many sessions with the threads of a stage were run at once.
        copies_ns: time of a run in each of them, at once.
        drift: how far the model's time was from its time before the stages were run, as a share.
        interval: the half-width of the interval of these times, as a share of each.
        disturbed: the share of the host's cores that other processes used meanwhile.
    """

    one_ns: int
    wide_threads: int
    wide_ns: int
    copies: int
    copies_ns: int
    drift: float
    interval: float
    disturbed: float


class WholeSessions:
    """Runs the whole model in sessions of its own; a context manager.

    Args:
        subject: the model.
        device: the device that the sessions are for.
        say: called with each step.
    """

    def __init__(self, subject: Subject, device: Device, say: Say) -> None:
        self._subject, self._device, self._say = subject, device, say
        self._stack = ExitStack()
        self._alone: TimedModel | None = None
        self._bytes = peak_memory_bytes(subject.graph, subject.shapes, whole_parts(subject.graph), packed=True)

    def __enter__(self) -> WholeSessions:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-"))
        self._feed = Path(folder) / "in.npz"
        save_npz(self._feed, self._subject.inputs)
        self._file = self._stack.enter_context(runnable(self._subject.graph.source, as_in_stages=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def beside_stages(self) -> Sequence[TimedModel]:
        """The model in a session that takes turns with the stages; none if a run is long or memory is short."""
        if self._subject.costs.whole_ns > SLOW_S * 1e9 or not self._fits(2):
            return ()
        try:
            return (self._one(),)
        except OnnxsplitError:  # such as less memory than there seemed to be
            return ()

    def times(self, copies: int, budget: TimeBudget) -> SessionTimes | None:
        """Time the ways to run the whole model; None if it does not fit in memory a second time.

        Args:
            copies: the largest number of sessions to run at once.
            budget: how long to measure.
        """
        threads, cores = self._device.threads, host_cores()
        on_cpu = provider_here(self._device.provider) == "cpu"
        if not self._fits(1):
            return None
        self._say("timing the whole model")
        copies = max(1, min(copies, cores // threads)) if on_cpu else 1
        while copies > 1 and not self._fits(copies + 1):
            copies -= 1
        try:
            with ExitStack() as stack:
                one = self._one()
                many = [one, *(stack.enter_context(self._session(threads)) for _ in range(copies - 1))]
                wide = [stack.enter_context(self._session(cores))] if on_cpu and cores > threads else []
                groups = [[one], *([many] if copies > 1 else []), *([wide] if wide else [])]
                taken = take_samples(groups, budget, again=False)
        except OnnxsplitError:  # such as too little memory for so many sessions
            return None
        one_ns = taken.typical_ns(0)[0]
        before_ns = self._subject.costs.whole_ns
        return SessionTimes(
            one_ns=one_ns,
            wide_threads=cores if wide else threads,
            wide_ns=taken.typical_ns(len(groups) - 1)[0] if wide else one_ns,
            copies=copies,
            copies_ns=max(taken.typical_ns(1)) if copies > 1 else one_ns,
            drift=abs(one_ns - before_ns) / max(1, one_ns),
            interval=max(spread(samples) for samples in taken.costs_ns[0]),
            disturbed=taken.disturbed,
        )

    def _one(self) -> TimedModel:
        if self._alone is None:
            self._alone = self._stack.enter_context(self._session(self._device.threads))
        return self._alone

    def _session(self, threads: int) -> TimedModel:
        subject = self._subject
        decoding = subject.decoding
        return TimedModel(
            self._file.path,
            self._feed,
            threads=threads,
            level=subject.costs.level,
            provider=provider_here(self._device.provider),
            data_folder=self._file.data_folder,
            custom_ops=subject.custom_ops,
            in_place=decoding.decoder.in_place if decoding is not None and decoding.step.rows else (),
        )

    def _fits(self, sessions: int) -> bool:
        """Whether this many sessions of the whole model fit in the free memory."""
        return sessions * self._bytes < _FREE_SHARE * free_memory_bytes()
