"""The contract between the halves: plan.json in and out, and everything that must be refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import jsonschema
import msgspec
import pytest

import onnxsplit
from onnxsplit.errors import PlanError
from onnxsplit.plan import Plan, load_plan, parse_plan, plan_schema

GOLDEN = Path(__file__).with_name("golden_plan.json")
SCHEMA = Path(onnxsplit.__file__).with_name("plan.schema.json")


def golden(**changes) -> dict:
    return {**msgspec.json.decode(GOLDEN.read_bytes()), **changes}


def refuse(plan: dict) -> str:
    with pytest.raises(PlanError) as refused:
        parse_plan(msgspec.json.encode(plan), where=Path("p"))
    return str(refused.value)


def test_the_golden_plan_comes_back_as_it_went():
    plan = parse_plan(GOLDEN.read_bytes(), where=GOLDEN)
    assert plan.to_json() == GOLDEN.read_bytes()
    assert plan.check() == []


def test_the_schema_in_the_package_is_the_code_s():
    assert SCHEMA.read_bytes() == plan_schema()


def test_the_golden_plan_fits_the_schema():
    jsonschema.validate(golden(), msgspec.json.decode(SCHEMA.read_bytes()))


def test_fields_of_a_later_version_are_ignored():
    plan = parse_plan(msgspec.json.encode(golden(something_new=1)), where=GOLDEN)
    assert isinstance(plan, Plan)


def test_a_newer_format_is_refused_with_what_to_do():
    assert "Upgrade onnxsplit" in refuse(golden(format_version=2))


@pytest.mark.parametrize("name", ["../evil.onnx", "/etc/passwd", "a/b.onnx", "", "..", "plan.json", "a\\b"])
def test_a_file_outside_the_folder_is_refused(name):
    plan = golden()
    plan["stages"][0]["file"] = plan["stages"][0]["files"][0]["name"] = name
    assert "not a plain name" in refuse(plan)


def test_every_violation_is_named_at_once():
    plan = golden(outputs=["nowhere"])
    plan["stages"][1]["inputs"] = ["missing"]
    message = refuse(plan)
    assert "'missing'" in message
    assert "'nowhere' comes from nowhere" in message


def test_a_cycle_of_stages_is_refused():
    plan = golden()
    first, second = plan["stages"]
    first["inputs"] = second["outputs"]
    assert "neither an earlier stage nor the caller gives" in refuse(plan)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"format_version": "x"}', b"\xff\xfe", b'{"format_version": 1, "model": "\xff"}'],
)
def test_damaged_json_is_refused(text):
    with pytest.raises(PlanError, match="damaged"):
        parse_plan(text, where=Path("p"))


def test_a_changed_file_is_refused(chain_plan, tmp_path):
    copy = shutil.copytree(chain_plan, tmp_path / "copy")
    stage = copy / "stage0.onnx"
    stage.write_bytes(stage.read_bytes()[:-1] + b"\0")
    with pytest.raises(PlanError, match=r"stage0.onnx: its SHA-256 is not the plan's"):
        load_plan(copy)


def test_a_missing_file_and_a_link_are_refused(chain_plan, tmp_path):
    copy = shutil.copytree(chain_plan, tmp_path / "copy")
    (copy / "stage0.onnx").unlink()
    (copy / "stage1.onnx").rename(copy / "real.onnx")
    (copy / "stage1.onnx").symlink_to("real.onnx")
    with pytest.raises(PlanError, match=r"(?s)stage0.onnx: missing.*stage1.onnx: is a link"):
        load_plan(copy)


def test_a_folder_without_a_plan_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match="onnxsplit partition MODEL"):
        load_plan(tmp_path)


def test_a_moved_plan_works(chain_plan, tmp_path):
    assert load_plan(shutil.copytree(chain_plan, tmp_path / "elsewhere")) == load_plan(chain_plan)
