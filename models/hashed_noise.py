"""Random numbers as hashes: a number is a function of a key and an index, of nothing else.

An index that names a place in the global batch gives the same number on any number of ranks, in any
micro-batch, after a resume, and when a block is recomputed. Everything is computed on the device.
"""

import hashlib
import math

import torch


def key_of(*parts: object) -> int:
    """A signed 64-bit key from names and numbers, such as a seed and a step."""
    text = "/".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """fp32 numbers in (0, 1), of the shape of ``index`` (int64) and ``key`` together."""
    return _fraction(_scrambled(key + _scrambled(index)), 23)


def normal(key: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """fp32 standard normal numbers of the shape of ``index`` (int64), below 5.8 (Box-Muller)."""
    bits = _scrambled(key + _scrambled(index))
    radius = (-2 * _fraction(bits, 23).log()).sqrt()
    return radius * (2 * math.pi * _fraction(bits >> 32, 23)).cos()


def _fraction(bits: torch.Tensor, width: int) -> torch.Tensor:
    # and a half: exact in fp32, and never 0 or 1
    return ((bits & ((1 << width) - 1)).float() + 0.5) * 2.0**-width


def _scrambled(value: torch.Tensor) -> torch.Tensor:
    """Hash of an int64: the finaliser of splitmix64."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of an int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
