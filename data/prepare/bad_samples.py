"""Policies for samples that cannot be used: skip them, skip the rest of a shard too, or stop."""

from earlyfuse.data.console import printable
from earlyfuse.data.documents import LOST_CAUSES, BadSample, LostSamples
from earlyfuse.data.raw.shard import RawShard

POLICIES = ("skip", "stop", "skip-shards")


def count_bad(bad: BadSample, on_bad: str, shard: RawShard, name: str, expected: float) -> int:
    """Number of samples that ``bad``, found in ``shard``, stands for.

    ``expected``: see ``LostSamples.samples``. Raises ``ValueError``, which calls the shard
    ``name``, where the policy ``on_bad`` is to stop.
    """
    what = f"shard {printable(name)}: {without_path(bad, shard)} [{bad.cause}]"
    if not isinstance(bad, LostSamples):
        if on_bad == "stop":
            remedy = "on_bad is 'stop': mend the sample, or choose 'skip'"
            raise ValueError(f"{what}; {remedy}") from bad
        return 1
    count = bad.samples(expected)
    if on_bad != "skip-shards":
        raise ValueError(
            f"{what}; about {count:,} {'sample is' if count == 1 else 'samples are'} lost: fetch "
            "or write the shard again, or choose on_bad 'skip-shards'"
        ) from bad
    return count


def without_path(bad: BadSample, shard: RawShard) -> str:
    """The message without the path of ``shard``: records do not depend on where shards are."""
    return bad.message.removeprefix(f"{printable(str(shard))}: ")


def skipped(drops: dict[str, int]) -> int:
    """Number of bad samples in ``drops``, without those of lost shards."""
    return sum(count for cause, count in drops.items() if cause not in LOST_CAUSES)


def lost(drops: dict[str, int]) -> int:
    """Estimated number of samples in ``drops`` that were lost with the rest of their shards."""
    return sum(drops.get(cause, 0) for cause in LOST_CAUSES)
