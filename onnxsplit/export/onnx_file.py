"""ONNX files: the model is checked, its shapes are inferred, and its opset is changed when asked."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxsplit.cost.example import find_example
from onnxsplit.errors import ExportError, InputError, ModelError, one_line
from onnxsplit.export import finish
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.sources import Source
from onnxsplit.model.external_data import external_range, is_external, load_external
from onnxsplit.model.graph import build_graph
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.shapes import input_specs
from onnxsplit.model.source import SourceModel, open_model
from onnxsplit.session import host_cores, open_session
from onnxsplit.tensors import Array


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a model file; its reference is the file itself, run by ONNX Runtime.

    Raises:
        ExportError: the model does not run on this host, so that it cannot be compared.
        ModelError: the file is not a usable ONNX model.
    """
    assert source.path is not None
    path = source.path
    model = open_model(path)
    graph = build_graph(model)
    held: list[Any] = []

    def write(file: Path) -> None:
        files = {external_range(path, tensor)[0] for tensor in graph_tensors(model.proto.graph) if is_external(tensor)}
        size = path.stat().st_size + sum(part.stat().st_size for part in files)
        version = next((one.version for one in model.proto.opset_import if one.domain in ("", "ai.onnx")), None)
        raised = options.opset is not None and version != options.opset
        if raised and size > finish.LARGE_BYTES:
            raise ExportError(
                f"{path} is larger than 2 GB, the most that ONNX's converter takes, so its opset cannot be changed"
            )
        if raised or size <= finish.LARGE_BYTES:
            _small(model, file, options.opset if raised else None)
        else:
            _large(model, file)

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        if not held:
            held.append(open_session(path, threads=host_cores(), custom_ops=options.libraries))
        outputs: dict[str, Array] = held[0].run(sample)
        return outputs

    samples: list[dict[str, Array]] = []
    if options.check:
        try:
            example = find_example(
                graph,
                input_specs(graph),
                {},
                threads=host_cores(),
                provider="cpu",
                say=options.say,
                custom_ops=options.libraries,
            )
            samples = [dict(example.inputs)]
        except (ModelError, InputError) as error:
            raise ExportError(
                f"{path} does not run on this host, so it cannot be compared: {error}. Use --no-check"
            ) from error
    return [Conversion(framework=f"ONNX {onnx.__version__}", write=write, samples=samples, reference=reference)]


def _small(model: SourceModel, file: Path, opset: int | None) -> None:
    """Write a model with all its data inside, in another opset when one is given."""
    path, proto = model.path, onnx.ModelProto()
    proto.CopyFrom(model.proto)
    load_external(path, graph_tensors(proto.graph))
    if opset is not None:
        try:
            proto = onnx.version_converter.convert_version(proto, opset)
        except Exception as error:  # ONNX's converter raises plain RuntimeErrors
            raise ExportError(f"{path} cannot be converted to opset {opset}: {one_line(error, 300)}") from error
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:  # as above
        raise ExportError(f"the shapes in {path} contradict each other: {one_line(error, 300)}") from error
    onnx.save(proto, str(file))


def _large(model: SourceModel, file: Path) -> None:
    """Write a model with its external data in files of the new model's name, and infer its shapes from the file."""
    names: dict[Path, str] = {}
    for tensor in graph_tensors(model.proto.graph):
        if is_external(tensor):
            part = external_range(model.place, tensor)[0]
            if part not in names:
                names[part] = f"{file.name}.data{len(names) or ''}"
                shutil.copyfile(part, file.parent / names[part])  # a loader would refuse a link
            next(entry for entry in tensor.external_data if entry.key == "location").value = names[part]
    file.write_bytes(model.proto.SerializeToString())
    onnx.shape_inference.infer_shapes_path(str(file), str(file))
