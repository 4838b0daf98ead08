"""Plans with custom ops: only processes that were given a library load it, and only for a stage that needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import build
import custom
import numpy as np
import ports
import pytest
from served import Served
from waiting import wait_until

from onnxsplit.cluster_files import load_cluster
from onnxsplit.custom_ops import EXTENSIONS, find_libraries
from onnxsplit.errors import CustomOpsError, InputError
from onnxsplit.npz import load_npz
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.errors import LaunchFailed

TEXT = {"text": np.array(["a model runs cuts"], dtype=object)}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A library that only these tests name, so that no process can find it elsewhere."""
    return custom.other_build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory, library) -> Path:
    """Three stages: custom ops in the first and the last."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = build.save(custom.tokenizer(), folder)
    partition(model, stages=3, out=folder / "text.plan", custom_ops=[library], inputs=TEXT, rounds=1)
    assert [bool(stage.custom_ops) for stage in load_plan(folder / "text.plan").stages] == [True, False, True]
    return folder / "text.plan"


@pytest.fixture(scope="module")
def wanted(plan, library) -> dict[str, np.ndarray]:
    loaded = load_plan(plan)
    found = run_stages(plan, loaded, TEXT, threads=1, custom_ops=find_libraries(library))
    return {name: found[name] for name in loaded.outputs}


@pytest.fixture
def environment(python_environment) -> dict[str, str]:
    """An environment in which the package onnxruntime-extensions is found."""
    package = Path(custom.extensions().path).parents[1]
    return python_environment | {"PYTHONPATH": f"{python_environment['PYTHONPATH']}:{package}"}


def has_loaded(pid: int | None) -> bool:
    """Return whether a process has loaded a library of custom ops."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return any(name in maps for name in ("libops.so", "here.so", "_extensions_pydll"))


@contextmanager
def by_hand(environment, address, *options):
    """Nodes as users start them, each with its own options."""
    nodes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, *map(str, words)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for words in options
    ]  # fmt: skip
    try:
        yield nodes
    finally:
        for node in nodes:
            node.terminate()
            node.communicate(timeout=60)


def test_nodes_load_the_library_where_their_stage_needs_it_and_nowhere_else(plan, library, wanted):
    with Pipeline.launch(plan, custom_ops=[library]) as pipeline:
        found = pipeline.run(TEXT, timeout=60)
        assert [has_loaded(node.pid) for node in pipeline.nodes] == [True, False, True]
    for name, array in wanted.items():
        assert np.array_equal(found[name], array)


def test_a_launch_without_the_library_starts_nothing(plan, tmp_path):
    with pytest.raises(CustomOpsError, match=r"the plan needs the custom op library 'libops\.so'.*given: none"):
        Pipeline.launch(plan)
    other = custom.other_build(tmp_path)
    other.write_bytes(other.read_bytes() + b"again")
    with pytest.raises(CustomOpsError, match="is another build of it"):
        Pipeline.launch(plan, custom_ops=[other])


