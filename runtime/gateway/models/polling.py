"""Watches the folders of the models, and takes over plans that are added, replaced or removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import PLAN_FILE
from onnxsplit.plan_files import plan_id, read_plan_file
from runtime.gateway.errors import client_message
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import PlanPlace, Version, find_plans, read_version
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")


class Poller:
    """Looks at the folders of a repository again and again.

    A plan is known by the hash of its ``plan.json``. One that cannot be used yet, perhaps because it is still being
    copied, is tried again at the next look, and is logged once.

    Args:
        repository: Holds the models.
        folders: The folders that they were found in.
    """

    def __init__(self, repository: Repository, folders: Sequence[Path]) -> None:
        self._repository = repository
        self._folders = tuple(folders)
        self._known = {(version.model, version.number): _identity(version.folder) for version in repository}
        self._told: dict[Path, str] = {}  # the last problem of each folder
        self._missing: set[Version] = set()  # a plan is missing for a moment while it is replaced

    async def run(self, every_s: float) -> None:
        """Look every ``every_s`` seconds, until this task is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except (OnnxsplitError, OSError) as error:
                log_event(_log, logging.ERROR, "models not updated", reason=client_message(error))

    async def look(self) -> None:
        """Take over what has changed since the last look.

        Raises:
            OnnxsplitError: A version did not start, or two models would have the same name.
        """
        loop = asyncio.get_running_loop()
        places = await loop.run_in_executor(None, self._present)
        changed = [place for place, identity in places.items() if self._known.get(place[:2]) != identity]
        found: list[Version] = []
        for place in changed:
            try:
                found.append(await loop.run_in_executor(None, read_version, place))
            except OnnxsplitError as error:
                self._tell(place.folder, client_message(error))
            else:
                self._told.pop(place.folder, None)
                self._known[place[:2]] = places[place]
        present = {place[:2] for place in places}
        missing = [version for version in self._repository if (version.model, version.number) not in present]
        removed = [version for version in missing if version in self._missing]
        self._missing = set(missing)
        for version in removed:
            del self._known[version.model, version.number]
        if found or removed:
            await self._repository.update(found, removed)

    def _present(self) -> Mapping[PlanPlace, str]:
        """The plans that are there, with their identities. An empty identity belongs to a plan that cannot be read."""
        places = find_plans(self._folders)
        return {
            place: _identity(place.folder)
            for place in places
            if (place.folder / PLAN_FILE).exists() or (place[:2] in self._known and place.folder.is_dir())
        }

    def _tell(self, folder: Path, problem: str) -> None:
        if self._told.get(folder) != problem:
            self._told[folder] = problem
            log_event(_log, logging.WARNING, "plan not taken over", folder=folder, reason=problem)


def _identity(folder: Path) -> str:
    try:
        return plan_id(read_plan_file(folder))
    except OnnxsplitError:
        return ""
