"""Chunks of a sequence, the same in every backend: the state before each is saved for backward."""

CHUNK = 16  # tokens; saved states take N/CHUNK fp32 numbers per token and channel


def count_chunks(length: int) -> int:
    """Number of chunks; the last may be short."""
    return -(-length // CHUNK)
