"""Randomness as a function of position: (seed, epoch, index) for a picture, (seed, epoch) for the order, and
(seed, step, rank) inside a step. Nothing depends on what was drawn before, so a resumed run equals the
uninterrupted one and the number of loader workers does not matter.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64, Steele et al. 2014
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def _fold(*words: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of the words, elementwise over arrays."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = _mix(state + _GOLDEN + _mix(np.asarray(word).astype(np.uint64) + _GOLDEN))
    return state


def derive_seed(*words: int) -> int:
    """A 63-bit seed for torch.manual_seed and its like, from whole numbers such as (seed, step, rank)."""
    return int(_fold(*words) >> np.uint64(1))


def uniforms(seed: int, epoch: int | np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """(len(index), count) floats in [0, 1): the random numbers of each picture in an epoch, whoever asks for them."""
    per_sample = _fold(seed, epoch, np.asarray(index))
    drawn = _fold(per_sample[:, None], np.arange(count)[None, :])
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count) that depends on (seed, epoch) only."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 0x0DE5))
    return torch.randperm(count, generator=generator).numpy()
