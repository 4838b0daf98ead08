"""Links between hosts, and devices on them, measured by agents: real processes, real messages, keys."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import build
import ports
import pytest
from proxy import Proxy

from onnxsplit.cluster import Cluster, Device
from onnxsplit.cluster_files import load_cluster
from runtime.errors import PipelineError
from runtime.measure.client import Agents
from runtime.wire.keys import Keys, create_for


@contextmanager
def agent(environment, *options):
    address = f"tcp://127.0.0.1:{ports.free_port()}"
    command = [sys.executable, "-P", "-m", "onnxsplit", "cluster", "agent", "--bind", address, *map(str, options)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert "Answering onnxsplit cluster measure at" in process.stderr.readline()
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def keys(tmp_path):
    create_for(tmp_path / "keys", ("a", "b"))
    return tmp_path / "keys"


def test_links_and_speeds_of_other_hosts_are_measured_over_links_with_keys(tmp_path, keys, python_environment):
    model = build.save(build.chain(6, 128), tmp_path)
    file = tmp_path / "cluster.toml"
    file.write_text(Cluster((Device("one", "a"), Device("two", "b")), {}, "a").to_toml())
    with (
        agent(python_environment, "--keys", keys / "a") as one,
        agent(python_environment, "--keys", keys / "b") as two,
    ):
        command = [sys.executable, "-P", "-m", "onnxsplit", "cluster", "measure", model, "-c", file, "--json"]
        command += ["--agent", f"a={one}", "--agent", f"b={two}", "--keys", keys / "coordinator"]
        done = subprocess.run([*map(str, command)], env=python_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_cluster(file)
    assert list(found.links) == [("a", "b")], "this host has no device and no caller here"
    link = found.links["a", "b"]
    assert link.overlapped
    assert link.bytes_per_s > 0
    assert link.latency_ns + link.delay_ns > 0
    assert found.devices[0].speed == 1.0
    assert found.devices[1].speed > 0
    assert json.loads(done.stdout)["links"][0]["between"] == ["a", "b"]


def test_an_agent_answers_only_those_it_knows_and_takes_only_plain_names(tmp_path, keys, python_environment):
    (tmp_path / "f").write_bytes(b"x" * 1_200_000)
    with agent(python_environment, "--keys", keys / "a") as one:
        create_for(tmp_path / "strange", ("a",))
        with pytest.raises(PipelineError, match="refuses this process"):
            Agents({"a": one}, keys=Keys(tmp_path / "strange" / "coordinator"), insecure=False)
        with Agents({"a": one}, keys=Keys(keys / "coordinator"), insecure=False) as agents:
            agents.send([tmp_path / "f"])
            with pytest.raises(PipelineError, match="is not a plain file name"):
                agents._clients["a"].put("../f", tmp_path / "f")
            assert agents.time_ns(tmp_path / "f", tmp_path / "f", Device("one", "a")) is None, "it does not run there"


def test_an_unreachable_agent_is_reported(monkeypatch):
    monkeypatch.setattr("runtime.measure.client.AgentClient.ask.__kwdefaults__", {"patience_s": 0.3})
    with pytest.raises(PipelineError, match=r"no agent answers at .*onnxsplit cluster agent --bind"):
        Agents({"a": f"tcp://127.0.0.1:{ports.free_port()}"}, keys=None, insecure=False)


def test_a_slow_link_on_which_compression_pays_is_marked(tmp_path, python_environment):
    model, file = build.save(build.chain(8, 256), tmp_path), tmp_path / "cluster.toml"  # behind a Relu, half are zeros
    file.write_text(Cluster((Device("one"), Device("two", "b")), {}).to_toml())
    with agent(python_environment) as address:
        proxy = Proxy(ports.free_port(), int(address.rpartition(":")[2]))
        proxy.delay_s = 0.02  # for each 64 KiB at most
        command = [sys.executable, "-P", "-m", "onnxsplit", "cluster", "measure", model, "-c", file, "--json"]
        command += ["--dim", "batch=128", "--agent", f"b=tcp://127.0.0.1:{proxy.server.getsockname()[1]}"]
        done = subprocess.run([*map(str, command)], env=python_environment, capture_output=True, text=True, check=False)
        proxy.close()
    assert done.returncode == 0, done.stderr
    links = load_cluster(file).links
    assert links["b", "local"].compressed
    assert not links["local", "local"].compressed
    assert [link["compressed"] for link in json.loads(done.stdout)["links"]] == [True, False]
