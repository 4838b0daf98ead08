"""How fast does onnxruntime-genai generate with the same graph, beside a cut decoder and one plain session?

onnxruntime-genai needs a separate environment, because it brings an ONNX Runtime of its own: ``--python PYTHON`` names
its interpreter. All sides read the same file and take turns. Each session has one thread, or the number named; the
pipeline has one node for each stage with that many threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

TAKES = "5 min"


def configuration(model: Path, threads: int) -> dict[str, object]:
    """What onnxruntime-genai has to know about the model."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    pasts = [value for value in graph.input if value.name.startswith("past_key_values")]
    heads, width = (pasts[0].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    scores = next(value for value in graph.output if value.name == "logits")
    settings = json.loads((model.parent / "config.json").read_text())
    options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0", "provider_options": []}
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "context_length": settings["max_position_embeddings"],
            "vocab_size": scores.type.tensor_type.shape.dim[2].dim_value,
            "decoder": {
                "session_options": options,
                "filename": model.name,
                "head_size": width,
                "hidden_size": settings["hidden_size"],
                "num_attention_heads": settings["num_attention_heads"],
                "num_hidden_layers": len(pasts) // 2,
                "num_key_value_heads": heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 512, "do_sample": False, "past_present_share_buffer": True},
    }


def serve(folder: Path, rows: int, past: int) -> None:
    """Generate with onnxruntime-genai: for each line ``N`` on standard input, N steps of ``rows`` sequences."""
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    prompts = np.stack([np.random.default_rng(row).integers(3, 40_000, past) for row in range(rows)]).astype(np.int32)
    print("ready", flush=True)
    for line in sys.stdin:
        steps = int(line)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=past + steps + 8, min_length=past + steps + 8, batch_size=rows)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompts)
        generator.generate_next_token()
        begun = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        spent = time.perf_counter() - begun
        print(json.dumps([spent, [int(token) for token in generator.get_sequence(0)[past:]]]), flush=True)


def main() -> None:
    """Print a row for each number of sequences."""
    from benchmarks import harness
    from benchmarks.decoding.setting import add_model, plan_of

    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has onnxruntime-genai")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--slices", type=int, default=9)
    given = parser.parse_args()
    report = harness.Report(
        given, sequences="9d", threads="7d", pipeline_per_s="10.1f", session_per_s="10.1f", genai_per_s="10.1f",
        over_session="<22", over_genai="<22", same_tokens="<6",
    )  # fmt: skip
    with plan_of(given) as plan, tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        folder = Path(scratch)
        for file in given.model.parent.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        (folder / "genai_config.json").write_text(json.dumps(configuration(given.model, given.threads)))
        for sequences in (1, 4):
            report.row(_row(given, plan, folder, sequences))


def _row(given: argparse.Namespace, plan: Path, folder: Path, sequences: int) -> dict[str, object]:
    """Measure the three sides with a number of sequences."""
    import numpy as np

    from benchmarks import harness
    from benchmarks.decoding.setting import decode_rate, median, prompt
    from benchmarks.decoding.whole import WholeDecoder
    from runtime import Pipeline

    prompts = [prompt(given.past, row) for row in range(sequences)]
    words = [given.python, __file__, "--serve", str(folder), str(sequences), str(given.past)]
    length = given.past + given.tokens + 8
    whole = WholeDecoder(given.model, rows=sequences, length=length, threads=given.threads)
    texts: list[list[int]] = []
    with (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
        Pipeline.launch(plan, threads=given.threads, max_rows=sequences) as pipeline,
    ):
        assert peer.stdin is not None
        assert peer.stdout is not None
        to_peer, from_peer = peer.stdin, peer.stdout
        from_peer.readline()

        def genai_rate() -> float:
            print(given.tokens, file=to_peer, flush=True)
            seconds, text = json.loads(from_peer.readline())
            texts.append(text)
            return float(sequences * given.tokens / seconds)

        def session_rate() -> float:
            whole.restart(0)
            tokens = whole.step(0, np.array(prompts)).argmax(-1)[:, None]
            begun = time.perf_counter()
            for _ in range(given.tokens):
                tokens = whole.step(0, tokens).argmax(-1)[:, None]
            return sequences * given.tokens / (time.perf_counter() - begun)

        results = harness.in_turns(
            {
                "pipeline": lambda: decode_rate(pipeline, prompts, given.tokens),
                "session": session_rate,
                "genai": genai_rate,
            },
            given.slices,
        )
        ours = list(pipeline.generate(prompts[0], max_tokens=given.tokens, stop_tokens=()).result().tokens)
        to_peer.close()
    return {
        "sequences": sequences,
        "threads": given.threads,
        **{f"{name}_per_s": median(rates) for name, rates in results.items()},
        "over_session": str(harness.ratio(results["pipeline"], results["session"])),
        "over_genai": str(harness.ratio(results["pipeline"], results["genai"])),
        "same_tokens": str(ours == texts[-1][: len(ours)]),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
