"""A model where a plan belongs, a plan where a model belongs, and other things in their places."""

from __future__ import annotations

import shutil

import build
import click
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from onnxsplit import load_plan
from onnxsplit.cli import cli
from onnxsplit.cli.values import StageCountParam, TokensParam
from onnxsplit.errors import ExportError, ModelError, PlanError
from onnxsplit.export import export
from onnxsplit.model.source import open_model
from onnxsplit.npz import save_npz
from onnxsplit.plan_files import example_file
from onnxsplit.stages.verify import verify
from runtime.errors import PipelineError
from runtime.wire.security import Security, check_address


@pytest.fixture
def folder(tmp_path, monkeypatch, chain_plan):
    """A folder with a model, a plan, versions of a plan, and tensors."""
    monkeypatch.chdir(tmp_path)
    build.save(build.chain(), tmp_path)
    build.save(build.chain(), tmp_path, "it's a model")
    (tmp_path / "models").mkdir()
    build.save(build.chain(), tmp_path / "models")
    (tmp_path / "empty").mkdir()
    save_npz(tmp_path / "in.npz", {"x": np.ones((1, 32), np.float32)})
    for name in ("m.plan", "versions/1", "versions/2", "named/a.plan"):
        shutil.copytree(chain_plan, tmp_path / name)
    return tmp_path


NOT_PLANS = {
    "model.onnx": "it is a model. Make a plan of it: onnxsplit partition model.onnx",
    "it's a model": """it is a model. Make a plan of it: onnxsplit partition 'it'"'"'s a model'""",
    "in.npz": "it holds tensors (.npz), as --inputs takes them. Name the folder of a plan",
    "m.plan/stage0.onnx": "it is a file of the plan m.plan. Name the folder: m.plan",
    "m.plan/plan.json": "it is a file of the plan m.plan. Name the folder: m.plan",
    "m.plan/example.npz": "it is a file of the plan m.plan. Name the folder: m.plan",
    "models": "it holds the models 'model.onnx'. Make a plan of one: onnxsplit partition models/model.onnx",
    "versions": "it holds the plans '1', '2'. Name one of them, such as versions/1; serve takes the folder",
    "named": "it holds the plans 'a.plan'. Name one of them, such as named/a.plan",
    "empty": "it has no plan.json. Make one with: onnxsplit partition MODEL",
    "absent": "it is missing. Make one with: onnxsplit partition MODEL",
}


@pytest.mark.parametrize("name", NOT_PLANS)
def test_what_is_no_plan_is_named_with_what_to_do(folder, name):
    with pytest.raises(PlanError) as refused:
        load_plan(name)
    assert str(refused.value).startswith(f"{name} is not a plan directory: {NOT_PLANS[name]}")


def test_what_is_no_model_is_named_with_what_to_do(folder):
    with pytest.raises(
        ModelError, match=r"Run it: onnxsplit run m\.plan, or onnxsplit serve m\.plan\..* m\.plan MODEL"
    ):
        open_model("m.plan")
    with pytest.raises(ModelError, match=r"the plan\.json of a plan directory\. Run the plan: onnxsplit run m\.plan"):
        open_model("m.plan/plan.json")
    with pytest.raises(ModelError, match=r"in\.npz is not an ONNX model: it is NumPy arrays"):
        open_model("in.npz")
    open_model("m.plan/stage0.onnx")  # a stage is a model, too


@pytest.mark.parametrize(
    ("source", "words"),
    [("m.plan", "onnxsplit verify m.plan MODEL"), ("models", "'model.onnx'"), ("in.npz", "NumPy arrays")],
)
def test_what_cannot_be_exported_is_named(folder, source, words):
    with pytest.raises(ExportError, match=f"{source} cannot be exported: it is .*{words}"):
        export(source, "out.onnx")


def test_a_model_and_a_plan_in_the_wrong_order_are_named_in_the_right_one(folder):
    with pytest.raises(PlanError, match=r"Name the plan first: onnxsplit verify m\.plan model\.onnx"):
        verify("model.onnx", "m.plan")


