"""The contract between the packages: plan.json is written and read, and invalid plans are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import jsonschema
import msgspec
import pytest

import onnxsplit
from onnxsplit.errors import PlanError
from onnxsplit.plan import Plan
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_files import checked_json, load_plan, parse_plan, plan_schema

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
    assert plan_problems(plan) == []


def test_the_schema_in_the_package_is_the_code_s():
    def sorted_choices(schema):
        """Sort a field's alternatives, whose order differs between versions of msgspec."""
        if isinstance(schema, dict):
            found = {key: sorted_choices(value) for key, value in schema.items()}
            return found | {"anyOf": sorted(found["anyOf"], key=str)} if "anyOf" in found else found
        return [sorted_choices(value) for value in schema] if isinstance(schema, list) else schema

    written, made = (msgspec.json.decode(content) for content in (SCHEMA.read_bytes(), plan_schema()))
    assert sorted_choices(written) == sorted_choices(made)


def test_the_golden_plan_fits_the_schema():
    jsonschema.validate(golden(), msgspec.json.decode(SCHEMA.read_bytes()))


def test_fields_of_a_later_version_are_ignored():
    plan = parse_plan(msgspec.json.encode(golden(something_new=1)), where=GOLDEN)
    assert isinstance(plan, Plan)


def test_a_newer_format_is_refused_with_what_to_do():
    assert "Upgrade onnxsplit" in refuse(golden(format_version=2))


def changed(path: str, value: object) -> dict:
    """The golden plan with one value changed, as in ``stages.0.replicas``."""
    plan = golden()
    *way, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inside = plan
    for part in way:
        inside = inside[part]
    inside[last] = value
    return plan


INTEGERS = [
    "format_version", "model.ir_version", "model.opsets.", "dims.batch",
    "stages.0.index", "stages.0.replicas", "stages.0.threads", "stages.0.weight_bytes", "stages.0.peak_memory_bytes",
    "stages.0.predicted_time_ns", "stages.0.measured_time_ns", "stages.0.reference_time_ns", "stages.0.ops",
    "stages.0.files.0.size_bytes", "example_inputs.size_bytes",
    "tensors.x.batch_axis", "tensors.x.shape.1",
    "cuts.0.from_stage", "cuts.0.to_stages.0", "cuts.0.bytes", "outputs_need.y.1",
    "prediction.bottleneck_ns", "prediction.latency_ns", "prediction.lower_bound_ns", "prediction.op_lower_bound_ns",
    "prediction.peak_memory_bytes", "prediction.lower_bound_bytes", "prediction.throughput_per_s", "prediction.gap",
    "costs.whole_time_ns", "costs.whole_weight_bytes", "costs.whole_peak_memory_bytes",
]  # fmt: skip


@pytest.mark.parametrize("path", INTEGERS)
@pytest.mark.parametrize("value", [-1, 2**63, 2**70, 10**400, True, [1]])
def test_every_number_of_a_plan_has_bounds(path, value):
    assert refuse(changed(path, value))


def test_every_integer_of_the_schema_has_bounds():
    """New fields must have bounds, too."""
    unbounded = []

    def walk(node, where):
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number") and "minimum" not in node:
                unbounded.append(where)
            for key, value in node.items():
                walk(value, f"{where}.{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                walk(value, f"{where}.{number}")

    walk(msgspec.json.decode(SCHEMA.read_bytes()), "")
    assert unbounded == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("stages.0.replicas", 10**6, r"<= 255 - at `\$.stages\[0\].replicas`"),
        ("stages.0.replicas", 0, r">= 1 - at"),
        ("stages.0.replicas", 255, "the stages have 256 replicas together; at most 255 are allowed"),
        ("stages.0.threads", 1025, "<= 1024"),
        ("tensors.x.batch_axis", 99, "<= 63"),
        ("tensors.x.batch_axis", 2, "tensor 'x' has the batch axis 2 and 2 dimensions"),
        ("format_version", 0, ">= 1"),
        ("cuts.0.from_stage", 1, "cut 'h1' is not an output of stage 1"),
        ("cuts.0.to_stages", [0], "cut 'h1' is not an input of stage 0"),
        ("cuts.0.to_stages", [7], "cut 'h1' is not an input of stage 7"),
        ("outputs_need.y", [0, 7], "output 'y' needs the stages"),
        ("stages.0.devices", ["a", "b"], "stage 0 names 2 devices for 1 replicas"),
        ("stages.0.files.0.sha256", "g" * 64, "expected 64 hexadecimal digits"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_is_allowed(path, value, words):
    with pytest.raises(PlanError, match=words):
        parse_plan(msgspec.json.encode(changed(path, value)), where=Path("p"))


@pytest.mark.parametrize(
    "text",
    [
        b'{"format_version": 1, "later": ' + b"[" * 1_000_000,
        b'{"format_version": 1, "later": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version": ' + b"9" * 5_000 + b"}",
        b'{"format_version": 1e999}',
        b'{"format_version": NaN}',
        b'{"format_version": 1, "strategy": "\\ud800"}',
        '{"format_version": 1}'.encode("utf-16"),
    ],
)
def test_json_that_nests_or_counts_without_end_is_refused(text):
    with pytest.raises(PlanError, match="damaged"):
        parse_plan(text, where=Path("p"))


def test_a_plan_file_of_any_size_is_not_read(tmp_path):
    with (tmp_path / "plan.json").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(PlanError, match="at most 67108864 are allowed"):
        load_plan(tmp_path)
    with pytest.raises(PlanError, match="at most 67108864 are allowed"):
        parse_plan(bytes((64 << 20) + 1), where=tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_plan_that_could_not_be_read_back_is_not_written(value):
    plan = parse_plan(GOLDEN.read_bytes(), where=GOLDEN)
    strange = msgspec.structs.replace(plan, prediction=msgspec.structs.replace(plan.prediction, gap=value))
    with pytest.raises(PlanError, match="it was not written"):
        checked_json(strange)


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
    assert "'nowhere' has no source" in message


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


def test_names_of_any_length_make_short_messages():
    """Before, names of 100,000 characters made messages of 300 KB."""
    long = "n" * 100_000
    plan = golden()
    plan["stages"][0]["inputs"] = [f"{long}{number}" for number in range(30)]
    said = refuse(plan)
    assert len(said) < 10_000
    assert "which neither an earlier stage nor the caller gives" in said
    assert "more" in said.splitlines()[-1]
    plan = golden()
    plan["stages"][0]["optimization_level"] = long
    assert len(refuse(plan)) < 1000


def test_a_plan_from_before_the_field_defaults_is_read():
    plan = golden()
    for name in ("defaults", "constant_inputs", "dropped_outputs", "dropped_inputs"):
        del plan[name]
    found = parse_plan(msgspec.json.encode(plan), where=Path("plan"))
    assert (found.defaults, found.constant_inputs, found.dropped_outputs, found.dropped_inputs) == ({}, {}, (), ())


def test_a_default_of_an_unknown_input_is_refused():
    entry = {"name": "default0.npz", "sha256": "0" * 64, "size_bytes": 1}
    given = golden()["inputs"][0]
    message = refuse(golden(defaults={"nothing": entry}, constant_inputs={given: "1.0"}))
    assert "'nothing' has a default and is not an input" in message
    assert f"input {given!r} is a constant, or was left out" in message
