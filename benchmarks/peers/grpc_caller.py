"""A caller of a server of the Open Inference Protocol over gRPC; answers arrive by callback."""

from __future__ import annotations

from queue import SimpleQueue

import numpy as np
from peer import Peer, Plan, Tensors
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


class Caller(Peer):
    """One client with many requests.

    Args:
        client: a connected client.
        model: name of the model.
        plan: the plan that names the outputs.
        known: tensors of an example run.
        alias: the server's name of each tensor.
    """

    def __init__(
        self, client: InferenceServerClient, model: str, plan: Plan, known: Tensors, alias: dict[str, str]
    ) -> None:
        self.client, self.model, self.plan, self.alias = client, model, plan, alias
        self.shapes = {name: known[name].shape for name in plan.outputs}
        self.answers: SimpleQueue[tuple[InferResult, InferenceServerException | None]] = SimpleQueue()

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        inputs = []
        for name, array in tensors.items():
            array = np.atleast_1d(array)
            inputs.append(InferInput(self.alias[name], array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_infer(self.model, inputs, callback=lambda result, error: self.answers.put((result, error)))

    def take(self) -> Tensors:
        """Wait for the next answer."""
        result, error = self.answers.get()
        if error is not None:
            raise error
        answer = {name: result.as_numpy(self.alias[name]) for name in self.plan.outputs}
        return {name: array if self.shapes[name] else array.reshape(()) for name, array in answer.items()}
