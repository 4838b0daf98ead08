"""The services of a server, with their models among those of the repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from onnxsplit.errors import InputError
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import PlanPlace, find_plans
from runtime.gateway.service import Service
from runtime.gateway.services.asks import ModelAsks
from runtime.gateway.services.pool import ServicePool
from runtime.gateway.services.process import ServiceTarget, describe, target_of
from runtime.services.messages import ServiceDescription


class ServedService(NamedTuple):
    """A service that is to be served: where it is found, and what it is."""

    target: ServiceTarget
    description: ServiceDescription


def read_services(
    words: Sequence[Path], progress: Callable[[str], None] = lambda _: None
) -> tuple[list[ServedService], tuple[Path, ...]]:
    """The services and the plans that the words of the command line name.

    Args:
        words: folders of plans, and services as ``app.py:Service``.
        progress: called with what is being read.

    Returns:
        The services, and the folders of the plans with those that the services name.

    Raises:
        OnnxsplitError: a service cannot be served.
    """
    services: list[ServedService] = []
    for word in words:
        if (target := target_of(str(word))) is not None:
            progress(f"reading {word}")
            services.append(ServedService(target, describe(target)))
    _check_paths(services)
    return services, tuple(_with_models([word for word in words if target_of(str(word)) is None], services))


def _check_paths(services: Sequence[ServedService]) -> None:
    """Check that no two services have the same name, or a path in common."""
    names: dict[str, ServedService] = {}
    paths: dict[str, ServedService] = {}
    for service in services:
        other = names.setdefault(service.description.name, service)
        if other is not service:
            raise InputError(f"{other.target} and {service.target} have the same name; rename a class")
        for path in service.description.paths:
            other = paths.setdefault(path, service)
            if other is not service:
                raise InputError(
                    f"{other.target} and {service.target} both have the path {path}; give one another: "
                    "@service(path=...)"
                )


def _with_models(folders: Sequence[Path], services: Sequence[ServedService]) -> list[Path]:
    """The folders of models, with those that services name and that are not among them."""
    found = list(folders)
    for service in services:
        for name, path in service.description.models.items():
            if not Path(path).exists():
                raise InputError(f"{service.target}: its model {name!r} is not there: {path}")
            if _model_of(path, find_plans(found)) is None:
                found.append(Path(path))
    return found


def _model_of(path: str, places: Sequence[PlanPlace]) -> str | None:
    """The model whose folder a path is; None if there is none among those places."""
    resolved = Path(path).resolve()
    return next((p.model for p in places if resolved in (p.folder.resolve(), p.folder.resolve().parent)), None)


def make_pools(
    services: Sequence[ServedService], folders: Sequence[Path], service: Service, most_waiting: int
) -> tuple[ServicePool, ...]:
    """The workers of all services, not started.

    Args:
        services: the services.
        folders: the folders of all models.
        service: executes the requests for the models.
        most_waiting: the most calls that wait for the workers of a service.
    """
    places = find_plans(folders)
    pools = []
    for target, description in services:
        models = {name: _model_of(path, places) or name for name, path in description.models.items()}
        asks = ModelAsks(service, models)
        folders_now = partial(_plan_folders, service.repository, models)
        pools.append(ServicePool(target, description, folders_now, asks.answer, most_waiting))
    return tuple(pools)


def _plan_folders(repository: Repository, models: Mapping[str, str]) -> dict[str, str]:
    """Where the plans of a service's models are now, by the names that the service uses."""
    return {name: str(repository.find(model).folder) for name, model in models.items()}
