"""Objects for KServe, which runs a whole plan in one pod.

    kustomization.yaml    the resources
    kserve.yaml           ServingRuntime that runs ``onnxsplit serve``, and InferenceService that uses it

The documents are written down in ``templates/kserve.yaml``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import InputError, PlanError, shown
from onnxsplit.files import replacing
from onnxsplit.numbers import whole_problem
from onnxsplit.plan import Plan
from runtime.deploy.documents import Document, filled, templates, to_yaml
from runtime.deploy.kubernetes import check_custom_ops
from runtime.deploy.names import check_name, pull_policy
from runtime.deploy.sizes import plan_sizes, quantity, restart_s, states_bytes
from runtime.wire.keys import is_occupied

_MOST_PODS = 1000
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s{}]+")


@dataclass(frozen=True, kw_only=True)
class KServeOptions:
    """The options of the objects for KServe.

    Attributes:
        name: Name of the model and of the InferenceService.
        image: Container image with onnxsplit.
        storage: Where KServe finds the plan's folder: ``pvc://NAME/FOLDER``, ``s3://``, ``hf://``, and others.
        least_replicas: Smallest number of pods. Each runs the whole plan.
        most_replicas: Largest number of pods; None for the smallest.
        custom_ops: Libraries of custom ops: paths in the image, or ``onnxruntime-extensions``.
    """

    name: str
    image: str
    storage: str
    least_replicas: int = 1
    most_replicas: int | None = None
    custom_ops: tuple[str, ...] = ()

    @property
    def pods(self) -> tuple[int, int]:
        """The smallest and the largest number of pods."""
        return self.least_replicas, self.least_replicas if self.most_replicas is None else self.most_replicas

    def check(self) -> None:
        """Refuse values that KServe would refuse.

        Raises:
            InputError: A value is not allowed. The message names it.
        """
        check_name(self.name)
        pull_policy(self.image)
        if not _URI.fullmatch(self.storage):
            raise InputError(
                f"--storage {shown(self.storage)} is not the address of a folder; allowed: pvc://CLAIM/FOLDER, "
                "s3://BUCKET/FOLDER, hf://OWNER/NAME and KServe's other kinds, without spaces and braces"
            )
        least, most = self.pods
        for option, count, lowest in (("--min-replicas", least, 1), ("--max-replicas", most, least)):
            if problem := whole_problem(option, count, lowest, _MOST_PODS):
                raise InputError(problem)


def documents(plan: Plan, options: KServeOptions) -> dict[str, list[Document]]:
    """The documents of every file, by the file's path.

    Raises:
        InputError: An option is not allowed, or the plan needs custom ops and none are named.
        MissingDependency: PyYAML is not installed.
    """
    options.check()
    check_custom_ops(plan, options.custom_ops)
    sizes, states = plan_sizes(plan), states_bytes(plan)
    memory, disk = quantity(sizes.memory), quantity(sizes.disk)
    limits = {"memory": memory, "ephemeral-storage": disk}
    devices = {stage.provider for stage in plan.stages if stage.provider.startswith("cuda")}
    if devices:
        limits["nvidia.com/gpu"] = str(len(devices))
    least, most = options.pods
    values: dict[str, object] = {
        "name": options.name,
        "image": options.image,
        "pull_policy": pull_policy(options.image),
        "storage": options.storage,
        "least_replicas": least,
        "most_replicas": most,
        "ready_grace": restart_s(plan),
        "cpu": sum(stage.replicas * stage.threads for stage in plan.stages),
        "memory": memory,
        "disk": disk,
        "limits": limits,
        "cache_volume": quantity(sizes.cache_volume),
        "cache_args": ["--cache-bytes", str(states)] if states else [],
        "custom_ops_args": [word for library in options.custom_ops for word in ("--custom-ops", library)],
    }
    found = templates("kserve")
    return {
        "kserve.yaml": filled(found["service"], values),
        "kustomization.yaml": filled(found["kustomization"], values),
    }


def write(plan: Plan, options: KServeOptions, folder: Path) -> list[Path]:
    """Write the objects into a new folder, or in place of those of another plan.

    Returns:
        The files.

    Raises:
        InputError: As :func:`documents`.
        PlanError: The folder holds something else, or cannot be written.
        MissingDependency: PyYAML is not installed.
    """
    texts = {path: to_yaml(found) for path, found in documents(plan, options).items()}
    if is_occupied(folder) and not (folder / "kserve.yaml").is_file():
        raise PlanError(
            f"{folder} is there already and holds nothing for KServe; nothing was touched. Choose another folder with "
            "-o DIR"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with replacing(folder / path) as draft:
                draft.write_text(text)
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}. Choose another folder with -o DIR") from error
    return [folder / path for path in texts]
