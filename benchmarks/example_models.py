"""The models that several benchmarks share: trained ones by name, and generated ones of a given size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import ROOT
from onnxsplit.export import export
from onnxsplit.planning.planner import partition

Named = tuple[str, Path, dict[str, int]]
"""A model's name, its file, and sizes for its free dimensions."""

CHAINS = {"chain-2ms": (512, 52), "chain-1ms": (512, 28), "chain-0.3ms": (256, 24)}
"""Chains of products whose halves take about as long as the name says: their width and how many products."""

RECIPES: dict[str, dict[str, Any]] = {
    "resnet50": {"width": 16, "size": 64},
    "bert": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 1000},
    "gpt2": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 1000},
    "inception": {"width": 16, "size": 64},
    "multitask": {"width": 16, "size": 64},
}
"""Recipes of `models/`, and parameters that make them small."""

LARGE_WIDTH = 4096
"""Width of the layers of :func:`large`: 64 MiB of weights each."""


def named(name: str, folder: Path) -> tuple[Path, dict[str, int]]:
    """Return the file of a model, and sizes for its free dimensions.

    Args:
        name: a file, a model of `models/zoo.toml`, a name of ``CHAINS``, or a recipe of `models/`.
        folder: folder for a model that has to be made.
    """
    if Path(name).is_file():
        return Path(name), {}
    if name in zoo.entries():
        return zoo.fetch(name), zoo.entries()[name].get("dims", {})
    out = folder / f"{name}.onnx"
    if name in CHAINS:
        products(out, *CHAINS[name], rows=16)
    elif not out.exists():
        export(str(ROOT / "models" / f"{name}.py"), out)
    return out, {}


def named_plan(name: str, folder: Path, *, models: Path | None = None) -> Path:
    """Cut a named model in two stages.

    Args:
        name: as :func:`named` takes it.
        folder: folder for the plan, and for a model that has to be made.
        models: another folder for a model that has to be made.

    Returns:
        The folder of the plan.
    """
    model, dims = named(name, models or folder)
    plan = folder / f"{model.stem}.plan"
    partition(model, stages=2, out=plan, dims=dims)
    return plan


def products(out: Path, width: int, layers: int, rows: int | str = "batch") -> Path:
    """Make a chain of products with square weights, each followed by a tanh; input ``x``, output ``y``."""
    source = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for step in range(layers):
        weight = source.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
        weights.append(numpy_helper.from_array(weight, f"w{step}"))
        result = "y" if step == layers - 1 else f"h{step}"
        nodes.append(helper.make_node("MatMul", [last, f"w{step}"], [f"m{step}"]))
        nodes.append(helper.make_node("Tanh", [f"m{step}"], [result]))
        last = result
    return saved(out, nodes, ("x", "y"), [rows, width], weights)


def one_tensor(size_bytes: int, folder: Path) -> Path:
    """Make a plan of two stages: the first expands a number to a tensor of this size, the second reads a part of it."""
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Slice", ["wide", "zero", "one"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("shape", [size_bytes // 4]), ("zero", [0]), ("one", [1]))
    ]
    model = saved(folder / "m.onnx", nodes, ("x", "y"), [1], constants)
    partition(model, out=folder / "m.plan", cut_at=["wide"], costs="analytic")
    return folder / "m.plan"


def saved(out: Path, nodes: list[Any], ends: tuple[str, str], shape: list[int | str], weights: list[Any]) -> Path:
    """Write a model with one input and one output of float32, both of the same shape."""
    first, last = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ends)
    graph = helper.make_graph(nodes, out.stem, [first], [last], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), out)
    return out


def every(names: list[str], folder: Path) -> Iterator[Named]:
    """Yield all models that cuts are tested on, or those with the given names or files.

    They are the trained models of `models/zoo.toml`, the nine light graphs that the onnx package carries, and the
    recipes, made small.
    """
    for name in names:
        if Path(name).is_file():
            yield Path(name).stem, Path(name), {}
    for name, entry in zoo.entries().items():
        if not names or name in names:
            yield name, zoo.fetch(name), entry.get("dims", {})
    yield from _light(names, folder)
    for name, parameters in RECIPES.items():
        if not names or f"recipe-{name}" in names:
            export(str(ROOT / "models" / f"{name}.py"), folder / f"{name}.onnx", parameters=parameters)
            yield f"recipe-{name}", folder / f"{name}.onnx", {}


