"""Reads of the objects in manifests, by the file's path."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

Document = dict[str, Any]
Files = Mapping[str, list[Document]]


def of_kind(files: Files, kind: str) -> dict[str, Document]:
    """The objects of a kind, by name."""
    return {d["metadata"]["name"]: d for documents in files.values() for d in documents if d["kind"] == kind}


def pods(files: Files) -> list[Document]:
    """The templates of all pods, the gateway's first."""
    found = [d for documents in files.values() for d in documents if d["kind"] in ("Deployment", "StatefulSet")]
    return [document["spec"]["template"] for document in found]


def containers(files: Files) -> list[Document]:
    """All containers, also those that run before others."""
    return [c for pod in pods(files) for c in (*pod["spec"]["initContainers"], *pod["spec"]["containers"])]


def word_after(container: Document, option: str) -> str:
    """The value of an option in a container's arguments."""
    arguments: list[str] = container["args"]
    return arguments[arguments.index(option) + 1]


def kustomized(overlay: Path) -> list[Document]:
    """The objects that Kustomize makes of an overlay; skips the test where it is missing."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: Kustomize did not build it")
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether ``matchLabels``, or the selector of a Service, selects an object with these labels."""
    return all(labels.get(key) == value for key, value in selector.items())
