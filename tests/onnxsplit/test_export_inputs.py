"""Example inputs of an export: each becomes a separate input, with its own values in the comparison, and is read."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxsplit.distance import distance
from onnxsplit.errors import ExportError
from onnxsplit.export import export
from onnxsplit.export.conversion import TOLERANCE
from onnxsplit.export.examples import flat, resized, varied
from onnxsplit.session import open_session

MODELS = Path(__file__).parents[2] / "models"
DECODERS = {
    "llama.py": {"layers": 3, "width": 32, "heads": 4, "groups": 2, "hidden": 48, "vocabulary": 100},
    "gpt2.py:with_cache": {"layers": 3, "width": 32, "heads": 4, "vocabulary": 100, "positions": 64},
}

# Warnings that PyTorch causes itself are ignored.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def torch():
    if find_spec("torch") is None or find_spec("onnxscript") is None:
        pytest.skip("torch or onnxscript not installed; make test-export installs all")
    return pytest.importorskip("torch")


def recipe(folder: Path, forward: str, inputs: str, axes: str = "{}", outputs: str = "('y',)") -> str:
    """Write a recipe whose network has this forward function."""
    (folder / "recipe.py").write_text(
        "import numpy as np, torch\nfrom onnxsplit.export import Recipe\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(7, 4)\n"
        f"    {forward}\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(6, 4)\n"
        f"    return Recipe(Network().eval(), {inputs}, {outputs}, {axes})\n"
    )
    return str(folder / "recipe.py")


def run(path: Path, **inputs) -> dict[str, np.ndarray]:
    return open_session(path, threads=1).run({name: np.asarray(array) for name, array in inputs.items()})


def inputs_of(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path).graph.input]


# Decoders with a cache


@pytest.fixture(scope="module", params=list(DECODERS))
def decoder(request, torch, tmp_path_factory):
    """A PyTorch network with a cache, and its ONNX model."""
    folder = tmp_path_factory.mktemp("decoder")
    (exported,) = export(str(MODELS / request.param), folder / "m.onnx", parameters=DECODERS[request.param])
    assert exported.unread == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MODELS))
        name, _, function = request.param.partition(":")
        made = getattr(__import__(name.removesuffix(".py")), function or "build")(**DECODERS[request.param])
    return made, exported.path


@pytest.mark.parametrize(("batch", "past", "sequence"), [(1, 0, 5), (2, 0, 3), (1, 4, 1), (2, 6, 1), (2, 3, 4)])
def test_a_decoder_reads_each_tensor_of_its_cache_as_pytorch_does(decoder, torch, batch, past, sequence):
    made, path = decoder
    session = open_session(path, threads=1)
    source = np.random.default_rng(0)
    given = {
        name: source.integers(0, 100, (batch, sequence))
        if name == "input_ids"
        else source.standard_normal((batch, tensor.shape[1], past, tensor.shape[3])).astype(np.float32)
        for name, tensor in made.inputs.items()
    }
    assert list(given) == inputs_of(path)
    assert len(given) == 7

    def answers(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Compare all outputs, and return the model's scores and PyTorch's."""
        found = session.run(inputs)
        with torch.no_grad():
            wanted = made.network(*(torch.from_numpy(inputs[name]) for name in made.inputs))
        for name, tensor in zip(made.outputs, wanted, strict=True):
            assert distance(found[name], tensor.numpy()) <= TOLERANCE
        return found["logits"], wanted[0].numpy()

    before = answers(given)
    for name in given:
        changed = given[name] + 1 if name == "input_ids" else given[name] + 3 * source.random(given[name].shape)
        after = answers({**given, name: changed.astype(given[name].dtype) % (100 if name == "input_ids" else np.inf)})
        if given[name].size:
            assert all(distance(one, other) > 0.001 for one, other in zip(after, before, strict=True)), name


# Examples that share storage


@pytest.mark.parametrize(
    "inputs",
    [
        "dict.fromkeys('abc', x[:3])",
        "{'a': x[:3], 'b': x[:3], 'c': x[1:4]}",
        "{'a': x[:3], 'b': x[:3].view(3, 4), 'c': x[:3].detach()}",
        "{'a': x[:1].expand(3, 4), 'b': x[:1].expand(3, 4), 'c': x.T[:, :3].T}",
        "dict.fromkeys('abc', x.numpy()[:3])",
        "dict(zip('abc', np.split(np.arange(36, dtype=np.float32).reshape(9, 4), 3)))",
        "{'a': torch.from_numpy(x.numpy())[:3], 'b': x[:3], 'c': torch.nn.Parameter(x[:3])}",
    ],
)
def test_inputs_whose_examples_share_storage_stay_inputs_of_their_own(inputs, torch, tmp_path):
    forward = "def forward(self, a, b, c): return a - 2 * b + 5 * c"
    (exported,) = export(recipe(tmp_path, forward, inputs), tmp_path / "m.onnx")
    a, b, c = np.random.default_rng(0).standard_normal((3, 3, 4)).astype(np.float32)
    assert exported.unread == ()
    assert inputs_of(exported.path) == ["a", "b", "c"]
    assert np.allclose(run(exported.path, a=a, b=b, c=c)["y"], a - 2 * b + 5 * c, atol=1e-5)


