"""From a model to a proven decoder: claims, changes to the graph, and the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from onnxsplit.custom_ops import Library
from onnxsplit.decoder.claim import DecoderClaim, NoDecoder
from onnxsplit.decoder.find import find_decoder
from onnxsplit.decoder.override import Override, read_override
from onnxsplit.decoder.probe import probe
from onnxsplit.decoder.proven import ProvenDecoder
from onnxsplit.decoder.reference import StepRunner
from onnxsplit.decoder.rewrite import branch_with_past, inlined, last_positions_only
from onnxsplit.decoder.token_shapes import with_token_shapes
from onnxsplit.distance import tolerance
from onnxsplit.errors import ModelError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import runnable
from onnxsplit.model.precision import computed_types, rounds_activations
from onnxsplit.model.shapes import Shapes, input_specs, symbolic_specs
from onnxsplit.model.source import SourceModel
from onnxsplit.plan_decoder import Control
from onnxsplit.progress import Say, silent
from onnxsplit.session import open_session

OFF, AUTO = "off", "auto"

_NOT_RUN = (
    "without runs, nothing is proven of it; leave out --costs analytic, or say what is what with --decoder FILE.toml"
)
_ROUNDED = 0.1  # how far kernels may be apart, as a share of the scale, where activations are rounded to 8 bits


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to be cut.

    Attributes:
        source: the model; as it was given if it is no decoder.
        decoder: the decoder, or why the model is none.
    """

    source: SourceModel
    decoder: ProvenDecoder | NoDecoder


def prepare(
    source: SourceModel,
    choice: str | Path,
    *,
    runs: bool,
    threads: int = 1,
    custom_ops: Sequence[Library] = (),
    say: Say = silent,
) -> PreparedModel:
    """Find out whether a model is a decoder, change its graph for steps, and prove the claims.

    Args:
        source: the model; it is not changed.
        choice: ``auto``, ``off``, or the path of a file that states the claims.
        runs: whether the model may be run. If not, only claims from a file are used, and nothing is proven.
        threads: threads of the session.
        custom_ops: libraries of custom ops that the session loads.
        say: called with each step.

    Raises:
        InputError: the file with the claims cannot be used.
    """
    if choice == OFF:
        return PreparedModel(source, NoDecoder())
    override = read_override(Path(choice)) if choice != AUTO else None
    found = _find(source, override)
    if isinstance(found, NoDecoder):
        return PreparedModel(source, found)
    if override is None and not runs:
        return PreparedModel(source, NoDecoder(_NOT_RUN))
    changed, claim = _rewritten(source, found, override, scores_of_last=True)
    if isinstance(claim, NoDecoder):
        return PreparedModel(source, claim)
    if not runs:
        return PreparedModel(changed, ProvenDecoder(claim, "one", "none"))
    proven = _proven(changed, claim, threads, custom_ops, say)
    if not isinstance(proven, NoDecoder) and proven.proof is not None and "last only" in proven.proof.refused:
        changed, claim = _rewritten(source, found, override, scores_of_last=False)
        assert isinstance(claim, DecoderClaim)
        proven = _proven(changed, claim, threads, custom_ops, say)
    return PreparedModel(source if isinstance(proven, NoDecoder) else changed, proven)


def _find(source: SourceModel, override: Override | None) -> DecoderClaim | NoDecoder:
    graph = build_graph(source)
    folder = source.path.parent if source.path.is_file() else source.data_folder
    return find_decoder(graph, symbolic_specs(graph), folder=folder, override=override)


def _rewritten(
    source: SourceModel, claim: DecoderClaim, override: Override | None, *, scores_of_last: bool
) -> tuple[SourceModel, DecoderClaim | NoDecoder]:
    """A changed copy of the model, and the claims about it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    copy = replace(source, proto=proto)
    taken = [control.input for control in claim.controls if control.role == "fixed"]
    if claim.branch is not None:
        value = branch_with_past(proto, claim.branch)
        if value is None:
            return source, NoDecoder(f"input {claim.branch!r} chooses no branch of an If")
        branch = Control(input=claim.branch, role="fixed", value=int(value))
        copy = inlined(copy, claim.branch, value)
        found = _find(copy, override)
        if isinstance(found, NoDecoder):
            return source, found
        others = tuple(control for control in found.controls if control.input != branch.input)
        taken = [control.input for control in others if control.role == "fixed"]
        claim = replace(found, controls=(*others, branch), branch=None)
    copy = with_token_shapes(copy, claim)
    if scores_of_last and not taken:
        copy, name = last_positions_only(copy, claim.scores)
        if name:
            claim = replace(claim, controls=(*claim.controls, Control(input=name, role="first-scored")))
    return copy, claim


def _proven(
    source: SourceModel, claim: DecoderClaim, threads: int, custom_ops: Sequence[Library], say: Say
) -> ProvenDecoder | NoDecoder:
    """The decoder as the probe shows it; a model that ONNX Runtime refuses is none."""
    graph = build_graph(source)
    specs = input_specs(graph)
    allowed = tolerance(computed_types(graph, Shapes(specs=specs, sizes={})))
    needed, free = sum(stored.size_bytes for stored in graph.stored), free_memory_bytes()
    if needed > free:
        return NoDecoder(f"it cannot be run here: its weights take {needed} bytes, and {free} bytes of memory are free")
    rounding = max(allowed, _ROUNDED) if rounds_activations(graph) else allowed
    try:
        with runnable(source) as file:
            apart = file.data_folder is not None
            session = open_session(
                file.path.read_bytes() if apart else file.path,
                threads=threads,
                external_data_folder=file.data_folder,
                custom_ops=custom_ops,
            )
            return probe(StepRunner(session, claim, specs), claim, allowed=allowed, rounding=rounding, say=say)
    except ModelError as error:
        return NoDecoder(str(error))
