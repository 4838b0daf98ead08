"""scikit-learn: fitted estimators and pipelines, by skl2onnx. Files are saved by skops, or pickled and trusted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.sources import Source, refuse_code
from onnxsplit.export.specs import InputSpec, samples
from onnxsplit.tensors import Array

_EXTRA = "pip install 'onnxsplit[sklearn]'"
_ROWS = (200, 7)
_OPSET, _ML_OPSET = 18, 3
JUMPS = 0.02
"""Share of rows in which a tree may take another branch, because ONNX's thresholds are 32-bit."""

_SAFE = (  # types that skops does not know as safe, but that run no code from a file
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
)


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a file saved by skops, or of a pickled file.

    Raises:
        ExportError: the file is not trusted, cannot be loaded, or does not hold a fitted estimator.
        MissingDependency: scikit-learn, skl2onnx or skops is not installed.
    """
    assert source.path is not None
    _required()
    if source.kind == "skops":
        return [of_estimator(_skops(source, options), options)]
    refuse_code(source, "loading it runs any code that it contains", trust=options.trust)
    try:
        import joblib

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator = joblib.load(source.path)
    except Exception as error:  # the content may raise any error
        raise ExportError(f"{source.text} cannot be loaded: {one_line(error, 300)}") from error
    return [of_estimator(estimator, options)]


def _required() -> Any:
    try:
        import skl2onnx
        import sklearn
    except ImportError as error:
        raise MissingDependency(f"exporting from scikit-learn needs {error.name}: {_EXTRA}") from error
    del sklearn
    return skl2onnx


def _skops(source: Source, options: ExportOptions) -> Any:
    """Load a file saved by skops; unknown types need trust."""
    try:
        import skops.io
    except ImportError as error:
        raise MissingDependency(f"{source.text} needs skops: {_EXTRA}") from error
    try:
        unknown = sorted(set(skops.io.get_untrusted_types(file=source.path)) - set(_SAFE))
    except Exception as error:  # a damaged file
        raise ExportError(f"{source.text} is not a file of skops: {one_line(error, 200)}") from error
    if unknown:
        refuse_code(source, f"it holds types that are not known to be safe ({', '.join(unknown)})", trust=options.trust)
    return skops.io.load(source.path, trusted=[*unknown, *_SAFE])


def of_estimator(estimator: Any, options: ExportOptions) -> Conversion:
    """The conversion of a fitted estimator.

    Raises:
        ExportError: the object is not an estimator, was not fitted, or does not say which inputs it takes.
    """
    _required()
    import sklearn
    from sklearn.base import BaseEstimator, is_classifier

    if not isinstance(estimator, BaseEstimator):
        raise ExportError(
            f"the source holds a {type(estimator).__name__}; expected an estimator or a pipeline of scikit-learn"
        )
    specs = list(options.inputs)
    if not specs:
        count = getattr(estimator, "n_features_in_", None)
        if count is None:
            raise ExportError(
                "the estimator does not say how many features it takes; fit it, or give --input x=float32[batch,N]"
            )
        specs = [InputSpec("input", "float32", ("batch", int(count)))]
    classifies = is_classifier(estimator)
    names: list[str] = []  # names of the model's outputs, known once it is written

    def write(file: Path) -> None:
        from skl2onnx import convert_sklearn

        more = {"options": {id(estimator): {"zipmap": False}}} if classifies else {}
        targets = {"": options.opset or _OPSET, "ai.onnx.ml": _ML_OPSET}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                proto = convert_sklearn(estimator, initial_types=_types(specs), target_opset=targets, **more)
        except Exception as error:  # skl2onnx raises errors of any type
            raise ExportError(f"skl2onnx could not convert the estimator: {one_line(error, 500)}") from error
        names.extend(value.name for value in proto.graph.output)
        file.write_bytes(normalised(proto, options.opset or _OPSET).SerializeToString())

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        given = _table(estimator, specs, sample)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [np.asarray(answer(given)) for answer in _answers(estimator, len(names))]
        return dict(zip(names, results, strict=True))

    return Conversion(
        framework=f"scikit-learn {sklearn.__version__}",
        write=write,
        samples=[_sample(specs, rows) for rows in _ROWS],
        reference=reference,
        jumps=JUMPS,
    )


def _answers(estimator: Any, count: int) -> list[Any]:
    """The methods that return the model's outputs: label and scores for a classifier, else one method."""
    if count > 1:
        scores = "predict_proba" if hasattr(estimator, "predict_proba") else "decision_function"
        return [estimator.predict, getattr(estimator, scores)]
    return [estimator.predict if hasattr(estimator, "predict") else estimator.transform]


def _types(specs: Sequence[InputSpec]) -> list[Any]:
    """Types of the inputs, as skl2onnx takes them."""
    from skl2onnx.common import data_types as kinds

    known = {
        "float32": kinds.FloatTensorType,
        "float64": kinds.DoubleTensorType,
        "int64": kinds.Int64TensorType,
        "string": kinds.StringTensorType,
        "bool": kinds.BooleanTensorType,
    }
    unknown = [spec for spec in specs if spec.dtype not in known]
    if unknown:
        raise ExportError(f"scikit-learn's models take {', '.join(known)}, not {unknown[0].dtype}")
    return [(s.name, known[s.dtype]([None if isinstance(d, str) else d for d in s.shape])) for s in specs]


def _sample(specs: Sequence[InputSpec], rows: int) -> dict[str, Array]:
    """Random inputs with this number of rows."""
    return next(samples(specs, fixed=dict.fromkeys((d for s in specs for d in s.shape if isinstance(d, str)), rows)))


def _table(estimator: Any, specs: Sequence[InputSpec], sample: Mapping[str, Array]) -> Any:
    """Inputs as one array, or as columns by name for pipelines that were fitted on a table."""
    if len(specs) == 1 and not hasattr(estimator, "feature_names_in_"):
        return sample[specs[0].name]
    import pandas

    if len(specs) == 1:
        return pandas.DataFrame(sample[specs[0].name], columns=list(estimator.feature_names_in_))
    return pandas.DataFrame({spec.name: sample[spec.name].reshape(-1) for spec in specs})


def normalised(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A model with a free first dimension ``batch``, at least this opset, and without outdated shapes.

    Args:
        proto: the model.
        opset: least version of the standard operators.
    """
    opsets = {one.domain: one for one in proto.opset_import}
    if "" not in opsets:
        proto.opset_import.append(onnx.helper.make_opsetid("", opset))
    elif opsets[""].version < opset:
        proto = onnx.version_converter.convert_version(proto, opset)
    proto.ir_version = max(proto.ir_version, 8)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.shape.dim:
            first = value.type.tensor_type.shape.dim[0]
            first.Clear()
            first.dim_param = "batch"
    del proto.graph.value_info[:]
    return proto
