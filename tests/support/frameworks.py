"""Models of many frameworks, as their users save them: small ones, trained a little where that is quick."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
}


@dataclass(frozen=True)
class Model:
    """A way to make one model.

    Attributes:
        name: name of the model.
        needs: required packages.
        make: saves it in a folder and returns the source for the command.
        options: options of the export.
        dims: sizes of dimensions for the cut.
    """

    name: str
    needs: tuple[str, ...]
    make: Callable[[Path], str]
    options: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)


def models() -> Iterator[Model]:
    """Return all models."""
    yield from _pytorch()
    yield from _transformers()
    yield from _tensorflow()
    yield from _sklearn()
    yield from _boosters()
    yield from _jax()
    yield Model("onnx, opset raised", ("onnx",), _onnx, {"opset": 20})


def _code(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return str(folder / f"{name}.py")


NETWORK = """
import torch
from onnxsplit.export import Recipe

class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Linear(width, 5)

    def forward(self, image):
        return self.second(torch.relu(self.first(image)).mean((2, 3))).softmax(-1)

def build(width=8):
    torch.manual_seed(0)
    return Recipe(Net(width).eval(), {'image': torch.randn(2, 3, 12, 10)}, ('scores',),
                  {'image': {0: 'batch', 2: 'height', 3: 'width'}})

def doubled(x, y):
    return x * 2 + y, (x @ y.T).tanh()
