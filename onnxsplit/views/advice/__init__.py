"""The advice as one HTML page that needs no network: rate against p99, memory as size, the best ones marked."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from onnxsplit import drawing
from onnxsplit.errors import InputError
from onnxsplit.files import replacing
from onnxsplit.plan_base import PlanStruct
from onnxsplit.planning.candidates import Choice, Wishes


class AdviceRow(PlanStruct, frozen=True, kw_only=True):
    """A candidate on the page.

    Attributes:
        name: its name.
        choice: what is known of it.
        rate_per_s: the rate by which it is compared.
        on_front: whether no other candidate beats it in both rate and p99.
        picked: whether it was picked.
        keeps: whether it gives what was asked for.
    """

    name: str
    choice: Choice
    rate_per_s: float
    on_front: bool
    picked: bool
    keeps: bool


class Advice(PlanStruct, frozen=True, kw_only=True):
    """The result of ``advise``.

    Attributes:
        model: the model's file.
        wishes: what was asked for.
        asked: the same in words.
        rows: all candidates, those that were run first.
        reason: the candidate that was picked and why, or why there is none.
        keeps: whether it gives what was asked for.
        whole: how to call the model without a pipeline, where that was picked; else None.
        commands: the commands that make and start it.
        notes: what else a user has to know.
        disturbed: the share of the host's cores that other processes used while candidates were run.
    """

    model: str
    wishes: Wishes
    asked: str
    rows: tuple[AdviceRow, ...]
    reason: str
    keeps: bool
    whole: str | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    disturbed: float


def write_page(advice: Advice, target: Path) -> None:
    """Write the page. The file appears as a whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    assets = files(__name__) / "assets"
    data = msgspec.json.encode(advice).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028")
    text = drawing.fill(
        (assets / "advice.html").read_text(encoding="utf-8"),
        styles=drawing.styles() + (assets / "advice.css").read_text(encoding="utf-8"),
        licences=drawing.licences(),
        libraries=drawing.libraries(),
        data=data,
        script=(assets / "advice.js").read_text(encoding="utf-8"),
    )
    try:
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another file with --html") from error