def test_a_plan_without_example_inputs_says_what_to_give(folder):
    plan = load_plan("m.plan")
    plan = msgspec.structs.replace(plan, example_inputs=None)
    with pytest.raises(PlanError, match=r"--inputs FILE\.npz, which holds 'x': float32 \[batch, 32\]$"):
        example_file(folder / "m.plan", plan)


@pytest.mark.parametrize("given", [True, False])
def test_run_says_when_it_takes_the_example_inputs(folder, given):
    done = CliRunner().invoke(cli, ["run", "m.plan", *(["--inputs", "in.npz"] if given else [])])
    assert done.exit_code == 0, done.output
    told = "The inputs were the plan's example inputs (m.plan/example.npz); give others with --inputs FILE.npz"
    assert (told in done.output) is not given


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("10.0.0.1:5555", "tcp://10.0.0.1:5555"),
        ("localhost:*", "tcp://localhost:*"),
        ("[::1]:5", "tcp://[::1]:5"),
        ("/tmp/socket", "ipc:///tmp/socket"),
    ],
)
def test_an_address_without_a_scheme_is_answered_with_the_one_to_write(address, written):
    with pytest.raises(PipelineError) as refused:
        check_address(address, Security(insecure=True))
    assert str(refused.value).endswith(f"has no scheme; write {written}")
    check_address(written, Security(insecure=True))


@pytest.mark.parametrize("address", ["host", "host:99999", "http://host:1", ":5"])
def test_another_address_is_answered_with_the_forms_that_there_are(address):
    with pytest.raises(PipelineError, match="expected tcp://HOST:PORT"):
        check_address(address, Security(insecure=True))


def test_an_agent_without_a_scheme_is_answered_with_the_address_to_write(folder):
    done = CliRunner().invoke(cli, ["cluster", "measure", "model.onnx", "--agent", "b=10.0.0.2:7000"])
    assert (done.exit_code, "has no scheme; write b=tcp://10.0.0.2:7000" in done.output) == (2, True)


@pytest.mark.parametrize(("text", "port"), [("off", None), ("OFF", None), ("Off", None), ("0", 0), ("8001", 8001)])
def test_the_port_of_grpc_is_a_number_or_off(text, port):
    serve = cli.get_command(click.Context(cli), "serve")
    assert serve.make_context("serve", ["m.plan", "--grpc-port", text]).params["grpc_port"] == port


@pytest.mark.parametrize("text", ["no", "-1", "65536", "80.5", "offf"])
def test_another_port_of_grpc_is_refused_with_what_is_allowed(text):
    serve = cli.get_command(click.Context(cli), "serve")
    with pytest.raises(click.BadParameter, match="is not a port; allowed: 0 to 65535, or off"):
        serve.make_context("serve", ["m.plan", f"--grpc-port={text}"])


def test_other_words_for_values_may_be_in_upper_case():
    assert StageCountParam().convert("AUTO", None, None) == "auto"
    assert TokensParam(none=True).convert("None", None, None) == ()
    partition = cli.get_command(click.Context(cli), "partition")
    for text, value in (("OFF", "off"), ("Auto", "auto"), ("Claims.toml", "Claims.toml")):
        assert partition.make_context("partition", ["m.onnx", "--decoder", text]).params["decoder"] == value


RECIPE = (
    "import math\nfrom json import loads\nclass Net: pass\ndef small(): pass\ndef large(): pass\ndef _own(): pass\n"
)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "recipe.py",
            "has no function 'build'; it has small, large, Net. Name one: onnxsplit export recipe.py:small -o",
        ),
        (
            "recipe.py:larg",
            "has no function 'larg'; it has small, large, Net. Name one: onnxsplit export recipe.py:large",
        ),
        ("none.py", "it defines no function. Write one that returns the model, and name it: none.py:FUNCTION"),
    ],
)
def test_a_recipe_without_the_function_is_answered_with_those_that_it_has(folder, source, words):
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "none.py").write_text("from json import loads\n")
    with pytest.raises(ExportError) as refused:
        export(source, "out.onnx")
    assert words in str(refused.value)
