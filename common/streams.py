"""Random numbers that depend on a seed and on what they are for, and on nothing else."""

import hashlib

import numpy as np


def stream(seed: int, key: int) -> np.random.Generator:
    """Return the generator of a seed and a key, each below 2⁶⁴.

    As unsigned integers, because a list of them would go through float64 and lose the lowest bits.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))


def key_of(name: str) -> int:
    """Hash a name to a key below 2⁶⁴."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
