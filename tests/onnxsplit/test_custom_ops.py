import hashlib
import os
import subprocess
import sys
from pathlib import Path

import build
import custom
import msgspec.structs
import numpy as np
import onnx
import pytest
from onnx import helper

import onnxsplit
from onnxsplit import custom_ops
from onnxsplit.custom_ops import (
    EXTENSIONS,
    Library,
    check_names,
    check_wanted,
    find_libraries,
    needed_libraries,
    unchanged,
)
from onnxsplit.errors import CustomOpsError, ModelRefused
from onnxsplit.model.graph import build_graph
from onnxsplit.model.source import open_model
from onnxsplit.plan import CustomOps
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_files import load_plan
from onnxsplit.session import open_session
from onnxsplit.stages.verify import run_stages, verify

TEXT = {"text": np.array(["a model runs cuts"], dtype=object)}


@pytest.fixture(scope="module")
def extensions() -> Library:
    return custom.extensions()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tuple[Path, Path]:
    """A model with custom ops at both ends, and its plan of three stages."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = build.save(custom.tokenizer(), folder)
    onnxsplit.partition(model, stages=3, out=folder / "plan", custom_ops=[EXTENSIONS], inputs=TEXT, rounds=1)
    return model, folder / "plan"


def graph_of(proto: onnx.ModelProto, folder: Path):
    return build_graph(open_model(build.save(proto, folder)))


def whole(model: Path, inputs, library: Library) -> dict[str, np.ndarray]:
    """The outputs of plain ONNX Runtime for the whole model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(library.path)
    session = onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))


# Naming libraries


def test_the_library_of_the_package_is_the_one_the_package_names(extensions):
    code = "import onnxruntime_extensions as e; print(e.get_library_path())"
    named = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(named).samefile(extensions.path)
    assert extensions.sha256 == hashlib.sha256(Path(named).read_bytes()).hexdigest()
    assert extensions.name == EXTENSIONS


def test_naming_a_library_does_not_load_it():
    code = (
        "import sys; from onnxsplit.custom_ops import find_libraries; find_libraries('onnxruntime-extensions'); "
        "print('_extensions_pydll' in open('/proc/self/maps').read(), 'onnxruntime_extensions' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_a_library_is_known_once_however_often_it_is_named(extensions, tmp_path):
    link = tmp_path / "link.so"
    link.symlink_to(extensions.path)
    found = find_libraries([EXTENSIONS, extensions.path, link])
    assert [library.sha256 for library in found] == [extensions.sha256]


@pytest.mark.parametrize("given", [None, 7, [7], b"x.so", {"a": 1}.items()])
def test_what_names_no_libraries_is_refused(given):
    with pytest.raises(CustomOpsError, match="named by their files, in a list"):
        find_libraries(given)


@pytest.mark.parametrize("name", ["", "a\udcff.so"])
def test_names_that_are_empty_or_no_text_are_refused(name):
    with pytest.raises(CustomOpsError, match="is empty or not UTF-8 text"):
        find_libraries([name])


def test_files_that_are_no_regular_ones_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.so")
    with pytest.raises(CustomOpsError, match=r"no such custom op library: .*missing\.so"):
        find_libraries(tmp_path / "missing.so")
    with pytest.raises(CustomOpsError, match="it is a FIFO"):
        find_libraries(tmp_path / "fifo.so")
    with pytest.raises(CustomOpsError, match="it is a folder"):
        find_libraries(tmp_path)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(custom_ops, "_PACKAGE", "no_such_package")
    with pytest.raises(CustomOpsError, match="pip install onnxruntime-extensions"):
        find_libraries(EXTENSIONS)


def test_two_libraries_of_one_name_are_refused_for_a_new_plan(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "libops.so").write_bytes(folder.encode())
    with pytest.raises(CustomOpsError, match=r"two custom op libraries are called 'libops\.so'"):
        check_names(find_libraries([tmp_path / "a/libops.so", tmp_path / "b/libops.so"]))


# Loading them


def test_a_library_that_changed_since_it_was_named_is_not_loaded(tmp_path):
    model = build.save(custom.lengths(), tmp_path)
    file = custom.other_build(tmp_path)
    (library,) = find_libraries(file)
    with file.open("ab") as stream:
        stream.write(b"changed")
    with pytest.raises(CustomOpsError, match="was changed after it was named"):
        open_session(model, threads=1, custom_ops=[library])


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
def test_a_library_that_changes_while_it_is_loaded_is_refused(how, tmp_path):
    file = custom.other_build(tmp_path)
    content = file.read_bytes()
    (library,) = find_libraries(file)

    def change() -> None:
        if how == "replaced":
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").rename(file)
        elif how == "written to":
            file.write_bytes(content)
        else:
            file.unlink()

    with pytest.raises(CustomOpsError, match="was changed while it was loaded"), unchanged(library):
        change()


def test_a_library_finds_what_it_needs_beside_its_own_file_also_behind_a_link(tmp_path):
    """Wheels put the libraries that a library needs into a folder beside its own."""
    (tmp_path / "real").mkdir()
    (tmp_path / "libops.so").symlink_to(custom.other_build(tmp_path / "real", "libops.so.1"))
    (library,) = find_libraries(tmp_path / "libops.so")
    assert (library.name, library.path) == ("libops.so", str(tmp_path / "real" / "libops.so.1"))


def test_what_is_no_library_of_custom_ops_is_said_by_its_own_path(tmp_path):
    model = build.save(custom.lengths(), tmp_path)
    (tmp_path / "text.so").write_text("no library")
    (tmp_path / "none.so").write_bytes(Path(sys.modules["_ctypes"].__file__).read_bytes())
    for name, why in (("text.so", "text.so: "), ("none.so", "undefined symbol: RegisterCustomOps")):
        with pytest.raises(CustomOpsError, match=f"{name} does not load: .*{why}"):
            open_session(model, threads=1, custom_ops=find_libraries(tmp_path / name))


def test_a_library_that_does_not_load_ends_a_partition(tmp_path):
    model = build.save(custom.lengths(), tmp_path)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ModelRefused, match=r"text\.so does not load"):
        onnxsplit.partition(model, out=tmp_path / "plan", custom_ops=[tmp_path / "text.so"])
    assert not (tmp_path / "plan").exists()


