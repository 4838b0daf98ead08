"""Finds the files of a node's stage: in its own copy of the plan, in the coordinator's folder, or by fetching them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library, needed_libraries
from onnxsplit.errors import PlanError
from onnxsplit.plan import Plan
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_files import parse_plan, plan_id, read_plan_file
from runtime.files.client import FileClient
from runtime.files.stage_cache import StageCache
from runtime.logs import log_event
from runtime.topology import StepGraph
from runtime.wire.addresses import reachable
from runtime.wire.messages.control import Assign
from runtime.wire.security import Security

_LOG_EVERY_S = 5.0
_log = logging.getLogger("runtime.node")


@dataclass(frozen=True)
class StageFiles:
    """The places where a node looks for stage files.

    Attributes:
        own: its own copy of the plan directory; None for none.
        shared: whether to use the coordinator's folder if it is visible on this host.
        cache: the cache of fetched stages.
        coordinator: the address by which the node reaches the coordinator.
        security: how links are protected.
        key: the coordinator's public key, where links are encrypted.
        custom_ops: libraries of custom ops that this node may load. The files of a stage that needs others are not
            fetched.
        strict: whether the own copy must be of the coordinator's plan. Otherwise another copy is passed over.
    """

    own: Path | None
    shared: bool
    cache: StageCache
    coordinator: str
    security: Security
    key: str
    custom_ops: tuple[Library, ...] = ()
    strict: bool = True

    def find(self, assign: Assign) -> tuple[Plan, Path]:
        """The plan, and a folder with the files of the assigned stage.

        Raises:
            PlanError: the node's own copy is of another plan, or the plan was not found and cannot be fetched.
            PipelineError: the files cannot be fetched or kept.
            CustomOpsError: the stage needs a library of custom ops that this node may not load.
        """
        if self.own is not None:
            text = read_plan_file(self.own)
            if plan_id(text) == assign.plan_id:
                return parse_plan(text, where=self.own), self.own
            if self.strict:
                raise PlanError(
                    f"{self.own} holds another plan than the coordinator's; copy the coordinator's plan here"
                )
        if self.shared or not assign.files:
            visible = self._visible(assign)
            if visible is not None:
                return visible
        if not assign.files:
            raise PlanError(
                f"{assign.folder} does not hold the coordinator's plan on this host; copy it here, and pass --plan DIR"
            )
        return self._fetched(assign)

    def discard(self, folder: Path) -> bool:
        """Remove damaged files if they were fetched; returns whether :meth:`find` will fetch them again."""
        if not self.cache.holds(folder):
            return False
        log_event(_log, logging.WARNING, "damaged files in the cache are fetched again", folder=str(folder))
        self.cache.discard(folder)
        return True

    def _visible(self, assign: Assign) -> tuple[Plan, Path] | None:
        """The plan in the coordinator's folder; None when it is not visible here, or not complete."""
        folder = Path(assign.folder)
        try:
            text = read_plan_file(folder)
        except PlanError:
            return None
        if plan_id(text) != assign.plan_id:
            return None
        plan = parse_plan(text, where=folder)
        return (plan, folder) if _is_complete(folder, needed_files(plan, assign.stage)) else None

    def _fetched(self, assign: Assign) -> tuple[Plan, Path]:
        address = reachable(assign.files, self.coordinator)
        with FileClient(address, security=self.security, key=self.key) as client:
            plan = parse_plan(client.plan(assign.plan_id), where=Path(address))
            needed_libraries(self.custom_ops, plan, assign.stage)
            said = time.monotonic()

            def bring(entry: FileEntry, target: Path) -> None:
                log_event(_log, logging.INFO, "fetching", file=entry.name, bytes=entry.size_bytes)

                def told(have: int) -> None:
                    nonlocal said
                    if time.monotonic() - said > _LOG_EVERY_S:
                        said = time.monotonic()
                        log_event(_log, logging.INFO, "fetching", file=entry.name, have=have, bytes=entry.size_bytes)

                client.file(entry, target, told)

            return plan, self.cache.obtain(needed_files(plan, assign.stage), bring)


def needed_files(plan: Plan, stage: int) -> tuple[FileEntry, ...]:
    """The files that a node of a stage needs."""
    tokenizer = tokenizer_file(plan, stage)
    return (*plan.stages[stage].files, *([tokenizer] if tokenizer is not None else []))


def tokenizer_file(plan: Plan, stage: int) -> FileEntry | None:
    """The tokenizer of a decoder, which its last stage needs for grammars; None for other stages."""
    if plan.decoder is None or StepGraph(plan).tail != stage:
        return None
    return plan.decoder.tokenizer


def _is_complete(folder: Path, files: Sequence[FileEntry]) -> bool:
    """Whether all files exist and have the right size; their content is checked when they are loaded."""
    paths = [(folder / entry.name, entry.size_bytes) for entry in files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)
