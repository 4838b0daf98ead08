"""The blocks of the pages about one host run as they stand, on small models."""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import build
import custom
import numpy as np
import onnx
import pages
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from waiting import wait_until

pytest.importorskip("uvicorn", reason="needs the extra serve")

from reader import Reader

from onnxsplit.cli import advise, cli, settings
from onnxsplit.cluster_files import load_cluster
from onnxsplit.decoder.override import read_override
from onnxsplit.errors import InputError
from onnxsplit.npz import save_npz
from onnxsplit.planning.candidates import waiting_ns
from onnxsplit.planning.planner import partition
from runtime import Pipeline

QUICK = {"ONNXSPLIT_PARTITION_ROUNDS": "0", "ONNXSPLIT_PARTITION_COSTS": "analytic"}


@pytest.fixture
def reader(tmp_path, python_environment):
    package = Path(custom.extensions().path).parents[1]
    path = {"PYTHONPATH": f"{python_environment['PYTHONPATH']}:{package}"}
    with ExitStack() as opened:
        yield Reader(tmp_path, {**python_environment, **QUICK, **path}, opened, moved={" /opt/": f" {tmp_path}/opt/"})


def tasks() -> onnx.ModelProto:
    """x -> label, score, and a sequence of boxes."""
    nodes = [
        helper.make_node("Relu", ["x"], ["score"]),
        helper.make_node("ArgMax", ["score"], ["label"], axis=1),
        helper.make_node("Sigmoid", ["x"], ["box"]),
        helper.make_node("SequenceConstruct", ["box"], ["boxes"]),
    ]
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 4])
    boxes = helper.make_value_info("boxes", helper.make_sequence_type_proto(floats))
    label = build.value("label", [2, 1], TensorProto.INT64)
    return build.model(nodes, [build.value("x", [2, 4])], [label, build.value("score", [2, 4]), boxes])


