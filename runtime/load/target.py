"""What a load is sent to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol


class Ended(Protocol):
    """Called once when a request has ended, in any thread."""

    def __call__(self, failure: str | None = None, samples: Mapping[str, Sequence[int]] | None = None) -> None:
        """Take the end of a request.

        Args:
            failure: the kind of its failure in a few words, the same for all failures of one kind; None for an answer.
            samples: further times of the answer in ns, by name.
        """


class LoadTarget(ABC):
    """Something that answers requests. It is opened, used and closed in one event loop.

    A target that works in other threads calls ``ended`` there, as soon as it has the answer: the time of that call is
    the end of the request.
    """

    async def open(self) -> None:  # noqa: B027  many targets have nothing to prepare
        """Prepare for a load, in the loop that will run it."""

    async def close(self) -> None:  # noqa: B027  or to give up
        """Give up the requests in flight, whose ends need not be told any more."""

    @abstractmethod
    def start(self, number: int, ended: Ended) -> None:
        """Start a request, without waiting.

        Args:
            number: counts the requests of a load from 0; a target with several inputs sends them in turn.
            ended: to be called once with the end.
        """
