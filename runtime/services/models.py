"""The models of a service within its worker: each request is sent to the gateway, whose pipeline runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from onnxsplit.plan_files import load_plan
from onnxsplit.tensors import Array
from runtime.errors import PipelineError
from runtime.requests.normalize import normal_inputs, normal_names, normal_timeout_ns

AskGateway = Callable[
    [str, dict[str, Array], tuple[str, ...] | None, int | None], Coroutine[Any, Any, dict[str, Array]]
]
"""Asks a model by name: with inputs, the names of outputs, and the nanoseconds for it."""


class GatewayModel:
    """A model that the gateway runs.

    Args:
        name: the service's name for it.
        folder: its plan.
        ask: asks the gateway.
        loop: the worker's event loop, in which ``ask`` runs.
    """

    def __init__(self, name: str, folder: Path, ask: AskGateway, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.plan = load_plan(folder)
        self._specs = {
            each: (self.plan.tensors[each].dtype, self.plan.tensors[each].shape) for each in self.plan.inputs
        }
        self._required = [each for each in self.plan.inputs if each not in self.plan.defaults]
        self._ask = ask
        self._loop = loop

    def __repr__(self) -> str:
        return f"<model {self.name!r}: {', '.join(self.plan.inputs)} -> {', '.join(self.plan.outputs)}>"

    def run(self, inputs: Any, *, outputs: Any = None, timeout: float | None = None) -> dict[str, Array]:
        """Run one request and wait for its outputs; as :meth:`runtime.pipeline.Pipeline.run`.

        Raises:
            InputError: the request does not fit the model.
            PipelineError: it failed, or this is called in the event loop, which it would block.
        """
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            raise PipelineError(
                f"run would block the worker's event loop; write: await models[{self.name!r}].arun(...)"
            )
        return asyncio.run_coroutine_threadsafe(
            self.arun(inputs, outputs=outputs, timeout=timeout), self._loop
        ).result()

    async def arun(self, inputs: Any, *, outputs: Any = None, timeout: float | None = None) -> dict[str, Array]:
        """Run one request and wait for its outputs, within an event loop. Raises as :meth:`run`."""
        arrays = normal_inputs(inputs, self._specs, self._required)
        asked = self._ask(self.name, arrays, normal_names(outputs), normal_timeout_ns(timeout))
        if asyncio.get_running_loop() is self._loop:
            return await asked
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self._loop))
