"""What is measured of the texts that a model generates: histograms for the metrics and the page."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from runtime.gateway.openai.figures import RequestFigures
from runtime.time_buckets import bucket_of

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_WHOLE_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Histogram:
    """Counts of values by size.

    Args:
        bounds: the upper bounds of the buckets, ascending; values above the last have a bucket of their own.

    Attributes:
        total: the sum of the values.
        times: the numbers of values, taken as seconds, by :func:`~runtime.time_buckets.bucket_of`.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.total = 0.0
        self.times: dict[int, int] = {}
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.total += value
        self._counts[bisect_left(self._bounds, value)] += 1
        bucket = bucket_of(int(value * 1e9))
        self.times[bucket] = self.times.get(bucket, 0) + 1

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """The numbers of values up to each bound, as Prometheus takes them."""
        ends = [*map(str, self._bounds), "+Inf"]
        return [(end, float(count)) for end, count in zip(ends, accumulate(self._counts), strict=True)]


class TextTimes:
    """The histograms of one version of a model, in the buckets of vLLM.

    Args:
        figures: calls this object from now on.

    Attributes:
        first_token: seconds from the beginning of a text to its first token.
        gap: seconds between two tokens of a text.
        whole: seconds from the beginning of a text to its end.
        prompt: tokens of the prompt of a text that has ended.
        generation: tokens of a text that has ended.
    """

    def __init__(self, figures: RequestFigures) -> None:
        self.first_token = Histogram(_FIRST_TOKEN_S)
        self.gap = Histogram(_GAP_S)
        self.whole = Histogram(_WHOLE_S)
        self.prompt = Histogram(_TOKENS)
        self.generation = Histogram(_TOKENS)
        figures.on_first_token = self.first_token.add
        figures.on_gap = self.gap.add
        figures.on_end = self._ended

    def _ended(self, seconds: float, prompt_tokens: int, generation_tokens: int) -> None:
        self.whole.add(seconds)
        self.prompt.add(prompt_tokens)
        self.generation.add(generation_tokens)