def test_a_library_that_kills_its_process_ends_a_partition_and_is_named(tmp_path, monkeypatch):
    """There must be no plan by analytic costs, because no process could run it."""
    model = build.save(custom.lengths(), tmp_path)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    start = subprocess.Popen
    monkeypatch.setattr("onnxsplit.timed.subprocess.Popen", lambda _, **how: start([sys.executable, "-c", kill], **how))
    with pytest.raises(ModelRefused, match=r"libops\.so: the process was killed by SIGABRT"):
        onnxsplit.partition(model, out=tmp_path / "plan", custom_ops=[custom.other_build(tmp_path)])


def test_without_a_library_the_option_that_names_one_is_told(tmp_path):
    model = build.save(custom.lengths(), tmp_path)
    with pytest.raises(ModelRefused, match=r"StringUpper.*--custom-ops FILE\.so"):
        onnxsplit.partition(model, out=tmp_path / "plan")


# Which ops are custom


def test_ops_are_custom_by_their_domain_also_inside_bodies_and_functions(tmp_path):
    def custom_types(proto):
        graph = graph_of(proto, tmp_path)
        return [graph.ops[index].op_type for index in sorted(graph.custom_ops)]

    assert custom_types(build.chain()) == []
    assert custom_types(build.with_if()) == []
    assert custom_types(custom.lengths()) == ["StringUpper", "StringLength"]
    assert custom_types(custom.in_a_body()) == ["If"]
    inner = [custom.op("NegPos", ["a"], ["b", "c"])]
    imports = [helper.make_opsetid("", build.OPSET), helper.make_opsetid(custom.DOMAIN, 1)]
    function = helper.make_function("local", "F", ["a"], ["b"], inner, imports)
    plain = helper.make_function("local", "G", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports[:1])
    called = build.model(
        [helper.make_node("F", ["x"], ["h"], domain="local"), helper.make_node("G", ["h"], ["y"], domain="local")],
        [build.value("x", [4])],
        [build.value("y", [4])],
        functions=[function, plain],
        opsets={"": build.OPSET, "local": 1, custom.DOMAIN: 1},
    )
    assert custom_types(called) == ["F"]


