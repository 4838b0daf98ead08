"""Cut any ONNX model into balanced stages, and run the stages as one pipeline of processes.

    import onnxsplit

    onnxsplit.partition("model.onnx", stages=2, out="model.plan")
    with onnxsplit.Pipeline.launch("model.plan") as pipeline:
        outputs = pipeline.run({"input": array})

Cut and check:
    partition       cut a model and write a plan
    load_plan       read a plan
    verify          compare a plan with its model
    merge           join the stages of a plan into one model
    replan          cut a plan's model again for devices whose speed has changed
    Plan            what a plan says: stages, costs, proof
    PlanCache       plans that are cut once for the same model and options
    (models of other frameworks: ``from onnxsplit.export import export``)

Run:
    Pipeline        a running plan: launch, open, from_model; run, arun, map, amap, generate
    Recut           what became of a change to another plan
    RunOptions      the options of a run
    ReplicaRange    a number of nodes of a stage that the load decides
    RayLauncher     starts the nodes on a Ray cluster
    to_torch        outputs as PyTorch tensors, without a copy
    Generation, Generated, GenerateOptions
                    tokens of a plan with a decoder

Serve (``onnxsplit serve FILE.py:NAME``):
    service         declares a class as a service with models; endpoint marks its methods
    Models          the models that a service gets, each a ServiceModel with run and arun

Errors:
    OnnxsplitError  the base of all, with InputError, ModelError, PartitionError, PlanError and others
    PipelineError   the base of those of a running plan: Busy, DeadlineExceeded, StageFailed, NodeFailed and others

``import onnxsplit`` loads no heavy library: each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsplit.errors import (
        ClusterError,
        CustomOpsError,
        ExportError,
        InputError,
        MissingDependency,
        ModelError,
        ModelRefused,
        OnnxsplitError,
        PartitionError,
        PlanError,
        ProviderError,
    )
    from onnxsplit.plan import Plan
    from onnxsplit.plan_files import load_plan
    from onnxsplit.planning.cached import PlanCache
    from onnxsplit.planning.planner import partition
    from onnxsplit.planning.replan import Replanned, replan
    from onnxsplit.stages.merge import merge
    from onnxsplit.stages.verify import verify
    from runtime.balance.replicas import ReplicaRange
    from runtime.errors import (
        Busy,
        Cancelled,
        DeadlineExceeded,
        LaunchFailed,
        NodeFailed,
        NotSeparable,
        PipelineClosed,
        PipelineError,
        RecutFailed,
        RecutRefused,
        StageFailed,
        StageUnavailable,
    )
    from runtime.launch.ray import RayLauncher
    from runtime.options import RunOptions
    from runtime.pipeline import Pipeline
    from runtime.recut.result import Recut
    from runtime.requests.generate_options import GenerateOptions
    from runtime.requests.generation import Generated, Generation
    from runtime.services.declare import Models, ServiceModel, endpoint, service
    from runtime.timings import Timings
    from runtime.torch_tensors import to_torch

__version__ = "0.1.0"

_HOMES = {
    "onnxsplit.planning.planner": ("partition",),
    "onnxsplit.planning.cached": ("PlanCache",),
    "onnxsplit.planning.replan": ("replan", "Replanned"),
    "onnxsplit.plan_files": ("load_plan",),
    "onnxsplit.plan": ("Plan",),
    "onnxsplit.stages.verify": ("verify",),
    "onnxsplit.stages.merge": ("merge",),
    "runtime.pipeline": ("Pipeline",),
    "runtime.options": ("RunOptions",),
    "runtime.balance.replicas": ("ReplicaRange",),
    "runtime.timings": ("Timings",),
    "runtime.launch.ray": ("RayLauncher",),
    "runtime.torch_tensors": ("to_torch",),
    "runtime.recut.result": ("Recut",),
    "runtime.requests.generation": ("Generation", "Generated"),
    "runtime.requests.generate_options": ("GenerateOptions",),
    "runtime.services.declare": ("service", "endpoint", "Models", "ServiceModel"),
    "onnxsplit.errors": (
        "OnnxsplitError",
        "InputError",
        "ModelError",
        "ModelRefused",
        "CustomOpsError",
        "PartitionError",
        "PlanError",
        "ClusterError",
        "ProviderError",
        "ExportError",
        "MissingDependency",
    ),
    "runtime.errors": (
        "PipelineError",
        "LaunchFailed",
        "Busy",
        "DeadlineExceeded",
        "Cancelled",
        "StageFailed",
        "NotSeparable",
        "NodeFailed",
        "StageUnavailable",
        "PipelineClosed",
        "RecutRefused",
        "RecutFailed",
    ),
}

__all__ = [  # the same names, for type checkers and editors
    "partition", "load_plan", "verify", "merge", "replan", "Replanned", "Plan", "PlanCache",
    "Pipeline", "Recut", "RunOptions", "ReplicaRange", "Timings", "RayLauncher", "to_torch", "Generation", "Generated",
    "GenerateOptions", "service", "endpoint", "Models", "ServiceModel",
    "OnnxsplitError", "InputError", "ModelError", "ModelRefused", "CustomOpsError", "PartitionError", "PlanError",
    "ClusterError", "ProviderError", "ExportError", "MissingDependency",
    "PipelineError", "LaunchFailed", "Busy", "DeadlineExceeded", "Cancelled", "StageFailed", "NotSeparable",
    "NodeFailed", "StageUnavailable", "PipelineClosed", "RecutRefused", "RecutFailed",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'onnxsplit' has no attribute {name!r}")
    from importlib import import_module

    from onnxsplit.own_runtime import check_runtime

    if home.startswith("runtime."):
        check_runtime()
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
