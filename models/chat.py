"""The demo of text: two processes answer a question, and the answer goes on when one of them is killed.

    python models/chat.py [QUESTION]

It makes SmolLM2-135M-Instruct (models/smollm2.py), cuts it in two, and starts a process for each stage. While the
answer is streamed, it kills one of the processes with SIGKILL. It prints how long the pause was, and compares the
tokens with those of an undisturbed run. The model and the plan stay in ``$XDG_CACHE_HOME/onnxsplit/chat``, by default
in ``~/.cache/onnxsplit/chat``, and are used again.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import smollm2
from zoo import FetchError, cache_folder

from onnxsplit import Pipeline
from onnxsplit.cli.output import Output
from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.text.generation import TextGeneration

QUESTION = "What is photosynthesis?"
GREEDY = {"temperature": 0.0}  # each token is the most probable one, so two runs can be compared
MEMORY = {"cache_bytes": "256M", "max_rows": 2}


@dataclass(frozen=True)
class Kill:
    """The process that was killed.

    Attributes:
        stage: its stage.
        pid: its ID.
        at_ns: when, by the host's monotonic clock.
        tokens: the tokens that had arrived.
    """

    stage: int
    pid: int
    at_ns: int
    tokens: int


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=128, help="the most tokens of the answer")
    parser.add_argument("--kill-after", type=int, default=32, help="number of tokens after which a process is killed")
    given = parser.parse_args()
    output = Output(as_json=False)
    logging.getLogger("runtime").setLevel(logging.CRITICAL)  # the loss of the node is reported below
    try:
        plan = prepared(output)
        return show(output, plan, given.question, given.max_tokens, given.kill_after)
    except (OnnxsplitError, FetchError, ValueError) as error:
        output.done()
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        output.done()
        print("\nstopped", file=sys.stderr)
        return 130


def prepared(output: Output) -> Path:
    """The plan, from an earlier call or made now."""
    folder = cache_folder().parent / "chat"
    model, plan = folder / "smollm2", folder / "smollm2.plan"
    if not usable(plan):
        output.say("making SmolLM2-135M-Instruct of 8 bits from its package (93 MB)")
        part = folder / "smollm2.part"
        shutil.rmtree(part, ignore_errors=True)
        smollm2.make(part, check=False)  # the package is pinned, and tests compare it
        shutil.rmtree(model, ignore_errors=True)
        part.rename(model)
        partition(model / "model.onnx", stages=2, out=plan, say=output.say)
    return plan


def usable(plan: Path) -> bool:
    """Whether a folder holds a plan that this version can run as text."""
    try:
        decoder = load_plan(plan).decoder
    except OnnxsplitError:
        return False
    return decoder is not None and bool(decoder.text)


def show(output: Output, plan: Path, question: str, max_tokens: int, kill_after: int) -> int:
    """Answer the question, kill a process meanwhile, and compare; returns the exit code."""
    output.say("starting nodes")
    with Pipeline.launch(plan, threads=1, **MEMORY) as pipeline:
        text = pipeline.text
        assert text is not None, "the plan has a tokenizer"
        messages = [{"role": "user", "content": question}]
        output.done()
        for node in pipeline.nodes:
            print(f"Stage {node.stage}       process {node.pid}")
        print(f"\n> {question}\n")
        answer = text.chat(messages, max_tokens=max_tokens, **GREEDY)
        tokens, kill = stream(pipeline, answer, kill_after)
        times = answer.generation.times_ns
        whole = text.chat(messages, max_tokens=max_tokens, **GREEDY).result()
        new = next((node.pid for node in pipeline.nodes if kill is not None and node.stage == kill.stage), None)
    print(f"\n\nTokens        {len(tokens)}, the first after {seconds(times[0] - answer.generation.submitted_ns)}")
    if kill is None:
        print(f"Nothing was killed: the answer has {len(tokens)} tokens, and --kill-after is {kill_after}")
    else:
        pause, before = times[kill.tokens] - kill.at_ns, times[kill.tokens - 1] - times[0]
        after = times[-1] - times[kill.tokens]
        print(f"Speed         {rate(kill.tokens - 1, before)} before the kill, ", end="")
        print(f"{rate(len(times) - 1 - kill.tokens, after)} after the pause")
        print(f"Pause         {seconds(pause)} from the kill to the next token; process {new} took over")
    same = tokens == whole.tokens
    where = "" if same else f"; they differ from token {first_difference(tokens, whole.tokens)} on"
    print(
        f"Undisturbed   {'the same tokens, each once and in order' if same else f'{len(whole.tokens)} tokens{where}'}"
    )
    print(f"\nNext: onnxsplit chat {plan}")
    return 0 if same else 1


def stream(pipeline: Pipeline, answer: TextGeneration, kill_after: int) -> tuple[tuple[int, ...], Kill | None]:
    """Print an answer as it comes, and kill the process of the last stage in the middle of it.

    Returns:
        The tokens, and what was killed; None if the answer was too short.
    """
    tokens: list[int] = []
    kill = None
    for piece in answer:
        tokens += piece.tokens
        print(piece.text, end="", flush=True)
        if kill is None and len(tokens) >= kill_after and piece.reason is None:
            node = max(pipeline.nodes, key=lambda node: node.stage)
            assert node.pid is not None, "the stage answers"
            arrived = len(answer.generation.tokens)
            os.kill(node.pid, signal.SIGKILL)
            kill = Kill(node.stage, node.pid, time.monotonic_ns(), arrived)
            print(f"\n\n    [process {node.pid} of stage {node.stage} was killed with SIGKILL]\n", flush=True)
    return tuple(tokens), kill


def first_difference(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """The first position at which two sequences differ."""
    return next(
        (at for at, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def seconds(ns: int) -> str:
    """A time for people."""
    return f"{ns / 1e9:.2f} s"


def rate(tokens: int, ns: int) -> str:
    """Tokens a second for people."""
    return f"{tokens / max(1e-9, ns / 1e9):.1f} tokens/s"


if __name__ == "__main__":
    sys.exit(main())
