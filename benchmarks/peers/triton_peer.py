"""Stages as Python models in an ensemble of Triton; the server comes with nvidia-pytriton."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from grpc_caller import Caller
from peer import Plan, Tensors, free_port, main
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PACKAGES = Path(site.getsitepackages()[0])
SERVER = PACKAGES / "pytriton" / "tritonserver"


def tensor(known: Tensors, name: str, alias: str) -> dict[str, object]:
    """Return a tensor's type and rank, with any sizes; rank 0 becomes rank 1, because Triton has no rank 0."""
    kind = {"BYTES": "STRING"}.get(found := np_to_triton_dtype(known[name].dtype), found)
    return {"name": alias, "data_type": f"TYPE_{kind}", "dims": [-1] * max(known[name].ndim, 1)}


def write(repository: Path, config: ModelConfig, code: Path | None = None) -> None:
    """Write a model's configuration and, if it has any, its code."""
    (repository / config.name / "1").mkdir(parents=True)
    (repository / config.name / "config.pbtxt").write_text(text_format.MessageToString(config))
    if code is not None:
        (repository / config.name / "1" / "model.py").symlink_to(code)


def repository(folder: Path, plan: Plan, known: Tensors, alias: dict[str, str]) -> Path:
    """A model for every stage, and the ensemble that joins them tensor by tensor."""
    models = folder / "models"
    ensemble = ModelConfig(
        name="ensemble",
        platform="ensemble",
        input=[tensor(known, name, alias[name]) for name in plan.inputs],
        output=[tensor(known, name, alias[name]) for name in plan.outputs],
    )
    for index, stage in enumerate(plan.stages):
        scalars = [name for name in stage.inputs if not known[name].shape]
        given = {"plan": str(plan.folder), "stage": str(index), "scalars": json.dumps(scalars)}
        config = ModelConfig(
            name=f"stage{index}",
            backend="python",
            input=[tensor(known, name, alias[name]) for name in stage.inputs],
            output=[tensor(known, name, alias[name]) for name in stage.outputs],
            instance_group=[{"count": 1, "kind": "KIND_CPU"}],
            parameters={name: {"string_value": value} for name, value in given.items()},
        )
        write(models, config, Path(__file__).with_name("triton_model.py"))
        step = ensemble.ensemble_scheduling.step.add(model_name=config.name, model_version=-1)
        step.input_map.update({alias[name]: alias[name] for name in stage.inputs})
        step.output_map.update({alias[name]: alias[name] for name in stage.outputs})
    write(models, ensemble)
    return models


def backends(folder: Path) -> Path:
    """Link the Python backend and the stub for this version of Python, and return the folder of backends."""
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for file in (SERVER / "backends" / "python").glob("*triton_python*"):
        (python / file.name).symlink_to(file)
    stub = SERVER / "python_backend_stubs" / version / "triton_python_backend_stub"
    (python / stub.name).symlink_to(stub)
    return python.parent


def wait_until_ready(server: subprocess.Popen[bytes], client: InferenceServerClient) -> None:
    """Return once all models are loaded."""
    while server.poll() is None:
        try:
            if client.is_server_ready():
                return
        except InferenceServerException:
            pass
        time.sleep(0.1)
    sys.exit("Triton ended as it started")


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Caller]:
    """Start the server on a free port, with gRPC only."""
    alias = {name: f"t{index}" for index, name in enumerate(known)}  # Triton takes few characters in names
    address = f"127.0.0.1:{free_port()}"
    libraries = (PACKAGES / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    environment = {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",  # the stub embeds the Python that it finds there
    }
    with tempfile.TemporaryDirectory() as folder:
        host, port = address.split(":")
        options = {
            "model-repository": repository(Path(folder), plan, known, alias),
            "backend-directory": backends(Path(folder)),
            "grpc-address": host,
            "grpc-port": port,
            "allow-http": "false",
            "allow-metrics": "false",
        }
        command = [str(SERVER / "bin" / "tritonserver"), "--disable-auto-complete-config"]
        command += [f"--{name}={value}" for name, value in options.items()]
        server = subprocess.Popen(command, cwd=Path(__file__).parent, env=os.environ | environment)
        try:
            with InferenceServerClient(address) as client:
                wait_until_ready(server, client)
                yield Caller(client, "ensemble", plan, known, alias)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main(start)
