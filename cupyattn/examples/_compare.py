"""Does the GPU write the same text as NumPy? ``python -m cupyattn.examples.gemma3 --compare`` tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyattn.examples._gguf import GGUFFile
from cupyattn.examples._tokenizer import Tokenizer
from cupyattn.examples.gemma3 import Engine, Gemma3, timed, warm_up

# Prose, code, lists, other languages; the last one is longer than the sliding window.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Ingredients for pancakes:\n\n- 2 cups of flour\n-",
    "日本の首都は",
    "The theory of relativity says that",
    "La capitale de l'Italie est",
    "SELECT name, price FROM",
    "In 1969, the first man on the Moon",
    "Counting: " + ", ".join(map(str, range(1, 200))) + ",",
)


def compare(
    file: GGUFFile, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, page_size: int
) -> dict[str, Any]:
    """Generate on NumPy and on the GPU side by side, and say where the texts part.

    Two backends round differently, so a text may turn where the two likeliest tokens are nearly tied. Hence
    each first difference is reported with the gap between the two highest logits on both sides.
    """
    import cupy

    token_ids = [tokenizer.encode(prompt) for prompt in prompts]
    names = ("numpy", "cupy")
    models = [Gemma3(file, xp) for xp in (np, cupy)]
    warm_up(models[1])
    engines = [Engine.sized_for(model, token_ids, num_tokens, page_size) for model in models]
    both = [engine.submit(token_ids) for engine in engines]
    texts: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    worst, seconds, num_written = 0.0, [0.0, 0.0], 0
    for (a, seconds_a), (b, seconds_b) in zip(
        *(timed(engine.run(requests, num_tokens)) for engine, requests in zip(engines, both, strict=True)),
        strict=True,
    ):
        if not a.has_prompt:
            seconds[0] += seconds_a
            seconds[1] += seconds_b
            num_written += len(a.requests)
        for row, request in enumerate(a.requests):
            i = both[0].index(request)
            if "first_difference" in texts[i]:
                continue  # from there on the two read different texts
            rows = [a.logits[row], cupy.asnumpy(b.logits[row])]
            worst = max(worst, float(np.linalg.norm(rows[0] - rows[1]) / np.linalg.norm(rows[0])))
            if request.tokens[-1] != b.requests[row].tokens[-1]:
                texts[i]["first_difference"] = {"at": len(request.generated) - 1}
                for name, logits in zip(names, rows, strict=True):
                    second, first = np.argsort(logits)[-2:].tolist()
                    texts[i]["first_difference"][name] = {
                        "top_2": [tokenizer.tokens[first], tokenizer.tokens[second]],
                        "gap": float(logits[first] - logits[second]),
                    }
    for i, text in enumerate(texts):
        for name, requests in zip(names, both, strict=True):
            text[name] = tokenizer.decode(requests[i].generated)
        text["same"] = both[0][i].tokens == both[1][i].tokens
    return {
        "device": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "num_tokens": num_tokens,
        "num_same": sum(text["same"] for text in texts),
        "largest_relative_difference_of_logits": worst,
        "tokens_per_second": {n: num_written / s if s else None for n, s in zip(names, seconds, strict=True)},
        "texts": texts,
    }
