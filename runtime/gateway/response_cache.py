"""A cache of outputs: a request whose inputs were seen before is answered without a run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from onnxsplit.tensors import Array, content_bytes

_DIGEST_BYTES = 32
_ENTRY_BYTES = 1024  # of an entry, beside its arrays


class ResponseCache:
    """Outputs by the content of their requests, up to a number of bytes; those unused for longest leave first.

    It suits models whose outputs depend on their inputs alone. Names, types, shapes and all bytes of the inputs, the
    outputs that are asked for, and the plan are part of the key, a digest that nobody can find twice on purpose.

    Args:
        size_bytes: Most bytes of the outputs that are kept.

    Attributes:
        held_bytes: Bytes of the outputs that are kept.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._entries: OrderedDict[bytes, tuple[dict[str, Array], int]] = OrderedDict()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def key(plan: str, outputs: Sequence[str], inputs: Mapping[str, Array]) -> bytes:
        """The key of a request.

        Args:
            plan: Identity of the plan.
            outputs: Names of the requested outputs.
            inputs: Arrays by input name.
        """
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        digest.update(repr((plan, tuple(outputs))).encode())
        for name, array in sorted(inputs.items()):
            digest.update(repr((name, str(array.dtype), array.shape)).encode())
            if array.dtype == object:
                for text in array.ravel().tolist():
                    data = text.encode()
                    digest.update(len(data).to_bytes(8, "little"))
                    digest.update(data)
            else:
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.digest()

    def find(self, key: bytes) -> dict[str, Array] | None:
        """The outputs of a request; None if its like was not kept. The arrays must not be changed."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return dict(entry[0])

    def keep(self, key: bytes, outputs: Mapping[str, Array]) -> None:
        """Keep the outputs of a request. Outputs that take more than half of the cache are not kept."""
        size = _ENTRY_BYTES + sum(map(content_bytes, outputs.values()))
        if key in self._entries or 2 * size > self._size_bytes:
            return
        # A view would keep all rows of the batch that it belongs to.
        own = {name: array if array.base is None else np.array(array) for name, array in outputs.items()}
        self._entries[key] = own, size
        self.held_bytes += size
        while self.held_bytes > self._size_bytes:
            _, (_, left) = self._entries.popitem(last=False)
            self.held_bytes -= left