def test_a_network_that_writes_into_an_input_leaves_the_others_alone(torch, tmp_path):
    forward = "def forward(self, a, b): return a.mul_(2) + b"
    (exported,) = export(recipe(tmp_path, forward, "dict.fromkeys('ab', x)"), tmp_path / "m.onnx")
    a, b = np.ones((6, 4), np.float32), np.full((6, 4), 5, np.float32)
    assert (run(exported.path, a=a, b=b)["y"] == 7).all()


def test_inputs_inside_lists_and_dictionaries_are_named_by_the_way_to_them(torch, tmp_path):
    forward = (
        "def forward(self, ids, cache, more): return self.table(ids) + cache[0]['k'] - 3 * cache[1]['k'] * more['m']"
    )
    inputs = "{'ids': torch.arange(5), 'cache': [dict(k=x[:5]), dict(k=x[:5])], 'more': {'m': x[:5], 'n': x[:5]}}"
    axes = "{'ids': {0: 'n'}, 'cache.0.k': {0: 'n'}, 'cache.1.k': {0: 'n'}, 'more.m': {0: 'n'}, 'more.n': {0: 'n'}}"
    (exported,) = export(recipe(tmp_path, forward, inputs, axes), tmp_path / "m.onnx")
    assert inputs_of(exported.path) == ["ids", "cache.0.k", "cache.1.k", "more.m", "more.n"]
    assert exported.unread == ("more.n",)
    assert exported.differences["y"] <= TOLERANCE
    source = np.random.default_rng(0)
    tensors = {name: source.random((2, 4), np.float32) for name in inputs_of(exported.path)[1:]}
    found = run(exported.path, ids=np.zeros(2, np.int64), **tensors)["y"]
    added = tensors["cache.0.k"] - 3 * tensors["cache.1.k"] * tensors["more.m"]
    assert np.allclose(found - added, (found - added)[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("{'a': x, 'b': 'text'}", r"the example input 'b' is a str; expected a tensor, or a list"),
        ("{'a': x, 'b': [x, None]}", r"the example input 'b.1' is a NoneType"),
        ("{'a': [x, x], 'a.1': x}", r"two of the example inputs have the name 'a.1'"),
    ],
)
def test_example_inputs_that_are_no_tensors_are_named(inputs, words, torch, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(recipe(tmp_path, "def forward(self, a, b): return a", inputs), tmp_path / "m.onnx")


# Values of the comparison


def test_inputs_that_were_mixed_up_are_found_though_their_examples_are_equal(torch, tmp_path):
    forward = "def forward(self, a, b): return a - 2 * b if torch.compiler.is_compiling() else b - 2 * a"
    for inputs in ("{'a': torch.ones(3), 'b': torch.ones(3)}", "{'a': torch.zeros(3), 'b': torch.zeros(3)}"):
        with pytest.raises(ExportError, match="differs from PyTorch"):
            export(recipe(tmp_path, forward, inputs), tmp_path / "m.onnx")


def test_random_integers_stay_within_the_bounds_of_the_examples(torch, tmp_path):
    forward = "def forward(self, ids): return self.table(ids)"
    axes = "{'ids': {0: 'batch', 1: 'length'}}"
    source = recipe(tmp_path, forward, "{'ids': torch.tensor([[0, 6, 1], [2, 3, 4]])}", axes)
    (exported,) = export(source, tmp_path / "m.onnx")
    assert exported.differences["y"] <= TOLERANCE


def test_a_network_that_asks_more_of_its_inputs_than_bounds_is_compared_on_the_examples(torch, tmp_path):
    forward = (
        "def forward(self, lengths, x):\n"
        "        if not torch.compiler.is_compiling() and lengths.tolist() != sorted(lengths.tolist()):\n"
        "            raise ValueError('lengths must be sorted')\n"
        "        return x * lengths[:, None]"
    )
    inputs = "{'lengths': torch.arange(6), 'x': x}"
    axes = "{'lengths': {0: 'batch'}, 'x': {0: 'batch'}}"
    (exported,) = export(recipe(tmp_path, forward, inputs, axes), tmp_path / "m.onnx")
    assert exported.differences["y"] <= TOLERANCE


def test_random_values_are_like_the_examples_and_differ_from_array_to_array():
    given = {
        "zeros": np.zeros((2, 3), np.float32),
        "same": np.zeros((2, 3), np.float32),
        "threes": np.full((2, 3), -3.0),
        "ids": np.array([[4, 9, 5]]),
        "mask": np.array([[0.0, -np.inf]], np.float32),
        "words": np.array([["a", "b"]], object),
        "none": np.zeros((0, 3), np.int64),
        "flags": np.zeros(64, bool),
        "scalar": np.float32(2).reshape(()),
    }
    found = varied(given, given)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {n: (a.shape, a.dtype) for n, a in given.items()}
    assert len({a.tobytes() for name, a in found.items()}) == len(given)
    assert 0 <= found["zeros"].min() < found["zeros"].max() < 1
    assert -4.5 <= found["threes"].min() < found["threes"].max() < -1.5
    assert set(found["ids"].ravel()) <= {4, 5, 6, 7, 8, 9}
    assert found["mask"].tolist() == given["mask"].tolist()
    assert set(found["words"].ravel()) <= {"a", "b"}
    assert found["flags"].any()


def test_free_dimensions_shrink_and_nested_inputs_have_names():
    arrays = flat({"a": np.zeros((1, 4)), "b": {"c": [np.zeros((3, 4))]}})
    assert list(arrays) == ["a", "b.c.0"]
    found = resized(arrays, {"a": {0: "n"}, "b.c.0": {0: "n"}})
    assert (found["a"].shape, found["b.c.0"].shape) == ((1, 4), (2, 4))


# Inputs that no op reads


def test_inputs_that_nothing_reads_are_named_by_the_command(torch, tmp_path, python_environment):
    forward = "def forward(self, a, unused, size): return a + size.shape[0]"
    source = recipe(tmp_path, forward, "{'a': x, 'unused': x, 'size': x}")
    words = [sys.executable, "-m", "onnxsplit", "export", source, "-o", str(tmp_path / "m.onnx")]
    told, asked = (
        subprocess.run([*words, *more], env=python_environment, capture_output=True, text=True, check=True)
        for more in ((), ("--json",))
    )
    for name in ("unused", "size"):
        assert f"m.onnx reads the input '{name}', so no output depends on it" in told.stderr
    found = json.loads(asked.stdout)
    assert found["unread"] == found["models"][0]["unread"] == ["unused", "size"]


def test_inputs_that_only_a_body_reads_are_read(tmp_path):
    body = onnx.parser.parse_graph("agraph () => (float[2] z) { z = Add(inner, inner) }")
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>'
        "g (bool c, float[2] inner, float[2] other, float[2] passed) => (float[2] y, float[2] passed)"
        "{ dead = Neg(other) y = If(c) }"
    )
    choice = model.graph.node[1]
    choice.attribute.extend(onnx.helper.make_attribute(name, body) for name in ("then_branch", "else_branch"))
    onnx.save(model, tmp_path / "old.onnx")
    (exported,) = export(str(tmp_path / "old.onnx"), tmp_path / "m.onnx")
    assert exported.unread == ("other",)


