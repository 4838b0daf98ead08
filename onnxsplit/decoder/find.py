"""Finds out whether a model is a decoder, and what its inputs and outputs mean: by names, files and structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxsplit.decoder.branch import branch_input
from onnxsplit.decoder.claim import DecoderClaim, NoDecoder, StateClaim
from onnxsplit.decoder.files import TOKENIZER_HASH, Beside, read_beside
from onnxsplit.decoder.flat import flat_graph
from onnxsplit.decoder.limits import Tables
from onnxsplit.decoder.names import NamedPairs, of_encoder, pairs_by_name, role_by_name, words
from onnxsplit.decoder.override import Override, check_names
from onnxsplit.decoder.pairing import StatePair, agreed_pairs
from onnxsplit.decoder.reasons import NotClaimed, listed
from onnxsplit.decoder.roles import Inputs, control_claims, roles_by_use, tokens_input
from onnxsplit.decoder.scores import scores_output
from onnxsplit.decoder.state_claims import state_claim
from onnxsplit.decoder.structure import passed_on, states_by_structure, traces_of
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.shapes import spec_of
from onnxsplit.plan import TensorSpec

_EMBEDDED = frozenset({"embeds", "embeddings"})


def find_decoder(
    graph: OpGraph,
    specs: Mapping[str, TensorSpec],
    *,
    folder: Path | None = None,
    override: Override | None = None,
) -> DecoderClaim | NoDecoder:
    """Claim that a model is a decoder, with its states and controls, or say why it is not treated as one.

    A model that holds two whole decoders in one ``If`` gives a claim with ``branch`` alone. Put the branch that reads
    the caches in place of the ``If``, and call this again.

    Args:
        graph: the model.
        specs: types and shapes of tensors, as inference finds them. What the model declares for its inputs and outputs
            is added.
        folder: the folder of the model, for the small files in it; None for none.
        override: the user's decisions, which come before everything else.

    Returns:
        The claim, of which nothing is proven yet; or the reason why there is none, which is empty where nothing looks
        like a decoder.

    Raises:
        InputError: ``override`` names inputs or outputs that the model does not have.
    """
    decided = override if override is not None else Override()
    check_names(decided, graph.inputs, graph.outputs)
    search = _Search(graph, specs, read_beside(folder, _own_tokenizer(graph)), decided)
    try:
        return search.claim()
    except NotClaimed as reason:
        return NoDecoder(str(reason) if search.looks else "")


def _own_tokenizer(graph: OpGraph) -> str | None:
    """The SHA-256 of the tokenizer that was exported with a model; None where the model does not say."""
    metadata = graph.source.proto.metadata_props
    return next((entry.value for entry in metadata if entry.key == TOKENIZER_HASH), None)


class _Search:
    """One search; it only collects what its steps share.

    Attributes:
        looks: whether the model looks like a decoder, so that the user wants to know why it is not treated as one.
    """

    def __init__(self, graph: OpGraph, specs: Mapping[str, TensorSpec], beside: Beside, override: Override) -> None:
        self.graph, inside = flat_graph(graph)
        self.beside, self.override = beside, override
        self.specs = {**inside, **_with_declared(graph, specs)}
        self.traces = traces_of(self.graph, self.specs, graph.inputs)
        self.tables = Tables(self.graph, self.traces)
        self.looks = bool(override.states)

    def claim(self) -> DecoderClaim:
        """The claim.

        Raises:
            NotClaimed: something is missing or not clear.
        """
        named = self._named()
        self.looks |= bool(named.lonely_pasts or named.lonely_presents or _speak_of_past(named.pairs))
        self._refuse_encoders()
        branch = branch_input(self.graph, self.traces, (*named.pairs, *named.lonely_pasts))
        if branch is not None:
            return DecoderClaim(states=(), controls=(), scores="", vocabulary=0, branch=branch)
        _refuse_halves(named, self.override)
        pairs = self._pairs(named)
        self.looks |= any(_is_cache(pair) for pair in pairs)
        pasts = {pair.past for pair in pairs}
        inputs = self._inputs([name for name in self.graph.inputs if name not in pasts])
        tokens = tokens_input(inputs, self.override) if pairs else None
        if tokens is None:
            raise NotClaimed(_without_tokens(inputs.names))
        self.looks |= bool(named.pairs) or len(pairs) > 1
        return self._claimed(pairs, inputs, tokens)

    def _inputs(self, names: Sequence[str]) -> Inputs:
        used = {*self.graph.readers, *self.graph.outputs}
        return Inputs(
            names=names,
            specs=self.specs,
            uses=roles_by_use(self.graph, self.traces),
            tables=self.tables.picked(),
            common=self.beside.names,
            unread=frozenset(name for name in names if name not in used),
        )

    def _claimed(self, pairs: Sequence[StatePair], inputs: Inputs, tokens: str) -> DecoderClaim:
        graph, specs, beside, override = self.graph, self.specs, self.beside, self.override
        controls = control_claims(inputs, tokens, override)
        spec = specs.get(tokens)
        batch = spec.shape[0] if spec is not None and spec.shape else None
        states = tuple(state_claim(pair, specs, batch, beside) for pair in pairs)
        presents = {pair.present for pair in pairs}
        table = inputs.tables.get(tokens)
        scores, vocabulary = scores_output(
            [name for name in graph.outputs if name not in presents],
            specs,
            graph,
            expected=(table, beside.vocabulary),
            common=beside.names,
            override=override,
        )
        below = table if table not in (None, vocabulary) else None
        ends, notes = self._end_tokens(vocabulary)
        counted = {control.input for control in controls if control.role not in ("tokens", "fixed")}
        limits = [state.capacity for state in states if state.kind == "in-place"]
        limits.append(self.tables.most_positions(tokens, counted))
        least = [pair.trace.least if pair.trace is not None else None for pair in pairs]
        longest = _least(override.max_length or beside.max_length, *limits) or _largest(*least)
        return DecoderClaim(
            states=tuple(_with_room(s, size, longest) for s, size in zip(states, least, strict=True)),
            controls=controls,
            scores=scores,
            vocabulary=vocabulary,
            tokens_below=below,
            max_length=longest,
            end_tokens=ends,
            text=beside.text,
            notes=(*beside.notes, *notes),
        )

    def _named(self) -> NamedPairs:
        """What names say of the inputs that do not have a role by their names, and are not given a role by the user."""
        roles = {control.input for control in self.override.controls} | {self.override.tokens}
        roles |= {state.past for state in self.override.states}
        taken = {state.present for state in self.override.states} | {self.override.scores}
        common = self.beside.names
        return pairs_by_name(
            [n for n in self.graph.inputs if n not in roles and role_by_name(common.get(n, n)) is None],
            [name for name in self.graph.outputs if name not in taken],
            self.beside.patterns,
        )

    def _pairs(self, named: NamedPairs) -> tuple[StatePair, ...]:
        """The pairs, in the order of the model's inputs."""
        controls = {control.input for control in self.override.controls} | {self.override.tokens}
        common = self.beside.names
        found = {
            past: presents
            for past, presents in states_by_structure(self.graph, self.traces).items()
            if past not in controls and role_by_name(common.get(past, past)) is None
        }
        pairs = agreed_pairs(named, found, passed_on(self.graph, self.traces), self.specs, self.override)
        places = {name: place for place, name in enumerate(self.graph.inputs)}
        return tuple(sorted(pairs, key=lambda pair: places[pair.past]))

    def _refuse_encoders(self) -> None:
        """Refuse models that read what an encoder wrote."""
        given = {control.input for control in self.override.controls}
        names = [name for name in self.graph.inputs if of_encoder(name) and name not in given]
        if self.looks and (names or self.beside.encoder_decoder):
            why = (
                f"{listed(names)} come from an encoder"
                if names
                else "its configuration file says that it has an encoder"
            )
            raise NotClaimed(f"{why}; models with an encoder are not run with resident caches yet")

    def _end_tokens(self, vocabulary: int) -> tuple[tuple[int, ...], list[str]]:
        """The end tokens, without those beyond the vocabulary, and what is to be said of these."""
        given = self.override.end_tokens
        tokens = given if given is not None else self.beside.end_tokens
        beyond = [token for token in tokens if token >= vocabulary]
        if beyond and given is not None:
            raise NotClaimed(
                f"end_tokens has {beyond[0]}, but the model has {vocabulary} scores, so tokens are below {vocabulary}; "
                "correct the --decoder file"
            )
        notes = [f"end token {token} is not used: the model has {vocabulary} scores" for token in beyond]
        return tuple(token for token in tokens if token < vocabulary), notes