def test_ops_that_onnx_runtime_adds_are_not_custom_and_unknown_standard_ones_are(tmp_path):
    nodes = [
        helper.make_node("Gelu", ["x"], ["a"], domain="com.microsoft"),
        helper.make_node("Normalizer", ["a"], ["b"], domain="ai.onnx.ml"),
        helper.make_node("Relu", ["b"], ["c"], domain="ai.onnx"),
        helper.make_node("NobodyHasThis", ["c"], ["y"]),
    ]
    graph = graph_of(build.model(nodes, [build.value("x", [4])], [build.value("y", [4])]), tmp_path)
    assert [graph.ops[index].op_type for index in graph.custom_ops] == ["NobodyHasThis"]


def test_a_custom_op_on_constants_is_not_copied_into_stages_as_a_constant_is(tmp_path):
    nodes = [custom.op("NegPos", ["w"], ["n", "p"]), helper.make_node("MatMul", ["x", "p"], ["y"])]
    weight = build.constant("w", np.eye(4, dtype=np.float32))
    graph = graph_of(custom.made(nodes, [build.value("x", [4, 4])], [build.value("y", [4, 4])], [weight]), tmp_path)
    assert not graph.constant_ops


# Plans


def test_only_stages_with_custom_ops_need_the_library(tokenizer, extensions):
    plan = load_plan(tokenizer[1])
    assert plan.custom_ops == (CustomOps(name=EXTENSIONS, sha256=extensions.sha256),)
    assert [stage.custom_ops for stage in plan.stages] == [(EXTENSIONS,), (), (EXTENSIONS,)]
    assert str(Path(extensions.path).parent) not in (tokenizer[1] / "plan.json").read_text()


def test_the_stages_give_what_the_whole_model_gives(tokenizer, extensions):
    model, folder = tokenizer
    expected = whole(model, TEXT, extensions)
    found = run_stages(folder, load_plan(folder), TEXT, threads=1, level="disabled", custom_ops=[extensions])
    for name, array in expected.items():
        assert np.array_equal(found[name], array)
    assert all(one.good for one in verify(folder, model, custom_ops=EXTENSIONS))


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("kind", ["lengths", "in_a_body"])
def test_custom_ops_on_borders_and_in_bodies(kind, stages, tmp_path, extensions):
    model = build.save(getattr(custom, kind)(), tmp_path)
    plan = onnxsplit.partition(model, stages=stages, out=tmp_path / "plan", custom_ops=[EXTENSIONS], rounds=1)
    assert len(plan.stages) == stages
    inputs = {
        "lengths": {"s": np.array(["ab", "xyz", ""], dtype=object)},
        "in_a_body": {"x": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)},
    }[kind]
    found = run_stages(tmp_path / "plan", plan, inputs, threads=1, level="disabled", custom_ops=[extensions])
    for name, array in whole(model, inputs, extensions).items():
        assert np.array_equal(found[name], array)


def test_stages_and_the_merged_model_pass_the_checker_of_onnx(tokenizer, tmp_path):
    from onnxsplit.stages.merge import merge

    _, folder = tokenizer
    for stage in load_plan(folder).stages:
        onnx.checker.check_model(str(folder / stage.file))
    merge(folder, tmp_path / "merged.onnx")
    onnx.checker.check_model(str(tmp_path / "merged.onnx"))


def test_what_a_custom_op_writes_gives_the_ranks_of_what_follows(tokenizer):
    """Inference does not know the rank of the tokens, nor of the tensors computed from them."""
    plan = load_plan(tokenizer[1])
    crossing = {cut.tensor: plan.tensors[cut.tensor] for cut in plan.cuts}
    assert all(spec.shape is not None for spec in crossing.values())
    assert any(spec.dtype == "float32" and spec.shape[-1] == 16 for spec in crossing.values())


