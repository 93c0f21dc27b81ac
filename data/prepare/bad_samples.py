"""Policies for samples that cannot be used: skip them, skip the rest of a shard too, or stop."""

from pathlib import Path

from earlyfuse.data.console import printable
from earlyfuse.data.documents import LOST_CAUSES, BadSample, LostSamples

POLICIES = ("skip", "stop", "skip-shards")


def count_bad(bad: BadSample, on_bad: str, shard: Path, name: str, expected: float) -> int:
    """How many samples ``bad``, found in ``shard``, stands for.

    ``expected``: see ``LostSamples.samples``. Raises ``ValueError`` that calls the shard ``name``
    where the policy ``on_bad`` says to end.
    """
    what = f"shard {printable(name)}: {without_path(bad, shard)} [{bad.cause}]"
    is_lost = isinstance(bad, LostSamples)
    count = bad.samples(expected) if isinstance(bad, LostSamples) else 1
    if on_bad == "stop" and not is_lost:
        raise ValueError(f"{what}; on_bad is 'stop': mend the sample, or choose 'skip'") from bad
    if is_lost and on_bad != "skip-shards":
        raise ValueError(
            f"{what}; about {count:,} {'sample is' if count == 1 else 'samples are'} "
            "lost: fetch or write the shard again, or choose on_bad 'skip-shards' to go on without"
        ) from bad
    return count


def without_path(bad: BadSample, shard: Path) -> str:
    """Its message without the path of ``shard``: records do not depend on where shards lie."""
    return bad.message.removeprefix(f"{printable(str(shard))}: ")


def skipped(drops: dict[str, int]) -> int:
    """Samples among ``drops`` that were there, and bad."""
    return sum(count for cause, count in drops.items() if cause not in LOST_CAUSES)


def lost(drops: dict[str, int]) -> int:
    """Samples among ``drops`` that went with the rest of their shards: an estimate."""
    return sum(drops.get(cause, 0) for cause in LOST_CAUSES)
