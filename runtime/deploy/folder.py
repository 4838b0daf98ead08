"""Writes manifests into a folder, and takes over the keys and the token of manifests that are there."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError, PlanError
from onnxsplit.files import MOST_TEXT_BYTES, new_folder, read_regular, replacing
from onnxsplit.plan import Plan
from runtime.deploy.documents import first_document, to_yaml
from runtime.deploy.kubernetes import DeployOptions, manifests, stage_names
from runtime.wire.keys import Keys, add_node, create_for, is_occupied

_SHORTEST_TOKEN = 16  # as the gateway wants it
_KEYS, _OVERLAY = Path("base", "keys"), Path("overlays", "example")
_BY_PLAN = re.compile(r"(stage-\d+|network|monitor)\.yaml")  # those that another plan or other options may not have
_NOT_IN_OVERLAYS = ("images", "replicas")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: The files, without the keys.
        release: The short identity of the plan and its pods.
        overlay: The folder to apply.
        namespace: The namespace that the overlay names.
    """

    files: list[Path]
    release: str
    overlay: Path
    namespace: str


def write(plan: Plan, options: DeployOptions, folder: Path) -> Written:
    """Write manifests into a new folder, or in place of those of another plan.

    Keys and token are made if they are missing, and stay as they are if not. The overlay is the user's: it is written
    only once.

    Raises:
        InputError: An option is not allowed, or a key of a stage was revoked.
        PlanError: The folder holds something else, or cannot be written.
        MissingDependency: PyYAML is not installed.
    """
    manifests(plan, options)  # refuses what is not allowed before anything is written
    if is_occupied(folder):
        _check_former(folder, options)
        return _fill(plan, options, folder, folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}. Choose another folder with -o DIR") from error
    with new_folder(folder) as draft:
        create_for(draft / _KEYS, stage_names(plan))
        return _fill(plan, options, draft, folder)


def _fill(plan: Plan, options: DeployOptions, draft: Path, folder: Path) -> Written:
    """Write into a folder with keys, which will have the name of the last argument."""
    keys = draft / _KEYS
    for name in [name for name in stage_names(plan) if not _is_allowed(keys, name)]:
        add_node(keys, name)
    token = _token(keys / "token") if options.token else ""
    allowed = sorted(file.stem for file in (keys / "coordinator" / "allowed").glob("*.key"))
    release, documents = manifests(plan, options, allowed=allowed, token=token)
    texts = {path: to_yaml(found) for path, found in documents.items()}
    if (draft / _OVERLAY).exists():
        texts = {path: text for path, text in texts.items() if not Path(path).is_relative_to(_OVERLAY)}
    try:
        for path, text in texts.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(draft / path) as temporary:
                temporary.write_text(text)
        for file in (draft / "base").iterdir():
            if _BY_PLAN.fullmatch(file.name) and f"base/{file.name}" not in texts:
                file.unlink()
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}. Choose another folder with -o DIR") from error
    overlay = _overlay(draft)
    return Written(
        [folder / path for path in texts], release, folder / _OVERLAY, str(overlay.get("namespace", "default"))
    )


def _check_former(folder: Path, options: DeployOptions) -> None:
    """Refuse a folder without manifests of the same name, or whose overlay would change what was deployed."""
    try:
        name = str(_read(folder / "base" / "gateway.yaml")["metadata"]["name"]).removesuffix("-gateway")
    except (OSError, UnicodeDecodeError, TypeError, KeyError):
        raise PlanError(
            f"{folder} is there already and holds no manifests; nothing was touched. Choose another folder with -o DIR"
        ) from None
    if name != options.name:
        raise InputError(
            f"{folder} holds the manifests of {name!r}, not of {options.name!r}; nothing was touched. For a new plan "
            f"of {name!r}, add --name {name}; else choose another folder with -o DIR"
        )
    if changed := [key for key in _NOT_IN_OVERLAYS if key in _overlay(folder)]:
        raise InputError(
            f"{folder / _OVERLAY / 'kustomization.yaml'} sets {' and '.join(changed)}, but the image belongs to the "
            "release, and autoscalers count the replicas; remove that from the overlay. Give the image with --image"
        )


def _overlay(folder: Path) -> dict[str, Any]:
    """The settings of the overlay; empty where the user has moved it or it cannot be read."""
    try:
        found = _read(folder / _OVERLAY / "kustomization.yaml")
    except (OSError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> Any:
    return first_document(read_regular(file, most_bytes=MOST_TEXT_BYTES).decode())


def _is_allowed(keys: Path, name: str) -> bool:
    """Whether the keys of a stage are there and allowed.

    Raises:
        InputError: They are there and are not allowed.
    """
    if not (keys / name).exists():
        return False
    if Keys(keys / name).pair.public not in Keys(keys / "coordinator").allowed:
        raise InputError(
            f"the key of {name} was revoked, and nodes of that stage would be refused. Remove the folder "
            f"{keys / name} to have a new one made, or allow it again: onnxsplit keys allow {keys / 'coordinator'} "
            f"{keys / name / 'public.key'} --name {name}"
        )
    return True


def _token(file: Path) -> str:
    """The token in a file, which is made if it is missing."""
    if not file.exists():
        token = secrets.token_urlsafe(32)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(token)  # without the end of the line: Prometheus sends all of it
        return token
    try:
        token = read_regular(file, most_bytes=MOST_TEXT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token in {file}: {error}") from error
    if len(token) < _SHORTEST_TOKEN or any(c.isspace() for c in token):
        raise InputError(
            f"{file} must hold one token of at least {_SHORTEST_TOKEN} characters, and neither spaces nor line ends; "
            "remove the file to have a new one made"
        )
    return token
