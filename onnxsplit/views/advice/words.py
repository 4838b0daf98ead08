"""The advice in words: which way to run a model, why, and by which commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from onnxsplit.planning.candidates import ALIKE, DEFAULT_SHARE, Candidate, Choice, Wishes, keeps_wishes, rate_of
from onnxsplit.planning.options import CutOptions


def wishes_text(wishes: Wishes) -> str:
    """What was asked for, in one sentence."""
    asked = [f"{wishes.rate_per_s:g} requests/s"] if wishes.rate_per_s is not None else []
    asked += [f"99 % of them within {_ms(wishes.p99_ns)}"] if wishes.p99_ns is not None else []
    if wishes.rate_per_s is None:
        asked.insert(0, "as many requests/s as possible")
    if wishes.max_memory_bytes is not None:
        asked.append(f"at most {wishes.max_memory_bytes / (1 << 20):,.0f} MiB on a device")
    at = "" if asked[1:] or wishes.rate_per_s else f"; latencies are those at {DEFAULT_SHARE:.0%} of each limit"
    return f"Asked for: {', '.join(asked)}{at}."


def reason(picked: Choice, choices: Sequence[Choice], wishes: Wishes) -> str:
    """Why a candidate was picked; where none gives what was asked for, what is nearest and what would be needed."""
    figures = picked.figures
    assert figures is not None
    how = "measured" if picked.measured is not None else "predicted"
    if not keeps_wishes(picked, wishes):
        return _nearest(picked, choices, wishes)
    if wishes.rate_per_s is not None:
        found = (
            f"it answers 99 % of {figures.rate_per_s:g} requests/s within {_ms(figures.p99_ns)}, and can take "
            f"{_rate(figures.limit_per_s)}/s ({how})"
        )
    elif wishes.p99_ns is not None:
        found = f"it takes {_rate(figures.rate_per_s)} requests/s with 99 % of them in time ({how})"
    else:
        found = f"it takes {_rate(figures.limit_per_s)} requests/s ({how})"
    others = [
        one for one in choices if one is not picked and (one.measured is not None) == (picked.measured is not None)
    ]
    others = [one for one in others if not one.left_out and one.figures is not None]
    return f"{picked.candidate.name}: {found}{_beside(picked, others, wishes)}."


def _beside(picked: Choice, others: Sequence[Choice], wishes: Wishes) -> str:
    """How the picked candidate stands beside the best of the others."""
    rate = rate_of(picked, wishes)
    best = max(others, key=lambda one: rate_of(one, wishes), default=None)
    if best is None or not rate:
        return ""
    ratio = rate_of(best, wishes) / rate
    if ratio < 1 - ALIKE:
        return f"; the next is {best.candidate.name} with {_rate(rate_of(best, wishes))}/s"
    if wishes.rate_per_s is not None:
        return ""
    if ratio <= 1 / (1 - ALIKE):
        return f"; {best.candidate.name} is about as good and takes more to run"
    return ""


def _nearest(picked: Choice, choices: Sequence[Choice], wishes: Wishes) -> str:
    figures = picked.figures
    assert figures is not None
    text = f"No candidate gives what was asked for. The nearest is {picked.candidate.name}: "
    fastest = max(one.figures.limit_per_s for one in choices if one.figures is not None and not one.left_out)
    if wishes.rate_per_s is not None and fastest < wishes.rate_per_s:
        times = wishes.rate_per_s / max(1e-9, figures.limit_per_s)
        return (
            f"{text}it takes at most {_rate(figures.limit_per_s)} requests/s of the {wishes.rate_per_s:g}. It would "
            f"need {times:.1f} times what these devices give, such as {math.ceil(times)} hosts like this one."
        )
    if figures.p99_ns is None or wishes.p99_ns is None:
        return f"{text}it does not keep the rate."
    where = f"at {figures.rate_per_s:g} requests/s" if wishes.rate_per_s else "even at a low rate"
    return (
        f"{text}99 % of its requests are answered within {_ms(figures.p99_ns)} {where}, not {_ms(wishes.p99_ns)}. "
        f"It would need devices about {figures.p99_ns / max(1, wishes.p99_ns):.1f} times as fast, or "
        + ("a lower rate." if wishes.rate_per_s else "a smaller model.")
    )


def keep_whole(picked: Candidate) -> str:
    """How to run the whole model in one session."""
    return (
        "Keep it whole: call it in your program by one onnxruntime.InferenceSession with intra_op_num_threads = "
        f"{picked.threads}. To offer it to other programs, serve it as one node:"
    )


def commands(
    picked: Candidate, options: CutOptions, *, model: Path, plan: Path, kept: bool, examined: Sequence[str], far: bool
) -> list[str]:
    """The commands that make and start a candidate.

    Args:
        picked: the candidate.
        options: how its plan is cut.
        model: the model's file.
        plan: the plan's folder.
        kept: whether the plan is there already.
        examined: options of ``partition`` about the model, as words.
        far: whether some of its devices are on other hosts.
    """
    cut = ["onnxsplit", "partition", str(model), *cut_words(options), *examined, "-o", str(plan)]
    serve = ["onnxsplit", "serve", str(plan)]
    if far:
        serve += ["--launcher", "none", "--bind", "tcp://HOST:PORT", "--keys", "DIR"]
    else:
        if picked.kind in ("session", "replicas") and picked.nodes > 1 and options.cluster is None:
            serve += ["--replicas", str(picked.nodes)]
        serve += ["--threads", str(picked.threads)]
    serve += ["--max-batch", str(picked.max_batch)] if picked.max_batch > 1 else []
    return [*([] if kept else [shlex.join(cut)]), shlex.join(serve)]


def cut_words(options: CutOptions) -> list[str]:
    """The options of a cut as words of the command ``partition``; those with default values are left out."""
    default = CutOptions()
    words: list[str] = []
    for name in ("stages", "devices", "parallel", "cluster", "max_memory", "provider", "effort"):
        value = getattr(options, name)
        if value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _ms(time_ns: int | None) -> str:
    return "?" if time_ns is None else f"{time_ns / 1e6:,.3g} ms" if time_ns < 1e8 else f"{time_ns / 1e6:,.0f} ms"


def _rate(per_s: float) -> str:
    return f"{per_s:,.3g}" if per_s < 1000 else f"{per_s:,.0f}"