def test_analytic_costs_load_nothing_and_record_the_library(tmp_path):
    model = build.save(custom.lengths(), tmp_path)
    (tmp_path / "text.so").write_text("not a library, and not read")
    plan = onnxsplit.partition(
        model, stages=2, out=tmp_path / "plan", costs="analytic", custom_ops=tmp_path / "text.so"
    )
    assert [library.name for library in plan.custom_ops] == ["text.so"]


def test_libraries_that_no_op_tells_of_are_needed_by_every_stage(tmp_path):
    model = build.save(build.chain(), tmp_path)
    plan = onnxsplit.partition(
        model, stages=2, out=tmp_path / "plan", custom_ops=[custom.other_build(tmp_path)], costs="analytic"
    )
    assert [stage.custom_ops for stage in plan.stages] == [("libops.so",)] * 2


# Libraries that a plan needs, and those that were given


def test_a_library_is_known_by_its_hash_whatever_it_is_called(tokenizer, extensions, tmp_path):
    renamed = tmp_path / "renamed.so"
    renamed.write_bytes(Path(extensions.path).read_bytes())
    (library,) = find_libraries(renamed)
    plan = load_plan(tokenizer[1])
    assert needed_libraries([library], plan) == (library,)
    assert needed_libraries([library], plan, 1) == needed_libraries([], plan, 1) == ()


def test_a_plan_without_its_library_names_it_what_was_given_and_the_option(tokenizer, tmp_path):
    plan = load_plan(tokenizer[1])
    with pytest.raises(CustomOpsError, match=r"needs .*'onnxruntime-extensions' .*given: none.*add --custom-ops onnxr"):
        needed_libraries([], plan)
    (other,) = find_libraries(custom.other_build(tmp_path))
    with pytest.raises(CustomOpsError, match=rf"stage 0 of the plan needs .*given: .*libops.so .*{other.sha256[:12]}"):
        needed_libraries([other], plan, 0)


def test_another_build_of_a_library_is_refused_with_what_to_do(tokenizer, tmp_path):
    model, folder = tokenizer
    other = custom.other_build(tmp_path, EXTENSIONS)
    with pytest.raises(CustomOpsError, match=r"is another build of it .*cut the model again"):
        verify(folder, model, custom_ops=[other])


def test_libraries_that_the_plan_does_not_name_are_refused(tokenizer, tmp_path):
    model, folder = tokenizer
    other = custom.other_build(tmp_path)
    with pytest.raises(CustomOpsError, match=r"does not name the custom op library .*libops.so"):
        verify(folder, model, custom_ops=[EXTENSIONS, other])
    plain = msgspec.structs.replace(load_plan(folder), custom_ops=())
    with pytest.raises(CustomOpsError, match="it names: none"):
        check_wanted(find_libraries(other), [plain])


def test_verify_loads_nothing_that_only_the_plan_names(tokenizer):
    model, folder = tokenizer
    code = (
        "import sys; from onnxsplit.stages.verify import verify\n"
        "try: verify(sys.argv[1], sys.argv[2])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print('extensions' in open('/proc/self/maps').read())"
    )
    said = subprocess.run([sys.executable, "-c", code, folder, model], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["CustomOpsError", "False"]


@pytest.mark.parametrize(
    ("libraries", "stages", "problem"),
    [
        ([{"name": "../evil.so", "sha256": "0" * 64}], [], "not named by a plain file name"),
        ([{"name": "", "sha256": "0" * 64}], [], "not named by a plain file name"),
        ([{"name": "a.so", "sha256": "xyz"}], [], "no valid SHA-256"),
        ([{"name": "a.so", "sha256": "0" * 64}, {"name": "a.so", "sha256": "1" * 64}], [], "listed twice"),
        ([], ["b.so"], "needs the custom op library 'b.so', which the plan does not list"),
    ],
)
def test_plans_with_bad_libraries_are_refused(tokenizer, libraries, stages, problem):
    plan = load_plan(tokenizer[1])
    first = msgspec.structs.replace(plan.stages[0], custom_ops=tuple(stages))
    bare = [msgspec.structs.replace(stage, custom_ops=()) for stage in plan.stages[1:]]
    changed = msgspec.structs.replace(
        plan, custom_ops=tuple(CustomOps(**library) for library in libraries), stages=(first, *bare)
    )
    assert any(problem in found for found in plan_problems(changed))
