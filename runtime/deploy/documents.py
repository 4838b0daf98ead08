"""Kubernetes objects as values, the templates that they are made from, and their text."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from onnxsplit.errors import MissingDependency

Document = dict[str, Any]
"""A Kubernetes object as YAML describes it."""


def templates(name: str) -> dict[str, list[Any]]:
    """The templates in ``templates/NAME.yaml``, which explains its placeholders.

    Raises:
        MissingDependency: PyYAML is not installed.
    """
    text = (files(__package__ or "") / "templates" / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, list[Any]] = _yaml().safe_load(text)
    return found


def filled(template: Any, values: Mapping[str, object]) -> Any:
    """A template with its placeholders filled."""
    if isinstance(template, dict):
        return {key: filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        items: list[Any] = []
        for entry in template:
            value = filled(entry, values)
            items += value if isinstance(value, list) else [value]
        return items
    if not isinstance(template, str):
        return template
    if template.startswith("$") and template[1:].isidentifier():
        return values[template[1:]]
    return Template(template).substitute(values)


def to_yaml(documents: list[Document]) -> str:
    """The text of a file with these documents.

    Raises:
        MissingDependency: PyYAML is not installed.
    """
    yaml = _yaml()
    dumper = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text: str = "---\n".join(yaml.dump(one, Dumper=dumper, sort_keys=False, width=120) for one in documents)
    return text


def first_document(text: str) -> Any:
    """The first document of a file; None where the text is not YAML.

    Raises:
        MissingDependency: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        return next(iter(yaml.safe_load_all(text)), None)
    except yaml.YAMLError:
        return None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("manifests need PyYAML: pip install 'onnxsplit[deploy]'") from error
    return yaml
