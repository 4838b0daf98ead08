"""What is claimed of a decoder before anything has run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxsplit.plan_decoder import Control, StateKind


@dataclass(frozen=True)
class StateClaim:
    """A pair of an input and an output that passes from step to step, as claimed.

    Attributes:
        past: the input.
        present: the output.
        kind: how a step changes it.
        batch_axis: the axis of the rows.
        axis: the axis of the positions; None for recurrent states.
        shape: the shape of ``past`` for one row and, along ``axis``, no position.
        capacity: the size along ``axis`` that the model demands; None for any size.
    """

    past: str
    present: str
    kind: StateKind
    batch_axis: int
    axis: int | None
    shape: tuple[int, ...]
    capacity: int | None = None


@dataclass(frozen=True)
class DecoderClaim:
    """Everything that names, configuration files and the structure of the graph say of a decoder.

    Attributes:
        states: the states, in the order of the model's inputs.
        controls: the inputs that follow from the rows of a step. With the states, they are all inputs of the model.
        scores: the output with the scores.
        vocabulary: the number of scores.
        tokens_below: the bound of the tokens that the model reads; None for ``vocabulary``.
        max_length: the most positions of a sequence, by configuration or structure; None where nothing says it.
        end_tokens: the tokens that end a text, by configuration.
        text: files for the tokenizer and the chat template that were found beside the model.
        branch: the Boolean input that chooses between a branch without and one with past; None for none. Where it is
            set, nothing else is: the branch with past has to replace the ``If`` first.
        notes: what was found beside the model and not used, each with its reason.
    """

    states: tuple[StateClaim, ...]
    controls: tuple[Control, ...]
    scores: str
    vocabulary: int
    tokens_below: int | None = None
    max_length: int | None = None
    end_tokens: tuple[int, ...] = ()
    text: tuple[Path, ...] = ()
    branch: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoDecoder:
    """Why a model is not treated as a decoder; ``reason`` is empty where nothing looks like one."""

    reason: str = ""
