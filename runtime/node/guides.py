"""Guides for the sequences of the last stage, by the tokenizer that the plan carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxsplit.errors import ModelError, PlanError
from onnxsplit.plan import Plan
from onnxsplit.plan_files import check_file
from runtime.files.stage import tokenizer_file
from runtime.guided.guide import INSTALL, Allowed, GrammarError, GuidedTokenizer, is_installed
from runtime.node.sampling import Guide


class StageGuides:
    """Makes guides at one stage.

    Args:
        tokenizer: the tokenizer; None for none.
        why_not: why there is none.
    """

    def __init__(self, tokenizer: GuidedTokenizer | None, why_not: str = "") -> None:
        self._tokenizer = tokenizer
        self.why_not = why_not

    def __call__(self, grammar: str) -> Guide:
        """The guide for a grammar. If the grammar cannot be used, the guide says so when it is asked."""
        if self._tokenizer is None:
            return _NoGuide(GrammarError(f"no text can follow a grammar here: {self.why_not}"))
        try:
            return self._tokenizer.guide(grammar)
        except GrammarError as error:
            return _NoGuide(error)


class _NoGuide:
    """Stands for a guide that could not be made."""

    def __init__(self, error: GrammarError) -> None:
        self._error = error

    def follow(self, _: Sequence[int]) -> None:
        """Raise the error."""
        raise self._error

    def back(self, _: int) -> None:
        """Nothing was followed."""

    def allowed(self, _: int) -> tuple[Allowed, bool]:
        """Raise the error."""
        raise self._error


def stage_guides(plan: Plan, folder: Path, stage: int) -> StageGuides:
    """The guides of a stage. This takes up to a second at the last stage of a decoder, and no time at others.

    Raises:
        PlanError: the tokenizer's file is not the plan's.
    """
    entry = tokenizer_file(plan, stage)
    if entry is None:
        return StageGuides(None, "the plan holds no tokenizer.json")
    if not is_installed():
        return StageGuides(None, f"llguidance is not installed; {INSTALL}")
    if not (folder / entry.name).exists():
        return StageGuides(None, f"{folder} does not hold {entry.name}; copy the plan again")
    if problems := check_file(folder, entry):
        raise PlanError(f"the plan {folder} was changed: {'; '.join(problems)}. Copy it again")
    assert plan.decoder is not None
    try:
        return StageGuides(GuidedTokenizer((folder / entry.name).read_bytes(), plan.decoder.end_tokens))
    except (ModelError, OSError) as error:
        return StageGuides(None, f"{entry.name} cannot be used: {error}")
