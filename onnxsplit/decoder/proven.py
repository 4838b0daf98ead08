"""A decoder whose claims have been tried."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.plan_decoder import ChunkLayout, Proof, RowLayout
from onnxsplit.timed_worker import InPlace


@dataclass(frozen=True)
class ProvenDecoder:
    """A decoder as the runs of the probe have shown it.

    Attributes:
        claim: the claim; states that could not be written in place are of the kind ``append``.
        rows: how rows of unequal length share a run.
        chunk: which runs have more than one new token on an existing past.
        proof: the runs; None where the user gave the claims and the model could not be run.
    """

    claim: DecoderClaim
    rows: RowLayout
    chunk: ChunkLayout
    proof: Proof | None = None

    @property
    def in_place(self) -> InPlace:
        """The outputs and inputs that share memory."""
        return tuple((state.present, state.past) for state in self.claim.states if state.kind == "in-place")

    @property
    def rollback(self) -> bool:
        """Whether a sequence can be cut back to any shorter length."""
        return all(state.kind in ("in-place", "append") for state in self.claim.states)
