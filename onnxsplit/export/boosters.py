"""Gradient boosting: LightGBM and XGBoost by onnxmltools, CatBoost by its own exporter. Their files run no code."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.sklearn import JUMPS, normalised
from onnxsplit.export.sources import Source
from onnxsplit.export.specs import InputSpec, samples
from onnxsplit.tensors import Array

_OPSET = 18
_TOOLS_OPSET = 15  # the newest that onnxmltools 1.16 supports
_ROWS = (200, 7)
INPUT = "input"

Predict = Callable[[Array], Mapping[str, Array]]


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a booster's file.

    Raises:
        ExportError: the file cannot be exported.
        MissingDependency: the framework or its converter is not installed.
    """
    assert source.path is not None
    make = {"lightgbm": _lightgbm, "xgboost": _xgboost, "catboost": _catboost}[source.kind]
    try:
        framework, features, proto, predict = make(source.path)
    except ImportError as error:
        raise MissingDependency(
            f"exporting from {source.kind} needs {error.name}: pip install 'onnxsplit[{source.kind}]'"
        ) from error
    except ExportError:
        raise
    except Exception as error:  # the frameworks raise errors of any type
        raise ExportError(f"{source.text} cannot be exported: {one_line(error, 400)}") from error
    spec = InputSpec(INPUT, "float32", ("batch", features))
    return [
        Conversion(
            framework=framework,
            write=lambda file: _write(proto, file, options.opset or _OPSET),
            samples=[next(samples([spec], fixed={"batch": rows})) for rows in _ROWS],
            reference=lambda sample: predict(sample[INPUT]),
            jumps=JUMPS,
        )
    ]


def _write(proto: onnx.ModelProto, file: Path, opset: int) -> None:
    file.write_bytes(normalised(proto, opset).SerializeToString())


def _floats(features: int) -> list[Any]:
    from onnxmltools.convert.common.data_types import FloatTensorType

    return [(INPUT, FloatTensorType([None, features]))]


def _by_shape(proto: onnx.ModelProto, scores: Array, labels: Array | None) -> dict[str, Array]:
    """Scores, and labels if the model has them, by the names of the model's outputs."""
    names = [value.name for value in proto.graph.output]
    if len(names) == 1:
        return {names[0]: scores}
    if scores.ndim == 1:
        scores = np.stack([1 - scores, scores], axis=1)
    return {names[0]: labels if labels is not None else scores.argmax(axis=1), names[1]: scores}


def _lightgbm(path: Path) -> tuple[str, int, onnx.ModelProto, Predict]:
    import lightgbm
    from onnxmltools.convert import convert_lightgbm

    booster = lightgbm.Booster(model_file=str(path))
    features = booster.num_feature()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = convert_lightgbm(booster, initial_types=_floats(features), target_opset=_TOOLS_OPSET, zipmap=False)
    return (
        f"LightGBM {lightgbm.__version__}",
        features,
        proto,
        lambda rows: _by_shape(proto, np.asarray(booster.predict(rows)), None),
    )


def _xgboost(path: Path) -> tuple[str, int, onnx.ModelProto, Predict]:
    import xgboost
    from onnxmltools.convert import convert_xgboost

    booster = xgboost.Booster()
    booster.load_model(path)
    features = booster.num_features()
    names = [f"f{number}" for number in range(features)]  # onnxmltools accepts no other names
    booster.feature_names = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = convert_xgboost(booster, initial_types=_floats(features), target_opset=_TOOLS_OPSET)

    def predict(rows: Array) -> Mapping[str, Array]:
        return _by_shape(proto, booster.predict(xgboost.DMatrix(rows, feature_names=names)), None)

    return f"XGBoost {xgboost.__version__}", features, proto, predict


def _catboost(path: Path) -> tuple[str, int, onnx.ModelProto, Predict]:
    import catboost

    model = catboost.CatBoost()
    model.load_model(str(path))
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        file = Path(folder) / "model.onnx"
        model.save_model(str(file), format="onnx")
        proto = onnx.load(str(file))
    features = len(model.feature_names_)
    _without_maps(proto)
    proto.graph.input[0].name, given = INPUT, proto.graph.input[0].name
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == given:
                node.input[place] = INPUT

    def predict(rows: Array) -> Mapping[str, Array]:
        if len(proto.graph.output) == 1:
            return {proto.graph.output[0].name: np.asarray(model.predict(rows)).reshape(len(rows), -1)}
        scores = np.asarray(model.predict(rows, prediction_type="Probability"))
        return _by_shape(proto, scores, np.asarray(model.predict(rows, prediction_type="Class")).reshape(-1))

    return f"CatBoost {catboost.__version__}", features, proto, predict


def _without_maps(proto: onnx.ModelProto) -> None:
    """Make scores a tensor instead of a sequence of maps, and correct the shape that a regressor's output declares."""
    graph = proto.graph
    for maps in [node for node in graph.node if node.op_type == "ZipMap"]:
        classes = next(a for a in maps.attribute if a.name.startswith("classlabels"))
        count = len(classes.ints or classes.strings)
        for node in graph.node:
            for place, name in enumerate(node.output):
                if name == maps.input[0]:
                    node.output[place] = maps.output[0]
        graph.node.remove(maps)
        for value in graph.output:
            if value.name == maps.output[0]:
                value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["batch", count]))
    for value in graph.output:
        if value.name == "predictions":
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["batch", 1]))
