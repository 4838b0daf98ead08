"""Our own gateway, which its callers reach over HTTP with binary tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import numpy as np
from gateway import served
from http_callers import Callers
from peer import Plan, Tensors, main, raw
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype


def request(tensors: Tensors) -> tuple[bytes, int]:
    """Return the body of a request, and the length of its JSON."""
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": np_to_triton_dtype(array.dtype),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in tensors.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([head, *map(raw, tensors.values())]), len(head)


def answer(body: bytes, length: int) -> Tensors:
    """Return the tensors of an answer; they share its memory."""
    found, start = {}, length
    for output in json.loads(body[:length])["outputs"]:
        end = start + output["parameters"]["binary_data_size"]
        kind = triton_to_np_dtype(output["datatype"])
        found[output["name"]] = np.frombuffer(memoryview(body)[start:end], kind).reshape(output["shape"])
        start = end
    return found


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Callers]:
    """Start the server and its callers."""
    with served(plan) as server:

        def ask(connection: HTTPConnection, tensors: Tensors) -> Tensors:
            body, length = request(tensors)
            headers = {"Inference-Header-Content-Length": str(length)}
            connection.request("POST", f"/v2/models/{server['model']}/infer", body, headers)
            response = connection.getresponse()
            found = response.read()
            if response.status != 200:
                raise RuntimeError(found.decode(errors="replace"))
            return answer(found, int(response.headers["Inference-Header-Content-Length"]))

        callers = Callers(int(server["http"].rpartition(":")[2]), inflight, ask)
        try:
            yield callers
        finally:
            callers.close()


if __name__ == "__main__":
    main(start)
