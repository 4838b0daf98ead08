"""Callers of a server that use little processor time: one request at a time on a connection that stays open."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

Call = Callable[[], tuple[int, str]]
"""One request and its answer: a status as HTTP has it, and what was said when it failed."""


def http_body(inputs: dict[str, np.ndarray], **parameters: object) -> tuple[bytes, int]:
    """Return the body of a request with binary inputs and outputs, and the length of its JSON."""
    said = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": np_to_triton_dtype(array.dtype),
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in inputs.items()
        ],
        "parameters": {"binary_data_output": True, **parameters},
    }
    head = json.dumps(said).encode()
    return head + b"".join(array.tobytes() for array in inputs.values()), len(head)


def over_http(address: str, model: str, inputs: dict[str, np.ndarray], **parameters: object) -> Call:
    """Make a caller over HTTP that prepares its request once and reads only the necessary part of an answer."""
    host, _, port = address.partition(":")
    body, length = http_body(inputs, **parameters)
    message = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {length}\r\n\r\n"
    ).encode() + body
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> tuple[int, str]:
        connection.sendall(message)
        data = connection.recv(1 << 16)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += connection.recv(1 << 16)
        head = data[:end].lower()
        size = int(head.partition(b"\ncontent-length: ")[2].split(b"\r\n", 1)[0])
        while len(data) < end + 4 + size:
            data += connection.recv(1 << 20)
        status = int(head.split(b" ", 2)[1])
        return status, "" if status == 200 else json.loads(data[end + 4 :])["error"]

    return call


def over_grpc(address: str, model: str, inputs: dict[str, np.ndarray], **_: object) -> Call:
    """Make a caller over gRPC with a separate channel."""
    import grpc

    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address, options=options))
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())

    def call() -> tuple[int, str]:
        try:
            stub.ModelInfer(request)
        except grpc.RpcError as error:
            return 503 if error.code() is grpc.StatusCode.UNAVAILABLE else 500, error.details()
        return 200, ""

    return call


@dataclass
class Load:
    """The answers that callers got.

    Attributes:
        seconds: duration of the load.
        times: seconds of each answered request.
        refused: message of a refusal -> number of requests.
    """

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def per_s(self) -> float:
        """The answers per second."""
        return len(self.times) / self.seconds

    def percentile_ms(self, share: float) -> float:
        """Return a percentile of the times of answered requests, in milliseconds."""
        ordered = sorted(self.times)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def drive(calls: list[Call], seconds: float) -> Load:
    """Run callers for this many seconds, each in a thread; requests in flight at the end are counted."""
    load = Load()
    lock = threading.Lock()
    begun = time.perf_counter()

    def go_on(call: Call) -> None:
        times, refused = [], {}
        while time.perf_counter() - begun < seconds:
            at = time.perf_counter()
            status, words = call()
            if status == 200:
                times.append(time.perf_counter() - at)
            else:
                key = f"{status} {words}"
                refused[key] = refused.get(key, 0) + 1
        with lock:
            load.times += times
            for key, count in refused.items():
                load.refused[key] = load.refused.get(key, 0) + count

    threads = [threading.Thread(target=go_on, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - begun
    return load