def test_replicas_share_the_weights_of_a_stage_with_custom_ops(plan, library, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Pipeline.launch(plan, custom_ops=[library], replicas={0: 2}, share_weights=True) as pipeline:
        found = pipeline.run(TEXT, timeout=60)
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert len([*(tmp_path / "onnxsplit" / "weights").glob("*/model.onnx")]) == 3


def test_a_node_that_is_lost_comes_back_with_the_library(plan, library, wanted):
    with Pipeline.launch(plan, custom_ops=[library]) as pipeline:
        subprocess.run(["kill", "-9", str(pipeline.nodes[0].pid)], check=True)
        found = pipeline.run(TEXT, timeout=60)
        assert pipeline.incidents
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def test_nodes_by_hand_name_their_own_library(plan, library, wanted, environment, tmp_path):
    address = f"ipc://{tmp_path}/c"
    renamed = tmp_path / "here.so"
    renamed.write_bytes(library.read_bytes())
    with by_hand(
        environment, address,
        ("--stage", "0", "--custom-ops", renamed), ("--stage", "1"), ("--stage", "2", "--custom-ops", library),
    ), Pipeline.listen(plan, bind=address, start_timeout=60) as pipeline:  # fmt: skip
        found = pipeline.run(TEXT, timeout=60)
        assert [has_loaded(node.pid) for node in pipeline.nodes] == [True, False, True]
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def test_a_node_by_hand_loads_nothing_that_its_stage_does_not_need(plan, library, environment, chain_plan, tmp_path):
    address = f"ipc://{tmp_path}/c"
    options = ("--custom-ops", library)
    with (
        by_hand(environment, address, options, options),
        Pipeline.listen(chain_plan, bind=address, start_timeout=60) as pipeline,
    ):
        assert [has_loaded(node.pid) for node in pipeline.nodes] == [False, False]


def test_a_node_without_the_library_refuses_its_stage_and_the_caller_is_told_why(plan, environment, tmp_path):
    address = f"ipc://{tmp_path}/c"
    with by_hand(environment, address, (), (), ()) as nodes:
        with pytest.raises(LaunchFailed, match=r"stage [02] .*refused: .*'libops\.so'.*given: none.*--custom-ops"):
            Pipeline.listen(plan, bind=address, start_timeout=60)
        wait_until(lambda: 1 in [node.poll() for node in nodes])


def test_a_node_with_another_build_says_so_to_the_caller(plan, environment, tmp_path):
    other = custom.other_build(tmp_path)
    other.write_bytes(other.read_bytes() + b"again")
    address = f"ipc://{tmp_path}/c"
    with (
        by_hand(environment, address, *[("--custom-ops", other)] * 3),
        pytest.raises(LaunchFailed, match=r"refused: .*is another build of it"),
    ):
        Pipeline.listen(plan, bind=address, start_timeout=60)


def test_a_node_without_the_library_fetches_no_files(plan, environment, tmp_path):
    address = f"tcp://127.0.0.1:{ports.free_port()}"
    fetching = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with (
        by_hand(fetching, address, ("--stage", "0", "--fetch", "--insecure")),
        pytest.raises(LaunchFailed, match=r"'libops\.so'"),
    ):
        Pipeline.listen(plan, bind=address, insecure=True, start_timeout=60)
    assert [path.name for path in (tmp_path / "cache").rglob("*.onnx")] == []


def test_pipelines_that_start_no_nodes_themselves_take_no_library(plan, library, tmp_path):
    with pytest.raises(InputError, match="onnxsplit node --custom-ops"):
        Pipeline.listen(plan, bind=f"ipc://{tmp_path}/c", custom_ops=[library])


# The command line


def call(environment, folder, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit", *map(str, words)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_commands_take_the_library_by_its_package(environment, tmp_path):
    build.save(custom.lengths(), tmp_path)
    np.savez(tmp_path / "in.npz", s=np.array(["ab", "xyz"]))
    option = ("--custom-ops", EXTENSIONS)
    assert "StringUpper" in call(environment, tmp_path, "inspect", "model.onnx", *option).stdout
    call(environment, tmp_path, "export", "model.onnx", "-o", "again.onnx", *option)
    said = call(environment, tmp_path, "partition", "model.onnx", "--rounds", "1", *option).stdout
    assert "Custom ops of onnxruntime-extensions" in said
    assert "Next: onnxsplit verify model.plan model.onnx --custom-ops onnxruntime-extensions" in said
    assert "equal" in call(environment, tmp_path, "verify", "model.plan", "model.onnx", *option).stdout
    call(environment, tmp_path, "run", "model.plan", "--inputs", "in.npz", "--outputs", "out.npz", *option)
    assert load_npz(tmp_path / "out.npz")["y"].tolist() == [4.0, 9.0]
    few = ("--slices", "3", "--slice-seconds", "0.05")
    call(environment, tmp_path, "bench", "model.plan", "--model", "model.onnx", *few, *option)
    for command in (("verify", "model.plan", "model.onnx"), ("run", "model.plan"), ("bench", "model.plan")):
        assert "add --custom-ops onnxruntime-extensions" in call(environment, tmp_path, *command, code=1).stderr
    assert "--custom-ops FILE.so" in call(environment, tmp_path, "inspect", "model.onnx", code=1).stderr


def test_neither_the_environment_nor_a_settings_file_names_a_library(plan, library, environment, tmp_path):
    """A settings file may be in a downloaded folder, so libraries that it names must not run."""
    hostile = environment | {
        f"ONNXSPLIT_{name}CUSTOM_OPS": str(library) for name in ("", "RUN_", "NODE_", "SERVE_", "VERIFY_")
    }
    assert "given: none" in call(hostile, tmp_path, "run", plan, code=1).stderr
    (tmp_path / "onnxsplit.toml").write_text(f"[run]\ncustom-ops = ['{library}']\n")
    said = call(environment, tmp_path, "run", plan, "--custom-ops", library, code=2).stderr
    assert "custom-ops loads code, so only the command line may give it" in said


def test_serve_gives_each_model_the_libraries_that_its_plan_names(plan, library, chain_plan, environment):
    with Served(plan, chain_plan, "--custom-ops", library, environment=environment) as server:
        ask = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a model"]}]}
        shapes = [output["shape"] for output in server.json("/v2/models/text/infer", ask)["outputs"]]
        assert shapes == [[4, 16], [4, 16]]
        rows = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32}]}
        assert len(server.json("/v2/models/model/infer", rows)["outputs"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "add --custom-ops FILE.so"),
        (("--launcher", "none", "--bind", "ipc:///tmp/nobody", "--custom-ops", "LIBRARY"), "onnxsplit node --custom"),
    ],
)
def test_serve_without_its_library_or_with_one_for_others_says_so(plan, library, environment, tmp_path, words, said):
    given = [str(library) if word == "LIBRARY" else word for word in words]
    code = 2 if words else 1
    assert (
        said
        in call(environment, tmp_path, "serve", plan, "--http-port", "0", "--grpc-port", "0", *given, code=code).stderr
    )