def scaled() -> onnx.ModelProto:
    """x * scale -> Relu -> y; scale has the default 2."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    inputs = [build.value("x", ["n", 4]), build.value("scale", [])]
    return build.model(nodes, inputs, [build.value("y", ["n", 4])], [build.constant("scale", np.float32(2))])


def past() -> onnx.ModelProto:
    """Tokens behind a past; the mask is as long as both, by a formula."""
    nodes = [
        helper.make_node("Concat", ["old", "new"], ["both"], axis=1),
        helper.make_node("Mul", ["both", "mask"], ["masked"]),
        helper.make_node("Relu", ["masked"], ["y"]),
    ]
    inputs = [
        build.value("old", [1, "past_sequence_length"]),
        build.value("new", [1, "sequence_length"]),
        build.value("mask", [1, "past_sequence_length + sequence_length"]),
    ]
    return build.model(nodes, inputs, [build.value("y", [1, "n"])])


def test_models_are_cut_as_their_page_says(reader):
    for name, model in {"model": build.chain(), "tasks": tasks(), "scaled": scaled(), "decoder": past()}.items():
        build.save(model, reader.folder, f"{name}.onnx")
    for kind, block in pages.blocks_of("docs/models.md"):
        if kind == "output":
            partition(reader.folder / "scaled.onnx", stages=1, out=reader.folder / "plain.plan", costs="analytic")
            with Pipeline.launch(reader.folder / "plain.plan") as pipeline, pytest.raises(InputError) as refused:
                pipeline.run({"x": np.ones((2, 4), np.float32), "scale": np.float32(3)})
            reader.said = str(refused.value)
        reader.follow(kind, block)


def test_custom_ops_are_named_where_they_are_used(reader):
    custom.other_build(reader.folder)
    (reader.folder / "opt").mkdir()
    shutil.copy(reader.folder / "libops.so", reader.folder / "opt")
    build.save(custom.lengths(), reader.folder)
    save_npz(reader.folder / "in.npz", {"s": np.array(["a", "bc"], dtype=object)})
    partition(
        reader.folder / "model.onnx", stages=1, out=reader.folder / "b.plan", custom_ops=["onnxruntime-extensions"]
    )
    (block,) = [block for _, block in pages.blocks_of("docs/custom-ops.md")]
    for host, command in pages.commands(block):
        if command.startswith("onnxsplit serve"):
            (reader.folder / "model.plan").rename(reader.folder / "a.plan")
        reader.type(command, host)
    body = {"inputs": [{"name": "s", "shape": [2], "datatype": "BYTES", "data": ["a", "bc"]}]}
    for name in "ab":
        assert reader.server.json(f"/v2/models/{name}/infer", body)["outputs"][0]["data"] == [1, 4]
    library, address = reader.folder / "libops.so", f"tcp://{reader.addresses['10.0.0.1:5555']}"
    partition(reader.folder / "model.onnx", stages=1, out=reader.folder / "one.plan", custom_ops=[library])
    with Pipeline.listen(reader.folder / "one.plan", bind=address, start_timeout=60) as pipeline:
        assert pipeline.run({"s": np.array(["a"], dtype=object)})["y"] == [1]


def test_borders_are_narrowed_on_a_slow_link(reader):
    build.save(build.chain(8, 64), reader.folder)
    example = {"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
    for name in "ab":
        save_npz(reader.folder / f"{name}.npz", example)
    reader.environment["ONNXSPLIT_PARTITION_COSTS"] = "measured"
    slow = '[[device]]\nname = "h"\nhost = "h"\n[[device]]\nname = "k"\nhost = "k"\n[[link]]\nbetween = ["h", "k"]\n'
    (reader.folder / "cluster.toml").write_text(f"{slow}latency_us = 100.0\nbytes_per_s = 1e6\n")
    reader.follow("console", pages.block_of("docs/cutting.md", "$ onnxsplit partition"))


def test_the_devices_and_links_of_the_page_make_a_cluster(tmp_path):
    text = pages.block_of("docs/cutting.md", "[[device]]")
    (tmp_path / "cluster.toml").write_text(f'{text}\n[[device]]\nname = "small"\nhost = "host-b"\n')
    cluster = load_cluster(tmp_path / "cluster.toml")
    assert [device.name for device in cluster.devices] == ["big", "small"]


def test_the_decisions_about_a_decoder_are_read(tmp_path):
    text = pages.block_of("docs/decoders.md", 'scores = "logits"')
    (tmp_path / "decoder.toml").write_text(text)
    override = read_override(tmp_path / "decoder.toml")
    assert (override.tokens, override.end_tokens) == ("input_ids", (2,))
    assert (override.states[0].kind, override.controls[0].input) == ("append", "use_cache_branch")


def test_a_way_to_run_a_model_is_found(tmp_path, monkeypatch):
    build.save(build.chain(8, 64), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(advise._LOADS, "quick", {"turns": 1, "closed_s": 0.2, "open_s": 0.2, "steps": 2})
    ((_, command),) = pages.commands(pages.block_of("docs/advise.md", "$ onnxsplit advise"))
    done = CliRunner().invoke(cli, [*command.split()[1:], "--effort", "quick"])
    assert done.exit_code == 0, done.output


def test_the_p99_is_predicted_by_the_formula_of_the_page():
    formula = pages.block_of("docs/advise.md", "p99 = ").replace("time of one request alone", "alone")
    run_ns, replicas, per_s = 2_000_000, 1, 400.0  # one replica is busy, and makes a request wait, for a share a
    names = {"alone": 0, "S": run_ns, "c": replicas, "a": per_s * run_ns / 1e9, "ln": math.log}
    names["C"] = names["a"]
    assert math.isclose(eval(formula.removeprefix("p99 = "), names), waiting_ns(0.01, run_ns, replicas, per_s))


def test_settings_are_read_from_the_file_and_reach_the_server(reader):
    text = pages.block_of("docs/serving.md", "[serve]")
    (reader.folder / settings.FILE).write_text(text)
    assert settings.read(reader.folder / settings.FILE)["serve"]["max_batch"] == 8
    partition(build.save(build.chain(), reader.folder), stages=2, out=reader.folder / "model.plan", costs="analytic")
    reader.follow("console", pages.block_of("docs/serving.md", "$ onnxsplit serve model.plan"))
    wait_until(
        lambda: any("max-batch = 8 (onnxsplit.toml)" in line for line in reader.server.log), "the log of a setting"
    )


def test_a_range_of_replicas_starts_with_the_least(reader):
    partition(build.save(build.chain(), reader.folder), stages=2, out=reader.folder / "model.plan", costs="analytic")
    block = pages.block_of("docs/running.md", "from onnxsplit import Pipeline, ReplicaRange")
    reader.follow("python", block)
    assert reader.said.strip() == re.search(r"# (.+):", block)[1]


def test_a_run_leaves_a_timeline(reader):
    partition(build.save(build.chain(), reader.folder), stages=2, out=reader.folder / "model.plan", costs="analytic")
    reader.follow("console", pages.block_of("docs/running.md", "$ onnxsplit run"))
    assert json.loads((reader.folder / "trace.json").read_text())
