"""Whole decoders in plain ONNX Runtime sessions, to compare with: states in place, no pipeline, no scheduler.

Started as a file, it is one process with a session. It prints a line when it has warmed up. For each line ``ROUND N``
on its standard input it makes N steps of every group and prints the seconds that they took.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class WholeDecoder:
    """A session on a whole model with GroupQueryAttention, whose states lie in buffers that it reads and writes.

    Args:
        model: the model's file, with the inputs ``input_ids``, ``attention_mask`` and ``past_key_values.*``.
        rows: rows of a step.
        groups: groups of rows, each with buffers of its own.
        length: positions of a buffer.
        threads: threads of the session.
        shared: whether past and present are one buffer. Otherwise each step copies them.
    """

    def __init__(
        self, model: Path, *, rows: int = 1, groups: int = 1, length: int, threads: int = 1, shared: bool = True
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._rows, self._shared = rows, shared
        pasts = [value for value in self._session.get_inputs() if value.name.startswith("past")]
        self._names = [(one.name, one.name.replace("past_key_values", "present")) for one in pasts]
        _, heads, _, width = pasts[0].shape
        self._shape = (rows, heads, length if shared else 0, width)
        self._buffers = [
            {past: ort.OrtValue.ortvalue_from_numpy(np.zeros(self._shape, np.float32)) for past, _ in self._names}
            for _ in range(groups)
        ]
        self._lengths = [0] * groups
        vocabulary = self._session.get_outputs()[0].shape[-1]
        self._scores = np.zeros((rows, 1, vocabulary), np.float32)

    def step(self, group: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the next tokens [rows, new] of a group; returns the scores of the last position, [rows, vocabulary]."""
        new = tokens.shape[1]
        self._lengths[group] += new
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", np.ones((self._rows, self._lengths[group]), np.int64))
        buffers = self._buffers[group]
        if new == 1:
            address = self._scores.__array_interface__["data"][0]
            binding.bind_output("logits", "cpu", 0, np.float32, self._scores.shape, address)
        else:
            binding.bind_output("logits", "cpu")
        for past, present in self._names:
            binding.bind_ortvalue_input(past, buffers[past])
            if self._shared:
                binding.bind_ortvalue_output(present, buffers[past])
            else:
                binding.bind_output(present, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self._shared:
            self._buffers[group] = {past: value for (past, _), value in zip(self._names, outputs[1:], strict=True)}
        return self._scores[:, -1] if new == 1 else outputs[0].numpy()[:, -1]

    def restart(self, group: int) -> None:
        """Forget the rows of a group."""
        self._lengths[group] = 0
        if not self._shared:
            empty = np.zeros(self._shape, np.float32)
            self._buffers[group] = {past: ort.OrtValue.ortvalue_from_numpy(empty) for past, _ in self._names}

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """The next tokens of one sequence, and the scores of each, [count, vocabulary]; for one row."""
        self.restart(0)
        scores = [np.array(self.step(0, np.array([prompt], np.int64))[0])]
        tokens = [int(scores[-1].argmax())]
        while len(tokens) < count:
            scores.append(np.array(self.step(0, np.array([[tokens[-1]]], np.int64))[0]))
            tokens.append(int(scores[-1].argmax()))
        return tokens, np.stack(scores)


class WholeProcess:
    """A process with one :class:`WholeDecoder`, which makes steps when it is asked to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer()

    def begin(self, steps: int) -> None:
        """Begin a number of steps of every group."""
        assert self._process.stdin is not None
        print(f"ROUND {steps}", file=self._process.stdin, flush=True)

    def seconds(self) -> float:
        """Wait for the steps to end; returns the seconds that they took."""
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process with a whole model has ended")
        return line


@contextmanager
def whole_processes(
    count: int, model: Path, *, rows: int, groups: int, length: int, past: int
) -> Iterator[list[WholeProcess]]:
    """Start processes with a whole model and one thread each, whose rows have ``past`` positions at each round."""
    words = [sys.executable, __file__, str(model), *map(str, (rows, groups, length, past))]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        yield [WholeProcess(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _serve(model: Path, rows: int, groups: int, length: int, past: int) -> None:
    decoder = WholeDecoder(model, rows=rows, groups=groups, length=length)
    source = np.random.default_rng(0)
    prompts = [source.integers(3, 1000, (1, past)) for _ in range(groups)]
    for group, prompt in enumerate(prompts):  # several new tokens need an empty past where there are several rows
        decoder.step(group, np.repeat(prompt, rows, axis=0))
    print("ready", flush=True)
    for line in sys.stdin:
        steps = int(line.split()[1])
        tokens = [np.full((rows, 1), 7) for _ in range(groups)]
        decoder._lengths = [past] * groups
        begun = time.perf_counter()
        for _ in range(steps):
            for group in range(groups):
                tokens[group] = decoder.step(group, tokens[group]).argmax(-1)[:, None]
        print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for name in ("rows", "groups", "length", "past"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    _serve(given.model, given.rows, given.groups, given.length, given.past)
