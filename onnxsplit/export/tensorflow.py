"""TensorFlow: SavedModels, Keras 3 and TFLite, by tf2onnx.

Keras models are first exported as a SavedModel, because tf2onnx does not support sequential models of Keras 3.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export import finish
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.sources import Source, refuse_code
from onnxsplit.export.specs import InputSpec, samples
from onnxsplit.tensors import Array, dtype_name

_EXTRA = "pip install 'onnxsplit[tensorflow]'"
_NEWEST_OPSET = 18  # the newest that tf2onnx 1.17 supports
_MOST_CONFIG_BYTES = 64 << 20
_SIGNATURE = "serving_default"


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a SavedModel, a Keras model, or a TFLite model.

    Raises:
        ExportError: the source is not trusted, or cannot be loaded or converted.
        MissingDependency: TensorFlow or tf2onnx is not installed.
    """
    tf, tf2onnx = _required()
    assert source.path is not None
    opset = options.opset or _NEWEST_OPSET
    if opset > _NEWEST_OPSET:
        raise ExportError(
            f"tf2onnx supports opsets up to {_NEWEST_OPSET}, not {opset}; export the ONNX file again to raise its opset"
        )
    if source.kind == "tflite":
        return [_tflite(tf, tf2onnx, source.path, opset)]
    if source.kind == "keras":
        return [_keras(tf, tf2onnx, source, opset, options)]
    return [_saved_model(tf, tf2onnx, source.path, opset, options)]


def _required() -> tuple[Any, Any]:
    """Import TensorFlow, without GPUs, and tf2onnx."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise MissingDependency(f"exporting from TensorFlow needs {error.name}: {_EXTRA}") from error
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    tf.get_logger().setLevel("ERROR")
    return tf, tf2onnx


def _failed(what: str, error: BaseException) -> ExportError:
    return ExportError(f"{what}: {one_line(error, 500)}")


def _saved_model(tf: Any, tf2onnx: Any, path: Path, opset: int, options: ExportOptions) -> Conversion:
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow raises errors of any type
        raise _failed(f"TensorFlow cannot load {path}", error) from error
    if _SIGNATURE not in loaded.signatures:
        raise ExportError(f"{path} has no signature {_SIGNATURE!r}; it has: {', '.join(loaded.signatures) or 'none'}")
    function = loaded.signatures[_SIGNATURE]
    specs = [spec for _, spec in sorted(function.structured_input_signature[1].items())]
    outputs = sorted(function.structured_outputs)
    wrapped = tf.function(
        lambda *arrays: function(**{spec.name: array for spec, array in zip(specs, arrays, strict=True)}),
        input_signature=specs,
    )

    def write(file: Path) -> None:
        try:
            proto, external = tf2onnx.convert.from_function(wrapped, input_signature=specs, opset=opset)
        except Exception as error:  # as above
            raise _failed("tf2onnx could not convert the model", error) from error
        assert external is None
        finish.save(proto, file)

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        assert loaded is not None  # its functions need it
        results = function(**{spec.name: tf.constant(sample[spec.name]) for spec in specs})
        return {name: value.numpy() for name, value in results.items()}

    known = {spec.name: spec for spec in options.inputs}
    if strange := known.keys() - {spec.name for spec in specs}:
        raise ExportError(f"{path} has no input {min(strange)!r}; it has: {', '.join(spec.name for spec in specs)}")
    inputs = [known.get(spec.name) or _spec(spec) for spec in specs]
    free = {spec.name: spec.axes for spec in inputs if spec.axes}
    batched = any(axes.get(0) == "batch" for axes in free.values())
    return Conversion(
        framework=f"TensorFlow {tf.__version__}",
        write=write,
        samples=list(samples(inputs)),
        reference=reference,
        axes=free | ({name: {0: "batch"} for name in outputs} if batched else {}),
    )


def _spec(spec: Any) -> InputSpec:
    """An input of a signature: a free first axis is called ``batch``, other free axes INPUT_AXIS."""
    if spec.shape.rank is None:
        raise ExportError(
            f"the rank of the input {spec.name!r} is unknown; give it: --input {spec.name}=float32[batch,...]"
        )
    shape = tuple(
        size if size is not None else "batch" if axis == 0 else f"{spec.name}_{axis}"
        for axis, size in enumerate(spec.shape)
    )
    dtype = "string" if spec.dtype.name == "string" else dtype_name(np.dtype(spec.dtype.as_numpy_dtype))
    return InputSpec(spec.name, dtype or spec.dtype.name, shape)


def _keras(tf: Any, tf2onnx: Any, source: Source, opset: int, options: ExportOptions) -> Conversion:
    assert source.path is not None
    if not zipfile.is_zipfile(source.path):
        refuse_code(source, "in the older HDF5 form, any layer may be code", trust=options.trust)
    lambdas = _lambdas(source.path)
    if lambdas:
        refuse_code(source, f"it has Lambda layers ({', '.join(lambdas)}), which are code", trust=options.trust)
    try:
        import keras

        model = keras.saving.load_model(source.path, safe_mode=not options.trust, compile=False)
    except Exception as error:  # Keras raises errors of any type
        if "Lambda" in str(error) or "lambda" in str(error):
            refuse_code(source, "it has Lambda layers, which are code", trust=options.trust)
        raise _failed(f"Keras cannot load {source.path}", error) from error
    folder = options.scratch / "saved-model"
    try:
        model.export(str(folder), format="tf_saved_model", verbose=False)
    except Exception as error:  # as above
        raise _failed(f"Keras cannot export {source.path}", error) from error
    made = _saved_model(tf, tf2onnx, folder, opset, options)
    return replace(made, framework=f"Keras {keras.__version__}, {made.framework}")


def _lambdas(path: Path) -> list[str]:
    """Names of the layers that are code, from the JSON configuration in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _MOST_CONFIG_BYTES:
                raise ExportError(f"{path}: its config.json has over {_MOST_CONFIG_BYTES} bytes, the most that is read")
            config = json.loads(archive.read("config.json"))
    except (OSError, KeyError, ValueError, RuntimeError, RecursionError, zlib.error, zipfile.BadZipFile):
        return []  # Keras then reports the error
    names: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("class_name") == "Lambda":
                names.append(str(dict(value.get("config") or {}).get("name", "lambda")))
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(config)
    return list(dict.fromkeys(names))


