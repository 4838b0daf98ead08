"""Checks of the names that manifests are given: of objects, and of container images. Pure."""

from __future__ import annotations

import re
from typing import Literal

from onnxsplit.errors import InputError, shown
from onnxsplit.plan import Plan

LONGEST_NAME = 32
"""Most characters of a model's name. A StatefulSet's name may have 52, and ``-stage-999-`` and a release follow it."""

PullPolicy = Literal["Always", "IfNotPresent"]

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_IMAGE = re.compile(
    rf"(?P<name>(?:{_HOST}/)?{_PART}(?:/{_PART})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?"
    r"(?:@(?P<digest>[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-f]{32,}))?",
    re.ASCII,
)
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_IMAGE = 512
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def pull_policy(image: str) -> PullPolicy:
    """When a host asks the registry for an image that it has: always where its name may mean another image later.

    Raises:
        InputError: The text is not the name of an image.
    """
    found = _IMAGE.fullmatch(image) if len(image) <= _MOST_IMAGE else None
    digest = found["digest"] if found else None
    if found is None or (digest and digest.startswith("sha256:") and not _SHA256.fullmatch(digest)):
        raise InputError(
            f"{shown(image)} is not a container image; allowed: [HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST], with a NAME "
            "in lower case and a DIGEST of 64 digits 0-9a-f, as registry.example/team/onnxsplit:1.2. Give it with "
            "--image"
        )
    return "IfNotPresent" if digest or found["tag"] not in (None, "latest") else "Always"


def check_name(name: str) -> None:
    """Check the prefix of every object's name.

    Raises:
        InputError: It is not allowed.
    """
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise InputError(
            f"{shown(name)} is not a name for Kubernetes objects; allowed: up to {LONGEST_NAME} lower-case letters, "
            "digits and '-', beginning with a letter. Give another name with --name"
        )


def check_object(option: str, name: str) -> None:
    """Check the name of an object that exists in the cluster.

    Raises:
        InputError: No object can have it.
    """
    if not _OBJECT.fullmatch(name):
        raise InputError(
            f"{option} {shown(name)} is not the name of a Kubernetes object; allowed: up to 253 lower-case letters, "
            "digits, '-' and '.', beginning and ending with a letter or a digit"
        )


def name_of(plan: Plan) -> str:
    """A name for Kubernetes objects, made of the model's name."""
    text = re.sub(r"[^a-z0-9]+", "-", plan.model.name.removesuffix(".onnx").lower()).strip("-")
    return re.sub(r"^[^a-z]+", "", text)[:LONGEST_NAME].rstrip("-") or "model"