def full_recipes(names: list[str], folder: Path) -> Iterator[Named]:
    """Yield the recipes in full size, or those with the given names."""
    for name in RECIPES:
        if not names or f"full-{name}" in names:
            export(str(ROOT / "models" / f"{name}.py"), folder / f"full-{name}.onnx")
            yield f"full-{name}", folder / f"full-{name}.onnx", {}


FORESTS = {"forest-small": (10, 4, 1), "forest-large": (200, 12, 256), "forest-deep": (400, None, 1)}
"""Forests: how many trees, how deep they may be, and the rows of a request."""


def forests(names: list[str], folder: Path) -> Iterator[Named]:
    """Yield trained forests of scikit-learn, or those with the given names.

    Each of ``FORESTS`` scales its inputs first. ``forest-voting`` is two forests side by side that vote.
    """
    for name, (trees, depth, rows) in FORESTS.items():
        if not names or name in names:
            yield name, _forest(folder / f"{name}.onnx", [(trees, depth)], rows), {}
    if not names or "forest-voting" in names:
        yield "forest-voting", _forest(folder / "forest-voting.onnx", [(100, 10), (100, 10)], 256), {}


def _forest(out: Path, forests: list[tuple[int, int | None]], rows: int) -> Path:
    """Train forests on random classes, and write them as one model that takes ``rows`` rows of 20 numbers."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier, VotingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, classes = make_classification(3000, 20, n_informative=10, n_classes=4, random_state=0)
    made = [
        (f"f{seed}", RandomForestClassifier(trees, max_depth=depth, random_state=seed))
        for seed, (trees, depth) in enumerate(forests)
    ]
    model = made[0][1] if len(made) == 1 else VotingClassifier(made, voting="soft", flatten_transform=False)
    fitted = make_pipeline(StandardScaler(), model).fit(x.astype(np.float32), classes)
    types = [("x", FloatTensorType([rows, 20]))]
    proto = to_onnx(fitted, initial_types=types, options={"zipmap": False}, target_opset=17)
    out.write_bytes(proto.SerializeToString())
    return out


def _light(names: list[str], folder: Path) -> Iterator[Named]:
    """Yield the light graphs of the onnx package with random weights: constant weights make all outputs equal."""
    for source in sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")):
        if names and not {"light", source.stem} & set(names):
            continue
        model = onnx.load(source)
        random = np.random.default_rng(0)
        shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        kept = []
        for node in model.graph.node:
            if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
                size = tuple(int(n) for n in shapes[node.input[0]])
                values = (random.random(size, dtype=np.float32) - 0.4) / float(max(1, np.prod(size[1:]))) ** 0.5
                weight = np.abs(values) if len(size) == 1 else values
                model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
            else:
                kept.append(node)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        onnx.save(model, folder / source.name)
        yield source.stem, folder / source.name, {}


def large(folder: Path, gigabytes: int) -> Path:
    """Write a chain of MatMul and Relu to ``large.onnx``, and its weights to ``weights.bin`` beside it."""
    width = LARGE_WIDTH
    layers = gigabytes * (1 << 30) // (4 * width * width)
    nodes, weights, last = [], [], "x"
    scale = (2 / width) ** 0.5  # outputs keep their size from layer to layer
    weight = (np.random.default_rng(0).standard_normal(width * width) * scale).astype(np.float32)
    with (folder / "weights.bin").open("wb") as data:
        for layer in range(layers):
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": layer * weight.nbytes, "length": weight.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            data.write(np.roll(weight, 997 * layer).data)  # ONNX Runtime keeps one copy of weights that are equal
            nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
            nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]))
            last = f"h{layer}"
    return saved(folder / "large.onnx", nodes, ("x", last), ["batch", width], weights)