def test_serve_refuses_a_library_that_no_plan_names(chain_plan, library, environment, tmp_path):
    ports = ("--http-port", "0", "--grpc-port", "0")
    said = call(environment, tmp_path, "serve", chain_plan, *ports, "--custom-ops", library, code=1).stderr
    assert "does not name the custom op library" in said


def test_devices_are_measured_on_a_model_with_custom_ops_here_and_by_agents(library, environment, tmp_path):
    build.save(custom.lengths(), tmp_path)
    (tmp_path / "cluster.toml").write_text(
        '[[device]]\nname = "here"\nthreads = 1\n[[device]]\nname = "there"\nhost = "b"\nthreads = 1\nspeed = 77.0\n'
    )

    def measure(*words: object) -> list[float]:
        address = f"tcp://127.0.0.1:{ports.free_port()}"
        command = [sys.executable, "-P", "-m", "onnxsplit", "cluster", "agent", "--bind", address, *map(str, words)]
        agent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert "Answering onnxsplit cluster measure at" in agent.stderr.readline()
            option = ("--agent", f"b={address}", "--custom-ops", library, "--json")
            said = call(environment, tmp_path, "cluster", "measure", "model.onnx", *option)
            assert json.loads(said.stdout)["speeds"]["here"] == 1.0
            assert not has_loaded(agent.pid)
        finally:
            agent.terminate()
            agent.communicate(timeout=60)
        return [device.speed for device in load_cluster(tmp_path / "cluster.toml").devices]

    assert measure() == [1.0, 77.0], "an agent that was not told of the library cannot run the model"
    assert measure("--custom-ops", library)[1] != 77.0
