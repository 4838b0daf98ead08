"""Is the text of a pipeline the text of plain ONNX Runtime?

Twenty prompts in several scripts, half of them as messages of a chat, are continued with the most probable tokens: by
``pipeline.text``, all at once, and by one session of the whole model with ``tokenizers``' own decoding. The texts must
be equal, piece for piece joined.
"""

# ruff: noqa: RUF001  (prompts in several scripts)

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from tokenizers import Tokenizer

from benchmarks import harness
from benchmarks.decoding.setting import add_model, plan_of
from onnxsplit.decoder.reference import ReferenceDecoder
from onnxsplit.plan_files import load_plan
from runtime import Pipeline

TAKES = "3 min"
PROMPTS = (
    "The capital of France is",
    "Write a haiku about the sea.",
    "Erkläre in einem Satz, was Grüße sind:",
    "¿Cuál es la capital de España?",
    "Les élèves où ça naïf, c'est",
    "中国的首都是",
    "你好，请介绍一下你自己。",
    "日本の首都は",
    "대한민국의 수도는",
    "عاصمة مصر هي",
    "ما هو البحر؟",
    "भारत की राजधानी",
    "नमस्ते, आप कैसे हैं?",
    "Столица России —",
    "Напиши одно предложение о зиме.",
    "Η πρωτεύουσα της Ελλάδας είναι",
    "Repeat these emoji: 🙂🙃👨‍👩‍👧‍👦🇩🇪🚀",
    "🎉🎂 means",
    "def fibonacci(n):\n    ",
    'Write JSON: {"name": "Zoë", "tags": [',
)


def main() -> None:
    """Print the number of equal texts, and those that differ."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    with plan_of(given) as folder:
        plan = load_plan(folder)
        assert plan.decoder is not None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with Pipeline.launch(folder, threads=1, max_rows=4, cache_bytes=512 << 20) as pipeline:
            text = pipeline.text
            assert text is not None
            options = {"max_tokens": given.tokens, "temperature": 0}
            begun = [
                text.chat([{"role": "user", "content": prompt}], **options)
                if number % 2
                else text.complete(prompt, **options)
                for number, prompt in enumerate(PROMPTS)
            ]
            prompts = [one.prompt for one in begun]
            pieces = [list(one) for one in begun]
        decoder = ReferenceDecoder(given.model, plan.decoder, plan.tensors)
        ends, equal, held = set(plan.decoder.end_tokens), 0, 0
        for prompt, shown in zip(prompts, pieces, strict=True):
            tokens, _ = decoder.greedy(prompt, given.tokens)
            count = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            wanted = tokenizer.decode(tokens[:count])
            found = "".join(piece.text for piece in shown)
            equal += found == wanted
            held += sum(not piece.text for piece in shown[:-1])
            print(f"{'equal' if found == wanted else 'DIFFERS'} {found[:60]!r}", flush=True)
            if found != wanted:
                print(f"  wanted {wanted[:200]!r}\n  found  {found[:200]!r}")
    total = sum(len(shown) for shown in pieces)
    print(
        f"{equal} of {len(PROMPTS)} texts are equal; {total} tokens, {held} pieces without text (parts of characters)"
    )


if __name__ == "__main__":
    main()