def test_a_saved_program_is_compared_on_the_inputs_it_was_saved_with(torch, tmp_path):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)

        def forward(self, ids, cache, unused):
            return self.table(ids) + cache["key"] - 2 * cache["value"]

    arguments = (torch.tensor([0, 6]), {"key": torch.ones(2, 4), "value": torch.ones(2, 4)}, torch.ones(1))
    torch.export.save(torch.export.export(Network().eval(), arguments), tmp_path / "m.pt2")
    (exported,) = export(str(tmp_path / "m.pt2"), tmp_path / "m.onnx", trust=True)
    assert max(exported.differences.values()) <= TOLERANCE
    assert exported.unread == ("unused",)


# JAX


JAX_RECIPE = """
import jax.numpy as jnp, numpy as np
from onnxsplit.export import Recipe

def network(ids, first, second, unused):
    return jnp.take(jnp.arange(28.0).reshape(7, 4), ids, axis=0) + first - 3 * second

def build():
    values = np.ones((3, 4), np.float32)
    inputs = {"ids": np.array([0, 6, 2], np.int32), **dict.fromkeys(("first", "second", "unused"), values)}
    return Recipe(network, inputs, ("y",), {name: {0: "batch"} for name in inputs})

def nested():
    return Recipe(network, {"ids": [np.zeros(2)]}, ("y",))
"""


def test_a_function_of_jax_is_compared_on_values_of_its_own_for_each_input(tmp_path):
    if find_spec("jax2onnx") is None:
        pytest.skip("jax2onnx not installed; make test-export installs all")
    (tmp_path / "recipe.py").write_text(JAX_RECIPE)
    (exported,) = export(str(tmp_path / "recipe.py"), tmp_path / "m.onnx")
    assert exported.unread == ("unused",)
    ids, source = np.array([6, 0], np.int32), np.random.default_rng(0)
    first, second, unused = source.random((3, 2, 4)).astype(np.float32)
    given = {"ids": ids, "first": first, "second": second, "unused": unused}
    found = run(exported.path, **{name: given[name] for name in inputs_of(exported.path)})["y"]
    assert np.allclose(found, np.arange(28.0).reshape(7, 4)[ids] + first - 3 * second, atol=1e-4)
    with pytest.raises(ExportError, match=r"'ids.0' lies inside an argument, but jax2onnx takes only arrays"):
        export(f"{tmp_path / 'recipe.py'}:nested", tmp_path / "m.onnx")
