"""The small random decoders that other tests use: they run, steps add up to whole runs, and texts differ by prompt."""

from __future__ import annotations

import json
from functools import partial

import decoder_parts
import decoders
import numpy as np
import onnx
import pytest
from decoder_runs import FAMILIES, Family, Reference

PROMPT = [5, 71, 13, 88, 2, 40, 40, 9]
OTHER = [64, 3, 99, 17, 30, 8, 21, 55]


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_give_what_one_run_gives(name):
    family = FAMILIES[name]
    whole = Reference(family).step([PROMPT])
    for sizes in ((5, 3), (1,) * 8):
        steps, start = Reference(family), 0
        for size in sizes:
            scores = steps.step([PROMPT[start : start + size]])
            start += size
            assert np.abs(scores - whole[:, start - size : start]).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_prompts_give_two_texts(name):
    family = FAMILIES[name]
    texts = [Reference(family).greedy(prompt, 12) for prompt in (PROMPT, OTHER)]
    assert texts[0] != texts[1]
    assert all(len(set(text)) >= 4 for text in texts), texts
    assert Reference(family, seed=1).greedy(PROMPT, 12) != texts[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_came_first_counts(name):
    """A decoder that ignores its states, or the order of its tokens, would prove nothing."""
    family = FAMILIES[name]
    last = [
        Reference(family).step([prompt])[0, -1] for prompt in (PROMPT, [PROMPT[1], PROMPT[0], *PROMPT[2:]], PROMPT[1:])
    ]
    scale = np.abs(last[0]).max()
    if name not in ("gqa, local window", "window"):
        assert np.abs(last[0] - last[1]).max() > 1e-3 * scale
    assert np.abs(last[0] - last[2]).max() > 1e-3 * scale


@pytest.mark.parametrize("name", FAMILIES)
def test_margins_are_clear(name):
    """The best score is ahead of the second by more than rounding could change."""
    scores = Reference(FAMILIES[name]).step([PROMPT])
    best = np.sort(scores, -1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-3 * np.abs(scores).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_apart(name):
    """Two rows of one length compute what each alone computes."""
    family = FAMILIES[name]
    alone = [Reference(family).step([prompt])[0] for prompt in (PROMPT, OTHER)]
    both = Reference(family, rows=2).step([PROMPT, OTHER])
    for row, scores in enumerate(alone):
        assert np.abs(both[row] - scores).max() <= 1e-4 * np.abs(scores).max()


def test_the_ways_of_writing_a_llama_compute_the_same():
    names = ["plain", "gqa", "gqa, rotary outside", "merged", "torch export", "attention 23", "tensor scatter"]
    found = {name: Reference(FAMILIES[name]).step([PROMPT]) for name in names}
    for name, scores in found.items():
        assert np.abs(scores - found["plain"]).max() <= 1e-4 * np.abs(found["plain"]).max(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_are_small(name):
    model = FAMILIES[name].make()
    assert model.ByteSize() < 300_000
    if "gqa" not in name:  # the standard's checker does not know ONNX Runtime's ops
        onnx.checker.check_model(model)


def test_the_configuration_of_the_builder_names_the_states(tmp_path):
    content = json.loads(decoders.write_genai_config(tmp_path).read_text())
    decoder = content["model"]["decoder"]
    assert decoder["head_size"] == decoder_parts.Size().head
    declared = {one.name for one in decoders.gqa(free_width=True).graph.input}
    assert {decoder["inputs"]["past_key_names"] % layer for layer in range(3)} < declared


def test_a_rolling_cache_does_not_run_on_an_empty_past():
    """Whoever feeds such a model must give it buffers as wide as its window."""
    family = Family(partial(decoders.gqa, window=8, rolling=True))
    with pytest.raises(Exception, match=r"KV cache capacity \(0\) must be at least local_window_size \(8\)"):
        Reference(family).step([PROMPT])
