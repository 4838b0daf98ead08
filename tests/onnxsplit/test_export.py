"""Models of all frameworks are exported, compared with the framework, cut in two, and compared with the whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import build
import frameworks
import numpy as np
import onnx
import pytest

from onnxsplit.errors import ExportError, MissingDependency, PartitionError
from onnxsplit.export import Exported, export
from onnxsplit.export.conversion import TOLERANCE
from onnxsplit.export.finish import FRAMEWORK, SOURCE
from onnxsplit.export.sources import recognise
from onnxsplit.export.specs import InputSpec, parse_spec, samples
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify
from runtime import Pipeline

MODELS = Path(__file__).parents[2] / "models"
SMALL = {
    "resnet50": {"blocks": (1, 1, 1, 1), "width": 8, "size": 32, "classes": 10},
    "bert": {"layers": 2, "width": 32, "heads": 2, "vocabulary": 100, "positions": 32, "sequence": 16},
    "gpt2": {"layers": 2, "width": 32, "heads": 2, "vocabulary": 100, "positions": 32, "sequence": 16},
    "inception": {"blocks": 2, "width": 8, "size": 32, "classes": 10},
    "multitask": {"depth": 1, "width": 8, "size": 32, "classes": 5},
}
FREE = {"bert": {"batch", "sequence"}, "gpt2": {"batch", "sequence"}}

# Warnings that frameworks cause themselves are ignored.
pytestmark = pytest.mark.filterwarnings("ignore")


def free(model: onnx.ModelProto) -> set[str]:
    return {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}


def needs(*packages: str):
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; make test-export installs all")


@pytest.mark.parametrize("name", list(SMALL))
def test_a_recipe_becomes_a_model_that_can_be_cut(name, tmp_path):
    needs("torch", "onnxscript")
    out = tmp_path / f"{name}.onnx"
    (exported,) = export(str(MODELS / f"{name}.py"), out, parameters=SMALL[name])
    assert exported.differences
    assert max(exported.differences.values()) <= TOLERANCE
    found = free(onnx.load(out))
    assert found == FREE.get(name, {"batch"})
    sizes = {"sequence": 16} if "sequence" in found else None
    partition(out, stages=3, out=tmp_path / "m.plan", costs="analytic", dims=sizes)
    assert all(comparison.good and comparison.difference == 0 for comparison in verify(tmp_path / "m.plan", out))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.plan", f"{name}.onnx"])


def cases():
    """Return the models; those of frameworks that make test does not install need make test-all."""
    for model in frameworks.models():
        usual = not {"tensorflow", "xgboost", "catboost", "jax"}.intersection(model.needs)
        yield pytest.param(model, id=model.name, marks=() if usual else pytest.mark.exhaustive)


@pytest.mark.parametrize("model", list(cases()))
def test_a_model_of_each_framework_is_exported_compared_and_cut(model, tmp_path, monkeypatch):
    needs(*model.needs)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "made").mkdir()
    source = model.make(tmp_path / "made")
    done = export(source, tmp_path / "out.onnx", **model.options)
    for exported in done:
        assert max(exported.differences.values()) <= TOLERANCE
        proto = onnx.load(exported.path)
        notes = {entry.key: entry.value for entry in proto.metadata_props}
        assert (notes[SOURCE], notes[FRAMEWORK]) == (source, exported.framework)
        cut_and_compared(exported, tmp_path / "m.plan", {k: v for k, v in model.dims.items() if k in free(proto)})
    written = [path.name for exported in done for path in (exported.path, *exported.files)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["made", *written])


def cut_and_compared(exported: Exported, plan: Path, dims: dict[str, int]) -> None:
    """Cut a model in two if it has separable parts, and compare with the whole."""
    if len(onnx.load(exported.path).graph.node) == 1:  # a forest is one op
        with pytest.raises(PartitionError, match="form 1 parts"):
            partition(exported.path, stages=2, out=plan, costs="analytic", dims=dims)
        return
    try:
        partition(exported.path, stages=2, out=plan, costs="analytic", dims=dims)
    except PartitionError:
        partition(exported.path, stages=1, out=plan, costs="analytic", dims=dims)  # the other models have one part
    assert all(comparison.good for comparison in verify(plan, exported.path))
    shutil.rmtree(plan)


@pytest.mark.parametrize(
    ("recipe", "groups", "parameters"),
    [
        ("llama.py", 2, {"layers": 2, "width": 64, "heads": 8, "groups": 2, "hidden": 96, "vocabulary": 300}),
        ("gpt2.py:with_cache", 8, {"layers": 2, "width": 64, "heads": 8, "vocabulary": 300, "positions": 64}),
    ],
)
def test_a_decoder_gives_the_same_tokens_from_a_pipeline_with_its_cache_as_inputs(recipe, groups, parameters, tmp_path):
    needs("torch", "onnxscript")
    export(str(MODELS / recipe), tmp_path / "m.onnx", parameters=parameters)
    sizes = {"batch": 1, "sequence": 4, "past_sequence": 3}
    partition(tmp_path / "m.onnx", stages=2, out=tmp_path / "m.plan", costs="analytic", dims=sizes)
    names = [f"{layer}.{what}" for layer in range(2) for what in ("key", "value")]

    def written(run) -> tuple[list[int], list[np.ndarray]]:
        """Run the first tokens, then one token after another, and return all tokens."""
        past = {f"past_key_values.{name}": np.zeros((1, groups, 0, 8), np.float32) for name in names}
        ids, tokens, scores = np.array([[1, 2, 3, 4]]), [], []
        for _ in range(10):
            found = run({"input_ids": ids, **past})
            scores.append(found["logits"][0, -1])
            tokens.append(int(scores[-1].argmax()))
            ids = np.array([[tokens[-1]]])
            past = {f"past_key_values.{name}": found[f"present.{name}"] for name in names}
        assert past["past_key_values.0.key"].shape[2] == 13
        return tokens, scores

    whole = written(open_session(tmp_path / "m.onnx", threads=1).run)
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        cut = written(pipeline.run)
    assert cut[0] == whole[0]
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(cut[1], whole[1], strict=True))


# Recognising sources


def test_sources_are_recognised_by_form_and_content(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    (tmp_path / "x.json").write_text(json.dumps({"learner": {}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "l.txt").write_text("tree\nversion=v4\n")
    (tmp_path / "m.keras").touch()
    (tmp_path / "r.py").touch()
    kinds = {p.name: recognise(str(p)).kind for p in tmp_path.iterdir() if p.name != "config.json"}
    assert kinds == {
        "saved": "saved-model", "x.json": "xgboost", "l.txt": "lightgbm", "m.keras": "keras", "r.py": "recipe",
    }  # fmt: skip
    assert recognise(str(tmp_path / "config.json")).kind == "transformers"
    assert recognise(str(tmp_path)).kind == "transformers"
    hub = recognise("hf://org/re-po@v1.0/onnx/model.onnx")
    assert (hub.repo, hub.revision, hub.file) == ("org/re-po", "v1.0", "onnx/model.onnx")
    assert recognise("json:loads").name == "loads"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.py", "no such file"),
        ("model.xyz", r"there is no 'model.xyz'; a source is: FILE.py.*\.cbm"),
        ("hf://nothing", "write hf://ORG/REPO"),
        ("hf://org/repo/../../etc/passwd", "write hf://ORG/REPO"),
    ],
)
def test_unknown_sources_are_refused_with_what_is_known(source, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(source, tmp_path / "out.onnx")


def test_a_file_and_a_folder_of_nothing_known_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.txt").write_text("hello")
    with pytest.raises(ExportError, match=r"neither saved_model.pb \(TensorFlow\) nor config.json"):
        export(str(tmp_path / "a"), tmp_path / "out.onnx")
    with pytest.raises(ExportError, match=r"b\.txt cannot be exported: it is text that begins with 'hello'"):
        export(str(tmp_path / "b.txt"), tmp_path / "out.onnx")
    with pytest.raises(ExportError, match=r"the folder .* does not exist"):
        export(str(tmp_path / "b.txt"), tmp_path / "absent" / "out.onnx")


def test_what_runs_code_is_refused_until_it_is_trusted(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "m.pkl").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    needs("sklearn", "skl2onnx", "skops")
    with pytest.raises(ExportError, match=r"a pickled object: loading it runs .* add --trust"):
        export(str(tmp_path / "m.pkl"), tmp_path / "out.onnx")
    assert not ran.exists()
    with pytest.raises(ExportError, match="holds a int; expected an estimator"):
        export(str(tmp_path / "m.pkl"), tmp_path / "out.onnx", trust=True)
    assert ran.exists()


def test_programs_and_modules_of_pytorch_are_refused_until_they_are_trusted(tmp_path):
    needs("torch", "onnxscript")
    for name in ("m.pt2", "m.pt"):
        (tmp_path / name).write_bytes(b"whatever")
        with pytest.raises(ExportError, match=r"Nothing was loaded.*--trust"):
            export(str(tmp_path / name), tmp_path / "out.onnx")
        with pytest.raises(ExportError, match="PyTorch cannot load"):
            export(str(tmp_path / name), tmp_path / "out.onnx", trust=True)


def test_keras_lambdas_are_refused_by_name(tmp_path):
    needs("tensorflow", "tf2onnx")
    import keras

    layers = [keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2, name="twice", output_shape=(4,))]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    with pytest.raises(ExportError, match=r"Lambda layers \(twice\), which are code.*--trust"):
        export(str(tmp_path / "m.keras"), tmp_path / "out.onnx")
    (exported,) = export(str(tmp_path / "m.keras"), tmp_path / "out.onnx", trust=True)
    assert max(exported.differences.values()) <= TOLERANCE


def test_types_that_skops_does_not_know_are_named(tmp_path):
    needs("sklearn", "skl2onnx", "skops")
    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    skops.io.dump(FunctionTransformer(frameworks.table), tmp_path / "m.skops")
    with pytest.raises(ExportError, match=r"not known to be safe \(frameworks.table\).*--trust"):
        export(str(tmp_path / "m.skops"), tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("torch", "m.pt2", "torch"),
        ("tensorflow", "m.tflite", "tensorflow"),
        ("skl2onnx", "m.skops", "sklearn"),
        ("lightgbm", "m.txt", "lightgbm"),
        ("xgboost", "m.ubj", "xgboost"),
        ("catboost", "m.cbm", "catboost"),
        ("transformers", "c.json", "transformers"),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(module, name, extra, tmp_path, monkeypatch):
    if module in ("transformers",):
        needs("torch", "onnxscript")
    monkeypatch.setitem(sys.modules, module, None)
    text = {"m.txt": "tree\n", "c.json": json.dumps({"model_type": "bert"})}.get(name, "x")
    (tmp_path / name).write_text(text)
    with pytest.raises(MissingDependency, match=rf"pip install 'onnxsplit\[{extra}\]'"):
        export(str(tmp_path / name), tmp_path / "out.onnx", trust=True)


# Inputs


def test_input_specifications_are_read_and_wrong_ones_named():
    assert parse_spec("x=float32[batch,3]") == InputSpec("x", "float32", ("batch", 3))
    assert parse_spec("serving_default_x:0=int64") == InputSpec("serving_default_x:0", "int64", ())
    for text, words in (
        ("x", r"is not NAME=DTYPE\[DIMS\]"),
        ("x=float[2]", "there is no type 'float'; allowed: bfloat16, bool, "),
        ("x=float32[0]", "'0' is neither a size from 1 to .* nor the name"),
        ("x=float32[a b]", "'a b' is neither"),
    ):
        with pytest.raises(ExportError, match=words):
            parse_spec(text)


def test_samples_have_other_sizes_where_those_are_free_and_never_one():
    specs = [parse_spec("x=float32[batch,time]"), parse_spec("y=int64[batch,2]")]
    first, second = samples(specs)
    assert first["x"].shape[0] == first["y"].shape[0] != second["x"].shape[0]
    assert first["x"].shape[1] != second["x"].shape[1]
    assert min(*first["x"].shape, *second["x"].shape) > 1


def test_code_that_does_not_say_what_it_takes_is_asked_for_it(tmp_path):
    needs("torch", "onnxscript")
    (tmp_path / "net.py").write_text(frameworks.NETWORK)
    with pytest.raises(ExportError, match="name each argument with --input"):
        export(f"{tmp_path / 'net.py'}:Net", tmp_path / "out.onnx")
    with pytest.raises(ExportError, match="does not run on the inputs given"):
        export(f"{tmp_path / 'net.py'}:Net", tmp_path / "out.onnx", inputs=(parse_spec("image=float32[batch,7]"),))


# Invalid recipes, failing exports


def recipe(tmp_path, text: str) -> str:
    (tmp_path / "recipe.py").write_text(text)
    return str(tmp_path / "recipe.py")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", ExportError, "has no function 'build'"),
        ("def build(): return 1", ExportError, "returned a int"),
        ("def build(a): return 1", ExportError, "missing a required argument"),
        ("import a_framework_that_is_not_there", MissingDependency, "a_framework_that_is_not_there"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, text, error, words):
    with pytest.raises(error, match=words):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_network_that_exports_wrong_is_refused_and_not_written(tmp_path):
    needs("torch", "onnxscript")
    text = (
        "import torch\nfrom onnxsplit.export import Recipe\n"
        "class Moody(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + (0.0 if torch.compiler.is_compiling() else 1.0)\n"
        "def build():\n"
        "    return Recipe(Moody(), {'x': torch.ones(2)}, ('y',))\n"
    )
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == []
    (exported,) = export(recipe(tmp_path, text), tmp_path / "out.onnx", check=False)
    assert exported.differences == {}


def test_an_operator_that_cannot_be_exported_is_named(tmp_path):
    needs("torch", "onnxscript")
    text = (
        "import torch\nfrom onnxsplit.export import Recipe\n"
        "class Odd(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.special.airy_ai(x)\n"
        "def build():\n"
        "    return Recipe(Odd(), {'x': torch.ones(2)}, ('y',))\n"
    )
    with pytest.raises(ExportError, match=r"could not export the network: .*airy_ai"):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:\n", r"raises SyntaxError at .*recipe.py:1: "),
        ("\n1 / 0\n", r"raises ZeroDivisionError at .*recipe.py:2: division by zero"),
        ("def build():\n    return {}['x']\n", r"raises KeyError at .*recipe.py:2: 'x'"),
    ],
)
def test_code_that_fails_is_said_with_its_place(text, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs": (parse_spec("x=float32[2]"),)}, "--input"),
        ({"parameters": {"a": 1}}, "--set"),
        ({"cache": False}, "--no-cache"),
        ({"static_cache": True}, "--static-cache"),
        ({"offline": True}, "--offline"),
    ],
)
def test_options_that_say_nothing_about_a_source_are_refused(options, words, tmp_path):
    source = build.save(build.chain(2), tmp_path)
    with pytest.raises(ExportError, match=f"is an ONNX model; {words} does not apply to it"):
        export(str(source), tmp_path / "out.onnx", **options)


# ONNX itself


def test_a_model_is_checked_inferred_and_raised(tmp_path, python_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_environment["PYTHONPATH"])
    source = build.save(build.chain(2), tmp_path)
    (exported,) = export(str(source), tmp_path / "out.onnx", opset=21)
    proto = onnx.load(exported.path)
    assert [one.version for one in proto.opset_import] == [21]
    assert {value.name for value in proto.graph.value_info} >= {"m0", "h0"}
    with pytest.raises(ExportError, match="cannot be converted to opset 9999"):
        export(str(source), tmp_path / "out.onnx", opset=9999)


def test_a_model_is_simplified_when_asked(tmp_path, python_environment, monkeypatch):
    needs("onnxsim")
    monkeypatch.setenv("PYTHONPATH", python_environment["PYTHONPATH"])
    proto = build.chain(2)
    last = proto.graph.node[-1]
    last.output[0] = "before"
    proto.graph.node.append(onnx.helper.make_node("Identity", ["before"], ["y"]))
    (exported,) = export(str(build.save(proto, tmp_path)), tmp_path / "out.onnx", simplify=True)
    assert "Identity" not in {node.op_type for node in onnx.load(exported.path).graph.node}


def test_a_model_with_external_data_keeps_it_beside(tmp_path, python_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_environment["PYTHONPATH"])
    monkeypatch.setattr("onnxsplit.export.finish.LARGE_BYTES", 1000)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    onnx.save(
        build.chain(4, 64), tmp_path / "in" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    (exported,) = export(str(tmp_path / "in" / "m.onnx"), tmp_path / "out" / "m.onnx")
    assert exported.differences == {"y": 0.0}
    (tmp_path / "out" / "m.data").write_bytes(b"another's")
    export(str(tmp_path / "in" / "m.onnx"), tmp_path / "out" / "m.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.data", "m.onnx", "m.onnx.data"]
    assert (tmp_path / "out" / "m.data").read_bytes() == b"another's"
    with pytest.raises(ExportError, match="its opset cannot be changed"):
        export(str(tmp_path / "in" / "m.onnx"), tmp_path / "out" / "m.onnx", opset=22)


# Hubs


class Hub(BaseHTTPRequestHandler):
    """The part of a hub that is needed to fetch one file."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        name = self.path.rpartition(f"/resolve/{self.commit}/")[2] if "/resolve/" in self.path else None
        if "/tree/" in self.path:
            found = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            text = json.dumps(found).encode()
        elif self.path.startswith("/api/models/org/repo"):
            text = json.dumps(
                {"id": "org/repo", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            ).encode()
        elif name in self.files:
            text = self.files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{len(text)}"')
        self.end_headers()
        if body:
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    Hub.files = {"onnx/model.onnx": build.chain(2).SerializeToString()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def exported_in_a_process(tmp_path, environment, source: str, *words: str, **more: str):
    command = [sys.executable, "-P", "-m", "onnxsplit", "export", source, "-o", str(tmp_path / "out.onnx"), *words]
    environment = {**environment, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_ready_made_model_of_a_hub_is_fetched_and_its_revision_noted(hub, tmp_path, python_environment):
    needs("huggingface_hub")
    source = "hf://org/repo/onnx/model.onnx"
    done = exported_in_a_process(tmp_path, python_environment, source, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert notes[SOURCE] == source
    assert notes["onnxsplit.revision"] == Hub.commit
    (tmp_path / "out.onnx").unlink()
    again = exported_in_a_process(tmp_path, python_environment, source, "--offline", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr


def test_an_unreachable_hub_is_reported(tmp_path, python_environment):
    needs("huggingface_hub")
    gone = exported_in_a_process(tmp_path, python_environment, "hf://org/repo/m.onnx", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 1
    assert "is not on this host, and the hub cannot be reached" in gone.stderr
    assert "Traceback" not in gone.stderr
    offline = exported_in_a_process(tmp_path, python_environment, "hf://org/repo/m.onnx", "--offline")
    assert "the hub is not contacted (--offline)" in offline.stderr


def test_a_folder_whose_weights_are_pickled_is_refused(tmp_path):
    needs("torch", "transformers")
    (tmp_path / "m").mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], **frameworks.SMALL}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match="has its weights in a pickled file"):
        export(str(tmp_path / "m"), tmp_path / "out.onnx")
    (tmp_path / "m" / "pytorch_model.bin").rename(tmp_path / "m" / "tf_model.h5")
    with pytest.raises(ExportError, match=r"has no weights in \*\.safetensors, but tf_model\.h5"):
        export(str(tmp_path / "m"), tmp_path / "out.onnx")
    (tmp_path / "m" / "tf_model.h5").unlink()
    with pytest.raises(ExportError, match=r"has no weights in \*\.safetensors; .*name its config\.json for random"):
        export(str(tmp_path / "m"), tmp_path / "out.onnx")
    (exported,) = export(str(tmp_path / "m" / "config.json"), tmp_path / "out.onnx")
    assert exported.framework.endswith("random weights")
    (tmp_path / "c.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(ExportError, match="names code of its own"):
        export(str(tmp_path / "c.json"), tmp_path / "out.onnx")
