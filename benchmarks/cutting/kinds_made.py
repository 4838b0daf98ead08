"""Small models of the kinds that users have, with the inputs on which they are checked.

Each function of ``CLASSES`` writes a model into a folder of its own and returns its path, or None if the package that
it needs is not installed. Inputs that need certain values are beside the model, as ``MODEL.npz`` or ``MODEL.*.npz``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


class Net:
    """A model that is built op by op; each op returns the name of its first output."""

    def __init__(self, kind: int = TensorProto.FLOAT, seed: int = 0) -> None:
        self.kind = kind
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def takes(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """Add an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def gives(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> None:
        """Make a tensor an output."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, value: Any, name: str | None = None) -> str:
        """Add an initializer with these values."""
        name = name or f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int, name: str | None = None) -> str:
        """Add a random initializer of the network's float type, scaled so that values stay near 1."""
        values = self.random.standard_normal(shape) / np.sqrt(shape[0] if len(shape) == 2 else np.prod(shape[1:]) or 1)
        return self.constant(values.astype(helper.tensor_dtype_to_np_dtype(self.kind)), name)

    def ones(self, *shape: int) -> str:
        """Add an initializer of ones of the network's float type."""
        return self.constant(np.ones(shape, helper.tensor_dtype_to_np_dtype(self.kind)))

    def op(self, op_type: str, *inputs: str, out: str | Sequence[str] | None = None, **attributes: Any) -> str:
        """Add an op."""
        outputs = [out] if isinstance(out, str) else list(out or [f"t{len(self.nodes)}"])
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"n{len(self.nodes)}", **attributes))
        return outputs[0]

    def proto(self, *, opset: int = 17, ir_version: int = 8, domains: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the model."""
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.weights)
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)

    def save(self, path: Path, **words: Any) -> Path:
        """Write the model."""
        onnx.save(self.proto(**words), path)
        return path


def float16_encoder(folder: Path) -> Path:
    """Six blocks of LayerNormalization and MatMul in float16 between float32 ends, as converters write them."""
    net = Net(TensorProto.FLOAT16)
    hidden = net.op("Cast", net.takes("x", ["batch", 96]), to=TensorProto.FLOAT16)
    for _ in range(6):
        normal = net.op("LayerNormalization", hidden, net.ones(96), axis=-1)
        mixed = net.op("Tanh", net.op("Add", net.op("MatMul", normal, net.weight(96, 96)), net.weight(96)))
        hidden = net.op("Add", hidden, mixed)
    net.op("Cast", hidden, to=TensorProto.FLOAT, out="y")
    net.gives("y", ["batch", 96])
    return net.save(folder / "float16_encoder.onnx")


def bfloat16_weights(folder: Path) -> Path:
    """Weights that are stored as bfloat16 and cast before they are used."""
    net = Net(TensorProto.BFLOAT16)
    hidden = net.takes("x", ["batch", 64])
    for step in range(6):
        hidden = net.op("MatMul", hidden, net.op("Cast", net.weight(64, 64), to=TensorProto.FLOAT))
        hidden = net.op("Tanh", hidden, out="y" if step == 5 else None)
    net.gives("y", ["batch", 64])
    return net.save(folder / "bfloat16_weights.onnx")


def float16_ends(folder: Path) -> Path:
    """A float16 network whose inputs and outputs are float16 too."""
    net = Net(TensorProto.FLOAT16)
    hidden = net.takes("x", ["batch", 64], TensorProto.FLOAT16)
    for step in range(6):
        hidden = net.op("MatMul", hidden, net.weight(64, 64))
        hidden = net.op("Tanh", hidden, out="y" if step == 5 else None)
    net.gives("y", ["batch", 64], TensorProto.FLOAT16)
    return net.save(folder / "float16_ends.onnx")


def decoder_inputs(path: Path, heads: int, width: int, layers: int) -> None:
    """Inputs of five first tokens without a past, and of a sixth token after them."""
    random = np.random.default_rng(1)
    for name, past, sequence in (("prefill", 0, 5), ("step", 5, 1)):
        cache = {
            f"past_key_values.{layer}.{what}": random.standard_normal((1, heads, past, width)).astype(np.float32)
            for layer in range(layers)
            for what in ("key", "value")
        }
        ids = random.integers(0, 50, (1, sequence))
        np.savez(f"{path}.{name}.npz", input_ids=ids, attention_mask=np.ones((1, past + sequence), np.int64), **cache)


def decoder(path: Path, total: str) -> Path:
    """A decoder with its cache. ``total`` is the exporter's name for the length of past and new tokens together."""
    heads, width, layers, words = 2, 8, 2, 50
    net = Net()
    ids = net.takes("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    mask = net.takes("attention_mask", ["batch_size", total], TensorProto.INT64)
    hidden = net.op("Gather", net.weight(words, heads * width), ids)
    hiding = net.op("Sub", net.constant(np.float32(1)), net.op("Cast", mask, to=TensorProto.FLOAT))
    bias = net.op("Unsqueeze", net.op("Mul", hiding, net.constant(np.float32(-1e4))), net.constant([1, 2]))
    split, joined = net.constant([0, 0, heads, width]), net.constant([0, 0, heads * width])

    def projected() -> str:
        rows = net.op("MatMul", hidden, net.weight(heads * width, heads * width))
        return net.op("Transpose", net.op("Reshape", rows, split), perm=[0, 2, 1, 3])

    for layer in range(layers):
        query, now = projected(), {}
        for what in ("key", "value"):
            shape = ["batch_size", heads, "past_sequence_length", width]
            past = net.takes(f"past_key_values.{layer}.{what}", shape)
            now[what] = net.op("Concat", past, projected(), axis=2, out=f"present.{layer}.{what}")
            net.gives(now[what], ["batch_size", heads, total, width])
        scores = net.op("MatMul", query, net.op("Transpose", now["key"], perm=[0, 1, 3, 2]))
        shares = net.op("Softmax", net.op("Add", scores, bias), axis=-1)
        mixed = net.op("Transpose", net.op("MatMul", shares, now["value"]), perm=[0, 2, 1, 3])
        added = net.op("MatMul", net.op("Reshape", mixed, joined), net.weight(heads * width, heads * width))
        hidden = net.op("Add", hidden, added)
    net.op("MatMul", hidden, net.weight(heads * width, words), out="logits")
    net.gives("logits", ["batch_size", "sequence_length", words])
    decoder_inputs(path, heads, width, layers)
    return net.save(path)


def decoder_with_a_sum(folder: Path) -> Path:
    """A decoder whose mask has the dimension that Optimum writes today."""
    return decoder(folder / "decoder_with_a_sum.onnx", "past_sequence_length + sequence_length")


def decoder_with_a_name(folder: Path) -> Path:
    """A decoder whose mask has a dimension with a name of its own."""
    return decoder(folder / "decoder_with_a_name.onnx", "total_sequence_length")


def decoder_of_groups(folder: Path) -> Path:
    """A decoder of com.microsoft ops: GroupQueryAttention, MatMulNBits, SkipSimplifiedLayerNormalization."""
    heads, groups, width, layers, words = 4, 2, 16, 2, 50
    size, path = heads * width, folder / "decoder_of_groups.onnx"
    net = Net()
    ids = net.takes("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    mask = net.takes("attention_mask", ["batch_size", "total_sequence_length"], TensorProto.INT64)
    one = net.constant([1])
    lengths = net.op("Sub", net.op("ReduceSum", mask, one), one)
    lengths = net.op("Squeeze", net.op("Cast", lengths, to=TensorProto.INT32), one)
    total = net.op("Gather", net.op("Shape", mask), net.constant(np.int64(1)))
    total = net.op("Cast", total, to=TensorProto.INT32)
    angles = np.outer(np.arange(64), 100.0 ** (-np.arange(width // 2) / (width // 2))).astype(np.float32)
    turns = net.constant(np.cos(angles)), net.constant(np.sin(angles))

    def quantised(hidden: str, columns: int) -> str:
        weight = net.constant(net.random.integers(0, 256, (columns, size // 16, 8)).astype(np.uint8))
        scale = net.constant((net.random.random(columns * size // 16) / 16).astype(np.float32))
        sizes = {"K": size, "N": columns, "bits": 4, "block_size": 16}
        return net.op("MatMulNBits", hidden, weight, scale, domain=MICROSOFT, **sizes)

    skip = net.op("Gather", net.weight(words, size), ids)
    hidden = net.op("SimplifiedLayerNormalization", skip, net.ones(size), axis=-1, epsilon=1e-5)
    for layer in range(layers):
        shape = ["batch_size", groups, "past_sequence_length", width]
        past = [net.takes(f"past_key_values.{layer}.{what}", shape) for what in ("key", "value")]
        now = [f"present.{layer}.{what}" for what in ("key", "value")]
        for name in now:
            net.gives(name, ["batch_size", groups, "total_sequence_length", width])
        parts = quantised(hidden, size), quantised(hidden, groups * width), quantised(hidden, groups * width)
        mixed = net.op(
            "GroupQueryAttention", *parts, *past, lengths, total, *turns, out=[f"mixed{layer}", *now],
            domain=MICROSOFT, num_heads=heads, kv_num_heads=groups, do_rotary=1,
        )  # fmt: skip
        outputs = [f"normal{layer}", "", "", f"skip{layer}"]  # exporters leave optional outputs out like this
        hidden = net.op(
            "SkipSimplifiedLayerNormalization", skip, quantised(mixed, size), net.ones(size), out=outputs,
            domain=MICROSOFT, epsilon=1e-5,
        )  # fmt: skip
        skip = outputs[-1]
    net.op("MatMul", net.op("Add", hidden, skip), net.weight(size, words), out="logits")
    net.gives("logits", ["batch_size", "sequence_length", words])
    decoder_inputs(path, groups, width, layers)
    return net.save(path, domains=[MICROSOFT])


def ir3_pictures(folder: Path) -> Path:
    """A convolutional network of 2018: IR version 3, where each initializer must be an input too."""
    net = Net()
    hidden, channels = net.takes("x", [1, 3, 24, 24]), 3
    for step in range(4):
        name = net.weight(8, channels, 3, 3)
        net.takes(name, [8, channels, 3, 3])
        hidden = net.op("Conv", hidden, name, pads=[1] * 4, kernel_shape=[3, 3])
        hidden, channels = net.op("Relu", hidden, out="y" if step == 3 else None), 8
    net.gives("y", [1, 8, 24, 24])
    return net.save(folder / "ir3_pictures.onnx", opset=7, ir_version=3)


def input_with_default(folder: Path) -> Path:
    """An input that is also an initializer: the caller gives another value."""
    net, path = Net(), folder / "input_with_default.onnx"
    x = net.takes("x", ["batch", 8])
    scale = net.takes(net.constant(np.array([2.0], np.float32), "scale"), [1])
    hidden = net.op("Tanh", net.op("MatMul", net.op("Mul", x, scale), net.weight(8, 8)))
    net.op("Mul", net.op("MatMul", hidden, net.weight(8, 8)), scale, out="y")
    net.gives("y", ["batch", 8])
    np.savez(f"{path}.npz", x=np.ones((2, 8), np.float32), scale=np.array([0.5], np.float32))
    return net.save(path)


def chain(net: Net, hidden: str, width: int, shape: Sequence[int | str]) -> None:
    """Four layers to the output ``y``."""
    for step in range(4):
        hidden = net.op("MatMul", hidden, net.weight(width, width))
        hidden = net.op("Tanh", hidden, out="y" if step == 3 else None)
    net.gives("y", shape)


def hub_cache(folder: Path) -> Path:
    """A model and its weights as huggingface_hub keeps them: links in ``snapshots`` to files in ``blobs``."""
    net = Net()
    chain(net, net.takes("x", ["batch", 128]), 128, ["batch", 128])
    blobs, snapshot = folder / "hub_cache/blobs", folder / "hub_cache/snapshots/0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    outside = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
    onnx.save(net.proto(), blobs / "model.onnx", **outside)
    for name, content in (("model.onnx", "5e1f"), ("model.onnx_data", "77aa")):
        (blobs / name).rename(blobs / content)
        (snapshot / name).symlink_to(f"../../blobs/{content}")
    return snapshot / "model.onnx"


def tied_weights(folder: Path) -> Path:
    """A table that embeds and scores words: two initializers on the same bytes of an external file."""
    words, width, path = 4096, 64, folder / "tied_weights.onnx"
    net = Net()
    table = (net.random.standard_normal((words, width)) / 8).astype(np.float32)
    Path(f"{path}.data").write_bytes(table.tobytes())
    for name in ("embedding", "head"):
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[words, width], raw_data=b"")
        onnx.external_data_helper.set_external_data(tensor, f"{path.name}.data", 0, table.nbytes)
        tensor.ClearField("raw_data")
        net.weights.append(tensor)
    hidden = net.op("Tanh", net.op("Gather", "embedding", net.takes("ids", ["n"], TensorProto.INT64)))
    net.op("Gemm", hidden, "head", transB=1, out="y")
    net.gives("y", ["n", words])
    return net.save(path)


def scaled_by_largest(folder: Path) -> Path:
    """Pictures are scaled down if any of the batch has values above 1, so a row's answer depends on the others."""
    net, path = Net(), folder / "scaled_by_largest.onnx"
    x = net.takes("x", ["batch", 32])
    largest = net.op("Max", net.op("ReduceMax", x, keepdims=0), net.constant(np.float32(1)))
    chain(net, net.op("Div", x, largest), 32, ["batch", 32])
    values = net.random.random((4, 32)).astype(np.float32) * np.array([[1], [1], [255], [1]], np.float32)
    np.savez(f"{path}.npz", x=values)
    return net.save(path)


def cut_at_longest(folder: Path) -> Path:
    """Frames are cut at the length of the longest row: the output's size depends on the batch."""
    net, path = Net(), folder / "cut_at_longest.onnx"
    frames = net.takes("frames", ["batch", "time", 16])
    longest = net.op("ReduceMax", net.takes("lengths", ["batch"], TensorProto.INT64), keepdims=1)
    frames = net.op("Slice", frames, net.constant([0]), longest, net.constant([1]))
    chain(net, frames, 16, ["batch", "longest", 16])
    np.savez(f"{path}.npz", frames=net.random.random((3, 20, 16)).astype(np.float32), lengths=np.array([6, 20, 11]))
    return net.save(path)


def saved_by_optimiser(folder: Path) -> Path:
    """A convolutional network that ONNX Runtime optimised and saved; it makes the same names a second time."""
    import onnxruntime

    net, path = Net(), folder / "saved_by_optimiser.onnx"
    hidden, channels = net.takes("x", [1, 3, 24, 24]), 3
    for step in range(4):
        hidden = net.op("Conv", hidden, net.weight(8, channels, 3, 3), pads=[1] * 4)
        hidden, channels = net.op("Relu", hidden, out="y" if step == 3 else None), 8
    net.gives("y", [1, 8, 24, 24])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(net.proto().SerializeToString(), options, ["CPUExecutionProvider"])
    return path


def forest_with_map(folder: Path) -> Path | None:
    """A forest as scikit-learn's converter writes it by default: its second output is a sequence of maps."""
    if find_spec("skl2onnx") is None:
        return None
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    path = folder / "forest_with_map.onnx"
    x, classes = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    made = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0)).fit(x, classes)
    path.write_bytes(to_onnx(made, x[:1], target_opset=17).SerializeToString())
    np.savez(f"{path}.npz", X=x[::25])
    return path


def custom_op(folder: Path) -> Path | None:
    """Ops of onnxruntime-extensions on strings before ordinary ones."""
    if find_spec("onnxruntime_extensions") is None:
        return None
    net, path, domain = Net(), folder / "custom_op.onnx", "ai.onnx.contrib"
    upper = net.op("StringUpper", net.takes("words", ["n"], TensorProto.STRING), domain=domain)
    lengths = net.op("Cast", net.op("StringLength", upper, domain=domain), to=TensorProto.FLOAT)
    net.op("Tanh", net.op("Mul", lengths, net.constant(np.float32(0.1))), out="y")
    net.gives("y", ["n"])
    np.savez(f"{path}.npz", words=np.array(["one", "three", ""]))
    return net.save(path, domains=[domain])


CLASSES: tuple[Callable[[Path], Path | None], ...] = (
    float16_encoder,
    float16_ends,
    bfloat16_weights,
    decoder_with_a_sum,
    decoder_with_a_name,
    decoder_of_groups,
    ir3_pictures,
    input_with_default,
    hub_cache,
    tied_weights,
    scaled_by_largest,
    cut_at_longest,
    saved_by_optimiser,
    forest_with_map,
    custom_op,
)
