"""What a load is sent to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct


class EndDetail(Struct, frozen=True, kw_only=True):
    """What is known of the end of a request besides its time.

    Attributes:
        message: what the target said when it failed.
        times: further times of an answer in ns, by name; the time until the first token, for example.
        counts: amounts that an answer brought, by name; tokens, for example.
    """

    message: str = ""
    times: Mapping[str, Sequence[int]] = {}
    counts: Mapping[str, int] = {}


NOTHING = EndDetail()


class Ended(Protocol):
    """Called once when a request has ended, in any thread."""

    def __call__(self, failure: str | None = None, detail: EndDetail = NOTHING) -> None:
        """Take the end of a request.

        Args:
            failure: the kind of its failure in a few words, the same for all failures of one kind; None for an answer.
            detail: what else is known.
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