def _tflite(tf: Any, tf2onnx: Any, path: Path, opset: int) -> Conversion:
    def interpreter() -> Any:
        try:
            made = tf.lite.Interpreter(model_path=str(path), num_threads=1)
            made.allocate_tensors()
        except Exception as error:  # as above
            raise _failed(f"TensorFlow Lite cannot load {path}", error) from error
        return made

    first = interpreter()
    details = sorted(first.get_input_details(), key=lambda detail: detail["index"])
    outputs = first.get_output_details()
    specs = []
    for detail in details:
        signature = detail.get("shape_signature", detail["shape"])
        shape = tuple(
            int(size) if size > 0 else "batch" if axis == 0 else f"{detail['name']}_{axis}"
            for axis, size in enumerate(signature)
        )
        specs.append(InputSpec(detail["name"], dtype_name(np.dtype(detail["dtype"])) or "float32", shape))

    def write(file: Path) -> None:
        try:
            proto, _ = tf2onnx.convert.from_tflite(str(path), opset=opset)
        except Exception as error:  # as above
            raise _failed("tf2onnx could not convert the model", error) from error
        finish.save(proto, file)

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        run = interpreter()
        for detail in details:
            run.resize_tensor_input(detail["index"], sample[detail["name"]].shape)
        run.allocate_tensors()
        for detail in details:
            run.set_tensor(detail["index"], sample[detail["name"]])
        run.invoke()
        return {detail["name"]: run.get_tensor(detail["index"]) for detail in outputs}

    free = {spec.name: spec.axes for spec in specs if spec.axes}
    return Conversion(
        framework=f"TensorFlow Lite {tf.__version__}",
        write=write,
        samples=list(samples(specs)),
        reference=reference,
        axes=free | ({detail["name"]: {0: "batch"} for detail in outputs} if free else {}),
    )
