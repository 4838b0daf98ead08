"""Text about the narrow borders of a plan."""

from __future__ import annotations

from collections import Counter

from onnxsplit.plan_borders import UNUSABLE, NarrowBorders


def borders_text(borders: NarrowBorders) -> str:
    """A line about the bytes that narrow borders save, and about the error that they cause."""
    if not borders.tensors:
        why = (
            "no narrower form is faster on its link and within the tolerance"
            if borders.asked == "auto"
            else ("no float32 tensor of 4 KiB or more crosses")
        )
        return f"Borders cross as they are: {why}."
    before, after = (
        sum(getattr(border, name) for border in borders.tensors) for name in ("bytes_before", "bytes_after")
    )
    forms = ", ".join(f"{count} in {form}" for form, count in Counter(b.form for b in borders.tensors).items())
    text = f"Narrow borders: {forms}; {before} bytes become {after}. "
    if count := sum(bool(border.compressed) for border in borders.tensors):
        text += f"{count} of them {'go' if count > 1 else 'goes'} compressed to other hosts. "
    if borders.error is None:
        return text + "The stages were not run, so the error is not known."
    kept = "within" if borders.within else "ABOVE"
    advice = "" if borders.within else " verify refuses that: allow more with --tolerance, or use --border auto."
    return (
        f"{text}Error of the outputs on {borders.inputs} example{'s' * (borders.inputs > 1)}: "
        f"{error_text(borders.error)} of their scale, {kept} the tolerance of {error_text(borders.tolerance)}.{advice}"
    )


def error_text(error: float) -> str:
    """An error in words."""
    return "infinities or NaNs" if error >= UNUSABLE else f"{error:.1e}"
