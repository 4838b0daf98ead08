"""Where a node finds its stage: in its own copy of the plan, in the coordinator's folder, or at the coordinator."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library, needed_libraries
from onnxsplit.errors import PlanError
from onnxsplit.plan import FileEntry, Plan, Stage
from onnxsplit.plan_files import parse_plan, plan_id, read_plan_file
from runtime.files.client import FileClient
from runtime.files.stage_cache import StageCache
from runtime.logs import log_event
from runtime.wire.addresses import reachable
from runtime.wire.messages.control import Assign
from runtime.wire.security import Security

_SAY_EVERY_S = 5.0
_log = logging.getLogger("runtime.node")


@dataclass(frozen=True)
class StageFiles:
    """How this node gets at stage files.

    Attributes:
        own: its own copy of the plan directory, if it has one.
        shared: use the coordinator's folder where it is seen from here.
        cache: where fetched ones are kept.
        coordinator: the address at which the node reached it.
        security: of links.
        key: the coordinator's public key, where links are encrypted.
        custom_ops: libraries of custom ops that this node may load; no files are fetched for a stage that needs others.
    """

    own: Path | None
    shared: bool
    cache: StageCache
    coordinator: str
    security: Security
    key: str
    custom_ops: tuple[Library, ...] = ()

    def find(self, assign: Assign) -> tuple[Plan, Path]:
        """The plan, and a folder with the files of the stage assigned.

        Raises:
            PlanError: the own copy is of another plan, or the plan is nowhere to be had.
            PipelineError: the files could not be fetched, or kept.
        CustomOpsError: the stage needs a library of custom ops that this node was not started with.
        """
        if self.own is not None:
            text = read_plan_file(self.own)
            if plan_id(text) != assign.plan_id:
                raise PlanError(
                    f"{self.own} holds another plan than the coordinator's; copy the coordinator's plan here"
                )
            return parse_plan(text, where=self.own), self.own
        if self.shared or not assign.files:
            found = self._seen(assign)
            if found is not None:
                return found
        if not assign.files:
            raise PlanError(
                f"{assign.folder} does not hold the coordinator's plan here; copy it, and name it with --plan DIR"
            )
        return self._fetched(assign)

    def discard(self, folder: Path) -> bool:
        """The files there are damaged; whether to :meth:`find` them again, since they were fetched."""
        if not self.cache.holds(folder):
            return False
        log_event(_log, logging.WARNING, "fetching again what is damaged in the cache", folder=str(folder))
        self.cache.discard(folder)
        return True

    def _seen(self, assign: Assign) -> tuple[Plan, Path] | None:
        """The plan in the coordinator's folder, when it is seen from here."""
        folder = Path(assign.folder)
        try:
            text = read_plan_file(folder)
        except PlanError:
            return None
        if plan_id(text) != assign.plan_id:
            return None
        plan = parse_plan(text, where=folder)
        return (plan, folder) if _is_complete(folder, plan.stages[assign.stage]) else None

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
                    if time.monotonic() - said > _SAY_EVERY_S:
                        said = time.monotonic()
                        log_event(_log, logging.INFO, "fetching", file=entry.name, have=have, bytes=entry.size_bytes)

                client.file(entry, target, told)

            return plan, self.cache.obtain(plan.stages[assign.stage], bring)


def _is_complete(folder: Path, stage: Stage) -> bool:
    """Whether all files of a stage are there, by their size; their content is checked when they are loaded."""
    paths = [(folder / entry.name, entry.size_bytes) for entry in stage.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)
