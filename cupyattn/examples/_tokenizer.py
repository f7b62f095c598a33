"""The SentencePiece-BPE tokenizer that a GGUF file carries (``tokenizer.ggml.model = "llama"``).

Text is cut at the special tokens, spaces become ``▁``, and the characters of each stretch between are merged
pair by pair: always the neighbours whose union scores highest in the vocabulary, of equals the leftmost. A
character that is no token falls back to one token per UTF-8 byte.
"""

from __future__ import annotations

import codecs
import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_SPACE = "▁"
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # of tokenizer.ggml.token_type; 1 is a normal token


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    tokens : sequence of str
        The vocabulary; the index is the token id.
    scores : sequence of float
        Which merge goes first: the higher score.
    types : sequence of int
        GGUF's token types.
    bos_id, eos_id : int
        The token a text begins with, and the one that ends it.
    add_bos : bool
        Whether `encode` puts ``bos_id`` in front.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        add_bos: bool = True,
    ) -> None:
        self.tokens, self.bos_id, self.eos_id, self.add_bos = tokens, bos_id, eos_id, add_bos
        self.ids = {token: i for i, token in enumerate(tokens)}
        self._scores, self._types = scores, types
        # Control tokens (<bos>, <start_of_turn>) and user-defined ones (line breaks, runs of spaces, tags)
        # are taken out of the text before any merging. Longest first: the first alternative that fits wins.
        special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
        special.sort(key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})")

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> Tokenizer:
        """Read the tokenizer from the ``tokenizer.ggml.*`` keys of a GGUF file's metadata."""
        get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        if get["model"] != "llama" or get.get("add_space_prefix", True):
            raise ValueError("only SentencePiece-BPE vocabularies without a space prefix are supported")
        return cls(
            get["tokens"],
            get["scores"].tolist(),
            get["token_type"].tolist(),
            bos_id=get["bos_token_id"],
            eos_id=get["eos_token_id"],
            add_bos=get["add_bos_token"],
        )

    def encode(self, text: str) -> list[int]:
        """Turn ``text`` into token ids; it may name special tokens such as ``<start_of_turn>``."""
        ids = [self.bos_id] if self.add_bos else []
        for i, stretch in enumerate(self._special.split(text)):
            if i % 2:  # split() puts what the pattern's group matched at the odd places
                ids.append(self.ids[stretch])
            else:
                ids.extend(self._merge(stretch.replace(" ", _SPACE)))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ``ids`` into text; control tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> Callable[[int], str]:
        """Make a function that takes one id at a time and returns the text that it completes.

        A character may come as several byte tokens: it is returned with the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self._bytes(token))

    def _bytes(self, token: int) -> bytes:
        text, kind = self.tokens[token], self._types[token]
        if kind == _BYTE:  # "<0xE2>"
            return bytes([int(text[3:5], 16)])
        return b"" if kind == _CONTROL else text.replace(_SPACE, " ").encode()

    def _merge(self, text: str) -> list[int]:
        """Merge the best pair first: a heap of candidates over a linked list of pieces, O(n log n)."""
        pieces = list(text)
        left = [i - 1 for i in range(len(pieces))]
        right = [i + 1 for i in range(len(pieces))]
        heap: list[tuple[float, int, int, str]] = []

        def consider(i: int, j: int) -> None:
            if i >= 0 and j < len(pieces):
                union = pieces[i] + pieces[j]
                if (token := self.ids.get(union)) is not None:
                    heapq.heappush(heap, (-self._scores[token], i, j, union))

        for i in range(len(pieces) - 1):
            consider(i, i + 1)
        while heap:
            _, i, j, union = heapq.heappop(heap)
            if pieces[i] + pieces[j] != union or right[i] != j:
                continue  # one of the two has meanwhile been merged with another neighbour
            pieces[i], pieces[j] = union, ""
            right[i] = right[j]
            if right[i] < len(pieces):
                left[right[i]] = i
            consider(left[i], i)
            consider(i, right[i])

        ids: list[int] = []
        for piece in filter(None, pieces):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids.extend(self.ids[f"<0x{byte:02X}>"] for byte in piece.encode())
        return ids
