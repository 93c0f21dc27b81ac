"""How the scan cuts a sequence, the same in every backend: the state before each chunk is kept."""

CHUNK = 16  # tokens; kept states take N/CHUNK fp32 numbers per token and channel


def count_chunks(length: int) -> int:
    """Chunks of a sequence, the last of which may be short."""
    return -(-length // CHUNK)