def _with_declared(graph: OpGraph, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The known types and shapes, completed by those that the model declares for its inputs and outputs."""
    proto = graph.source.proto.graph
    known = dict(specs)
    for value in (*proto.input, *proto.output):
        declared, spec = spec_of(value), known.get(value.name)
        if declared is None:
            continue
        if spec is None or spec.shape is None or declared.shape is None:
            known[value.name] = spec if spec is not None and declared.shape is None else declared
        elif len(spec.shape) == len(declared.shape):
            sizes = zip(spec.shape, declared.shape, strict=True)
            shape = tuple(told if size == "?" else size for size, told in sizes)
            known[value.name] = TensorSpec(dtype=spec.dtype, shape=shape)
    return known


def _speak_of_past(pairs: Mapping[str, str]) -> bool:
    """Whether the names of some pair say past or present."""
    return any("past" in words(past) or "present" in words(present) for past, present in pairs.items())


def _is_cache(pair: StatePair) -> bool:
    """Whether an op that is made for caches updates a state: such an op knows which axis is that of the rows."""
    return pair.trace is not None and pair.trace.kind == "in-place" and pair.trace.batch_axis is not None


def _refuse_halves(named: NamedPairs, override: Override) -> None:
    """Refuse models that only write or only read some of their caches."""
    controls = {control.input for control in override.controls}
    pasts = [name for name in named.lonely_pasts if name not in controls]
    if named.lonely_presents and not named.pairs and not pasts:
        raise NotClaimed(
            f"it writes caches ({listed(named.lonely_presents)}) and reads none, so it is only the first step of a "
            "decoder; export it with its caches as inputs, too"
        )


def _without_tokens(names: Sequence[str]) -> str:
    embedded = [name for name in names if not _EMBEDDED.isdisjoint(words(name))]
    if embedded:
        return (
            f"it reads embedded tokens ({listed(embedded)}), not their numbers; export it together with its embedding "
            "table"
        )
    return (
        f"it has caches, but none of its other inputs ({listed(names) or 'there are none'}) picks rows of an embedding "
        "table; give tokens = NAME in --decoder FILE.toml"
    )


def _with_room(state: StateClaim, least: int | None, longest: int | None) -> StateClaim:
    """A state whose buffer must have a smallest size: it gets room for all positions, so that none is cut away."""
    if state.kind != "in-place" or state.capacity is not None or least is None:
        return state
    return replace(state, capacity=max(least, longest or 0))


def _largest(*sizes: int | None) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
