"""Rotary position embedding: what a rotation is, apart from where it is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    At position ``p``, pair ``i`` of the first `rotary_dim` dimensions turns by ``p / scale * inv_freq[i]``
    radians; dimensions from `rotary_dim` on pass through.

    Parameters
    ----------
    theta : float
        Base of the frequencies: ``inv_freq[i] = theta ** (-2 * i / rotary_dim)``, unless `inv_freq` is given.
    rotary_dim : int, optional
        How many leading dimensions turn; even. All of `head_dim` by default.
    interleaved : bool
        Which dimensions form pair ``i``: ``(i, i + rotary_dim / 2)`` when false (GPT-NeoX, Llama, Gemma),
        ``(2 * i, 2 * i + 1)`` when true (GPT-J).
    scale : float
        Divides positions (linear position interpolation).
    inv_freq : sequence of float, shape [rotary_dim / 2], optional
        Frequencies in radians per position, for scalings that are not a power law (Llama 3, YaRN).
        Kept as a tuple, so that a `Rope` can be a dictionary key.

    Raises
    ------
    ValueError
        `theta` or `scale` is not positive and finite, `rotary_dim` is odd or not positive, or `inv_freq` is
        not a vector of `rotary_dim / 2` finite numbers.

    Notes
    -----
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864, equation 34.

    Examples
    --------
    >>> Rope(theta=100.0).inv_freq_array(4)
    array([1. , 0.1])
    """

    theta: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scale: float = 1.0
    inv_freq: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("theta", "scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Rope: {name} must be positive and finite, got {value}")
        if self.rotary_dim is not None and (self.rotary_dim <= 0 or self.rotary_dim % 2):
            raise ValueError(f"Rope: rotary_dim must be positive and even, got {self.rotary_dim}")
        if self.inv_freq is not None:
            values = np.asarray(self.inv_freq, dtype=np.float64)
            if values.ndim != 1 or not np.isfinite(values).all():
                raise ValueError(f"Rope: inv_freq must be a vector of finite numbers, got {values}")
            if self.rotary_dim is not None and 2 * len(values) != self.rotary_dim:
                expected = self.rotary_dim // 2
                raise ValueError(f"Rope: inv_freq must have {expected} entries, got {len(values)}")
            object.__setattr__(self, "inv_freq", tuple(values.tolist()))

    def inv_freq_array(self, head_dim: int) -> np.ndarray:
        """Radians per (scaled) position of each pair.

        Parameters
        ----------
        head_dim : int
            Size of the vectors to be rotated.

        Returns
        -------
        numpy.ndarray, shape [rotary_dim / 2], float64

        Raises
        ------
        ValueError
            `head_dim` is smaller than `rotary_dim` (or than twice the length of `inv_freq`), or is odd where
            both were left out.
        """
        given = None if self.inv_freq is None else np.array(self.inv_freq, dtype=np.float64)
        rotary_dim = self.rotary_dim or (head_dim if given is None else 2 * len(given))
        if rotary_dim > head_dim or rotary_dim % 2:
            raise ValueError(
                f"Rope: rotary_dim must be even and at most head_dim = {head_dim}, got {rotary_dim}"
            )
        if given is not None:
            return given
        return float(self.theta) ** (-2.0 * np.arange(rotary_dim // 2) / rotary_dim)
