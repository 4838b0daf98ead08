"""How much time measuring, searching and proving may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

SLOW_S = 0.1
"""A model is slow if a run of it takes longer than this, in seconds."""

_SAMPLES_S = 0.5  # seconds that the samples of a slow model take, if these are not fewer than the least

EffortName = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True)
class TimeBudget:
    """The time that a plan may take, beside writing files and loading models.

    A slow model, whose run takes longer than :data:`SLOW_S`, gets one run for a sample and fewer samples, so that
    measuring takes about twelve runs of the whole model at the effort ``normal``.

    Attributes:
        runs: about how many runs of the whole model measuring takes if they are long.
        sample_s: seconds of runs that form one sample.
        samples: samples of what is measured, taken in turns.
        least_samples: the least number of samples, for the slowest models.
        rounds: rounds in which the stages are run and the cut is corrected.
        slow_rounds: the same for a slow model.
        search_s: seconds of the longest search.
        proof_s: seconds for the proof of the batch axes.
        stage_levels: whether an optimisation level is chosen for each stage; else stages get that of the whole model.
    """

    runs: int
    sample_s: float
    samples: int
    least_samples: int
    rounds: int
    slow_rounds: int
    search_s: float
    proof_s: float
    stage_levels: bool = False

    def samples_of(self, run_s: float) -> int:
        """How many samples a slow model gets, whose run takes this many seconds."""
        return max(self.least_samples, min(self.samples, int(_SAMPLES_S / run_s)))


EFFORTS: dict[EffortName, TimeBudget] = {
    "quick": TimeBudget(
        runs=8, sample_s=0.04, samples=3, least_samples=1, rounds=1, slow_rounds=1, search_s=2.0, proof_s=2.0
    ),
    "normal": TimeBudget(
        runs=12, sample_s=0.06, samples=5, least_samples=2, rounds=3, slow_rounds=2, search_s=10.0, proof_s=8.0
    ),
    "thorough": TimeBudget(
        runs=100,
        sample_s=0.5,
        samples=11,
        least_samples=5,
        rounds=6,
        slow_rounds=6,
        search_s=60.0,
        proof_s=120.0,
        stage_levels=True,
    ),
}
"""The budgets by the names that ``--effort`` takes."""

EFFORT_NAMES: tuple[str, ...] = get_args(EffortName)
