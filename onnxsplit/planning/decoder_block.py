"""The decoder block of a plan."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from onnxsplit.errors import PartitionError
from onnxsplit.model.graph import OpGraph
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_decoder import MOST_LENGTH, Decoder, State
from onnxsplit.planning.decoding import Decoding
from onnxsplit.stages.model_file import file_entry
from onnxsplit.stages.parts import StageParts

_LENGTH_IF_UNSAID = 2048


def decoder_block(
    decoding: Decoding, graph: OpGraph, parts: Sequence[StageParts], text: tuple[FileEntry, ...]
) -> Decoder:
    """Describe a decoder that was cut.

    Args:
        decoding: how it was cut.
        graph: the model.
        parts: what each stage is made of.
        text: the files of the tokenizer in the plan's folder.
    """
    claim = decoding.decoder.claim
    return Decoder(
        states=tuple(
            State(
                past=state.past,
                present=state.present,
                kind=state.kind,
                batch_axis=state.batch_axis,
                axis=state.axis,
                shape=state.shape,
                capacity=state.capacity,
                stage=_stage_of(graph, parts, state.present),
                token_bytes=decoding.token_bytes(state),
                fixed_bytes=decoding.fixed_bytes(state),
            )
            for state in claim.states
        ),
        controls=claim.controls,
        scores=claim.scores,
        vocabulary=claim.vocabulary,
        tokens_below=claim.tokens_below,
        rows=decoding.decoder.rows,
        chunk=decoding.decoder.chunk,
        rollback=decoding.decoder.rollback,
        max_length=_max_length(decoding),
        last_only=any(control.role == "first-scored" for control in claim.controls),
        end_tokens=claim.end_tokens,
        text=text,
        proof=decoding.decoder.proof,
        cost_rows=decoding.step.rows,
        cost_context=decoding.step.context,
        cache_tokens=decoding.cache_tokens,
    )


def copied_text(files: Sequence[Path], folder: Path) -> tuple[FileEntry, ...]:
    """Copy the files of a tokenizer into the plan's folder.

    Raises:
        PartitionError: a file cannot be read, or the folder cannot be written.
    """
    entries = []
    for file in files:
        try:
            shutil.copyfile(file, folder / file.name)
        except OSError as error:
            raise PartitionError(f"cannot copy {file} into the plan: {error.strerror}") from error
        entries.append(file_entry(folder / file.name))
    return tuple(entries)


def _stage_of(graph: OpGraph, parts: Sequence[StageParts], name: str) -> int:
    return next(index for index, part in enumerate(parts) if graph.producer[name] in part.own)


def _max_length(decoding: Decoding) -> int:
    """The most positions of a sequence; where nothing says it, as many as states may take without a plan for memory."""
    claim = decoding.decoder.claim
    if claim.max_length is not None:
        return claim.max_length
    grows = any(state.kind in ("in-place", "append") for state in claim.states)
    return _LENGTH_IF_UNSAID if grows else MOST_LENGTH