"""


def _pytorch() -> Iterator[Model]:
    from onnxsplit.export.specs import parse_spec

    def recipe(folder: Path) -> str:
        return _code(folder, "recipe", NETWORK)

    def program(folder: Path) -> str:
        import torch

        network, given = _net(folder), torch.randn(2, 3, 12, 10)
        free = torch.export.Dim("batch")
        torch.export.save(torch.export.export(network, (given,), dynamic_shapes=({0: free},)), folder / "net.pt2")
        return str(folder / "net.pt2")

    def script(folder: Path) -> str:
        import torch

        torch.jit.trace(_net(folder), torch.randn(2, 3, 12, 10)).save(folder / "script.pt")
        return str(folder / "script.pt")

    image = {"inputs": (parse_spec("image=float32[batch,3,12,10]"),)}
    pair = {"inputs": (parse_spec("x=float32[batch,4]"), parse_spec("y=float32[batch,4]"))}
    yield Model("PyTorch recipe", ("torch",), recipe, dims={"batch": 2, "height": 12, "width": 10})
    yield Model("PyTorch module class", ("torch",), lambda folder: recipe(folder) + ":Net", image)
    yield Model("PyTorch function", ("torch",), lambda folder: recipe(folder) + ":doubled", pair)
    yield Model("PyTorch ExportedProgram", ("torch",), program, {"trust": True})
    yield Model("PyTorch TorchScript", ("torch",), script, {"trust": True, **image})


def _net(folder: Path) -> Any:
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("network", _code(folder, "network", NETWORK))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Net().eval()


def _transformers() -> Iterator[Model]:
    needs = ("torch", "transformers")

    def config(name: str, **content: Any) -> Callable[[Path], str]:
        def make(folder: Path) -> str:
            (folder / f"{name}.json").write_text(json.dumps(content))
            return str(folder / f"{name}.json")

        return make

    def local(folder: Path) -> str:
        import transformers

        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
        made.save_pretrained(folder / "llama")
        return str(folder / "llama")

    text = {"batch": 2, "sequence": 6}
    cached = {**text, "past_sequence": 3, "total_sequence": 9}
    bert = config("bert", model_type="bert", architectures=["BertForSequenceClassification"], **SMALL)
    gpt2 = config(
        "gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=64, n_layer=2, n_head=4, vocab_size=300
    )
    t5 = config(
        "t5", model_type="t5", architectures=["T5ForConditionalGeneration"], d_model=64, d_kv=16, d_ff=96, num_layers=2,
        num_heads=4, vocab_size=300,
    )  # fmt: skip
    vit = config(
        "vit", model_type="vit", architectures=["ViTForImageClassification"], image_size=32, patch_size=8,
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    )  # fmt: skip
    yield Model("transformers BERT classifier", needs, bert, dims=text)
    yield Model("transformers GPT-2, cache", needs, gpt2, dims=cached)
    yield Model("transformers GPT-2, no cache", needs, gpt2, {"cache": False}, text)
    yield Model("transformers Llama folder, cache", needs, local, dims=cached)
    yield Model("transformers T5, two models", needs, t5, dims={**text, "encoder_sequence": 7})
    yield Model("transformers ViT", needs, vit)


def _tensorflow() -> Iterator[Model]:
    needs = ("tensorflow", "tf2onnx")

    def picture() -> Any:
        import keras

        keras.utils.set_random_seed(0)
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((16, 16, 3), name="image"),
                layers.Conv2D(8, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(5, activation="softmax"),
            ]
        )

    def saved(folder: Path) -> str:
        picture().export(str(folder / "saved"), format="tf_saved_model", verbose=False)
        return str(folder / "saved")

    def file(folder: Path) -> str:
        import keras

        made = keras.Sequential([keras.Input((None, 6), name="series"), keras.layers.LSTM(8), keras.layers.Dense(3)])
        made.save(folder / "lstm.keras")
        return str(folder / "lstm.keras")

    def lite(folder: Path) -> str:
        import tensorflow as tf

        (folder / "picture.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(saved(folder)).convert())
        return str(folder / "picture.tflite")

    yield Model("TensorFlow SavedModel", needs, saved)
    yield Model("Keras LSTM", needs, file)
    yield Model("TFLite", needs, lite)


def table(rows: int = 200, columns: int = 6) -> tuple[Any, Any]:
    """Return rows and their classes."""
    source = np.random.default_rng(0)
    given = source.standard_normal((rows, columns)).astype(np.float32)
    return given, (given[:, 0] + given[:, 1] * given[:, 2] > 0).astype(int) + (given[:, 3] > 1)


def _sklearn() -> Iterator[Model]:
    needs = ("sklearn", "skl2onnx", "skops")

    def skops(name: str, estimator: Callable[[], Any]) -> Callable[[Path], str]:
        def make(folder: Path) -> str:
            import skops.io

            skops.io.dump(estimator().fit(*table()), folder / f"{name}.skops")
            return str(folder / f"{name}.skops")

        return make

    def logistic() -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression())

    def forest() -> Any:
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(20, max_depth=5, random_state=0)

    def perceptron() -> Any:
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(hidden_layer_sizes=(16,), max_iter=300, random_state=0)

    def pickled(folder: Path) -> str:
        import joblib
        from sklearn.ensemble import HistGradientBoostingClassifier

        joblib.dump(HistGradientBoostingClassifier(max_iter=20).fit(*table()), folder / "boosting.joblib")
        return str(folder / "boosting.joblib")

    yield Model("scikit-learn scaler + logistic regression", needs, skops("logistic", logistic))
    yield Model("scikit-learn random forest", needs, skops("forest", forest))
    yield Model("scikit-learn perceptron", needs, skops("perceptron", perceptron))
    yield Model("scikit-learn boosting, joblib", needs, pickled, {"trust": True})


def _boosters() -> Iterator[Model]:
    def lightgbm(folder: Path) -> str:
        import lightgbm

        given, classes = table()
        made = lightgbm.train(
            {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1},
            lightgbm.Dataset(given, classes),
            10,
        )
        made.save_model(folder / "light.txt")
        return str(folder / "light.txt")

    def xgboost(folder: Path) -> str:
        import xgboost

        given, classes = table()
        data = xgboost.DMatrix(given, (classes > 0).astype(int))
        xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, 10).save_model(folder / "x.json")
        return str(folder / "x.json")

    def catboost(folder: Path) -> str:
        import catboost

        made = catboost.CatBoostClassifier(iterations=10, verbose=False, allow_writing_files=False, thread_count=1)
        made.fit(*table())
        made.save_model(str(folder / "cat.cbm"))
        return str(folder / "cat.cbm")

    yield Model("LightGBM", ("lightgbm", "onnxmltools"), lightgbm)
    yield Model("XGBoost", ("xgboost", "onnxmltools"), xgboost)
    yield Model("CatBoost", ("catboost",), catboost)


FUNCTION = """
import jax
import jax.numpy as jnp
import numpy as np

W = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)

def perceptron(x):
    return {'scores': jax.nn.softmax(jnp.tanh(x @ W)), 'norm': jnp.sqrt((x * x).sum(-1))}

@jax.jit
def attention(query, key):
    return jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2) / 3.0) @ key
"""


def _jax() -> Iterator[Model]:
    from onnxsplit.export.specs import parse_spec

    def code(name: str) -> Callable[[Path], str]:
        return lambda folder: f"{_code(folder, 'functions', FUNCTION)}:{name}"

    one = {"inputs": (parse_spec("x=float32[batch,8]"),)}
    two = {"inputs": tuple(parse_spec(f"{name}=float32[batch,time,8]") for name in ("query", "key"))}
    yield Model("JAX perceptron", ("jax", "jax2onnx"), code("perceptron"), one)
    yield Model("JAX attention", ("jax", "jax2onnx"), code("attention"), two)


def _onnx(folder: Path) -> str:
    import build

    return str(build.save(build.chain(4), folder, "chain.onnx"))
