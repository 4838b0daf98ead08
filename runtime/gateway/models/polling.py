"""Watches the folders of the models, and takes over plans that are added, replaced or removed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import PLAN_FILE
from onnxsplit.plan_files import plan_id, read_plan_file
from runtime.gateway.errors import client_message
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import PlanPlace, Version, find_plans, read_version
from runtime.logs import log_event

_FIRST_PAUSE_S, _MOST_PAUSE_S = 1.0, 60.0
_NO_PAUSE = (0.0, 0.0)
_log = logging.getLogger("runtime.gateway")


class Poller:
    """Looks at the folders of a repository again and again.

    A plan is known by the hash of its ``plan.json``. One that cannot be used yet, perhaps because it is still being
    copied, is tried again at the next look, and one that does not start after a pause. Each problem is logged once.

    Args:
        repository: Holds the models.
        folders: The folders that they were found in.
    """

    def __init__(self, repository: Repository, folders: Sequence[Path]) -> None:
        self._repository = repository
        self._folders = tuple(folders)
        self._known = {(version.model, version.number): _identity(version.folder) for version in repository}
        self._told: dict[Path, str] = {}  # the last problem of each folder
        self._pauses: dict[str, tuple[float, float]] = {}  # of models that did not start: until when, and how long
        self._missing: set[Version] = set()  # a plan is missing for a moment while it is replaced

    async def run(self, every_s: float) -> None:
        """Look every ``every_s`` seconds, until this task is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
                self._told.pop(Path(), None)
            except (OnnxsplitError, OSError) as error:
                self._tell(Path(), client_message(error))

    async def look(self) -> None:
        """Take over what has changed since the last look, and return when all of it is loaded.

        Raises:
            OnnxsplitError: Two models would have the same name.
        """
        loop = asyncio.get_running_loop()
        places = await loop.run_in_executor(None, self._present)
        found: dict[PlanPlace, Version] = {}
        for place, identity in places.items():
            if self._known.get(place[:2]) == identity or self._pauses.get(place.model, _NO_PAUSE)[0] > time.monotonic():
                continue
            try:
                found[place] = await loop.run_in_executor(None, read_version, place)
            except OnnxsplitError as error:
                self._tell(place.folder, client_message(error))
        gone = {version for version in self._repository if not (version.folder / PLAN_FILE).exists()}
        removed = gone & self._missing - {place[:2] for place in places}
        self._missing = gone
        models = dict.fromkeys([place.model for place in found] + [version.model for version in removed])
        await asyncio.gather(*(self._update(model, places, found, removed) for model in models))

    async def _update(
        self,
        model: str,
        places: Mapping[PlanPlace, str],
        found: Mapping[PlanPlace, Version],
        removed: set[Version],
    ) -> None:
        """Take over what has changed of one model. If it does not start, it is tried again after a pause."""
        mine = {place: version for place, version in found.items() if place.model == model}
        away = [version for version in removed if version.model == model]
        try:
            await self._repository.update(model, list(mine.values()), away)
        except OnnxsplitError as error:
            _, before = self._pauses.get(model, _NO_PAUSE)
            pause = min(max(2 * before, _FIRST_PAUSE_S), _MOST_PAUSE_S)
            self._pauses[model] = (time.monotonic() + pause, pause)
            for place in mine:
                self._tell(place.folder, client_message(error))
        else:
            self._pauses.pop(model, None)
            for place in mine:
                self._told.pop(place.folder, None)
                self._known[place[:2]] = places[place]
        for version in away:
            self._known.pop((version.model, version.number), None)

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
            where = {} if folder == Path() else {"folder": folder}
            log_event(_log, logging.WARNING, "plan not taken over", **where, reason=problem)


def _identity(folder: Path) -> str:
    try:
        return plan_id(read_plan_file(folder))
    except OnnxsplitError:
        return ""
