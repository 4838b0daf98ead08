"""A served model whose plan changes: how to ask for it, and callers who notice if an answer is lost or wrong."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
from served import Served
from waiting import wait_until

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
X = np.linspace(-1, 1, 32, dtype=np.float32)[None]
PATH = "/v2/repository/models/model/recut"


def serve(folder: Path, *words: object, plan: str = "model.plan", **more: Any) -> Served:
    return Served(folder / plan, *words, environment=ENVIRONMENT, **more)


def asked(x: np.ndarray = X) -> bytes:
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def answer(server: Served, x: np.ndarray = X, model: str = "model") -> np.ndarray:
    return np.array(server.json(f"/v2/models/{model}/infer", json.loads(asked(x)))["outputs"][0]["data"], np.float32)


def recut(server: Served, document: Any, **headers: str) -> tuple[int, Any]:
    """Ask for a change of the plan; the status and the document of the answer."""
    status, _, body = server.ask(PATH, json.dumps(document).encode(), **headers)
    return status, json.loads(body)


def begun(server: Served, plan: str = "early.plan") -> Future[tuple[int, Any]]:
    """Ask for a change of the plan in another thread, and wait until two plans have nodes."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(recut, server, {"plan": plan})
    pool.shutdown(wait=False)
    wait_until(lambda: future.done() or len(generations(server)["generations"]) == 2)
    assert not future.done(), future.result()
    return future


def generations(server: Served) -> Any:
    return server.json("/v2/models/model/generations")


class GrpcCaller:
    """Calls a model over gRPC."""

    def __init__(self, server: Served) -> None:
        self.client = triton_grpc.InferenceServerClient(server.grpc)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        tensor = triton_grpc.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return self.client.infer("model", [tensor]).as_numpy("y").ravel()


@contextmanager
def callers(callables: list[Callable[[np.ndarray], np.ndarray]]) -> Iterator[list[int]]:
    """Call with inputs of its own from a thread each; yields the numbers of answers so far. None may fail or differ."""
    inputs = [X * (number + 1) for number in range(len(callables))]
    expected = [call(x) for call, x in zip(callables, inputs, strict=True)]
    answered, stop = [0] * len(callables), threading.Event()

    def go_on(number: int) -> None:
        while not stop.is_set():
            np.testing.assert_allclose(callables[number](inputs[number]), expected[number], rtol=1e-4, atol=1e-5)
            answered[number] += 1

    with ThreadPoolExecutor(len(callables)) as pool:
        going = [pool.submit(go_on, number) for number in range(len(callables))]
        try:
            yield answered
        finally:
            stop.set()
            for each in going:
                each.result()


def more(answered: list[int], count: int = 5) -> None:
    """Wait until every caller has got some more answers."""
    before = list(answered)
    wait_until(lambda: all(now >= then + count for now, then in zip(answered, before, strict=True)))
