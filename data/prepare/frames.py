"""Videos of a document: which of their frames are taken, from lists and from animated files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from earlyfuse.data.documents import BadSample, Document, Segment
from earlyfuse.data.media import medium_of
from earlyfuse.data.tokenizers.animation import MOST_FRAMES, animation_frames

LONG_VIDEO = ("even", "first", "drop")


class FrameRule(NamedTuple):
    """``most`` frames of a video, of every ``stride``-th; 0: no videos, animations are stills.

    ``long``: of more, "even" takes as many at equal distances, the first and the last among them,
    "first" takes the first, "drop" makes the sample a bad one ("long-video").
    """

    most: int
    stride: int
    long: str

    def choose(self, count: int) -> list[int]:
        """Numbers of the frames to take of ``count``."""
        if count > MOST_FRAMES:
            what = f"a video of {count:,} frames; it may have {MOST_FRAMES:,}. Cut it"
            raise BadSample("long-video", what)
        found = list(range(0, count, self.stride))
        if len(found) <= self.most:
            return found
        if self.long == "drop":
            raise BadSample(
                "long-video",
                f"a video of {len(found)} frames, {self.most} are wanted (video_frames); take "
                "more, or let long_video be even or first",
            )
        if self.long == "first" or self.most == 1:
            return found[: self.most]
        return [found[i * (len(found) - 1) // (self.most - 1)] for i in range(self.most)]


def chosen_frames(document: Document, rule: FrameRule) -> list[Segment]:
    """Segments of ``document``, videos and animations reduced to the frames that ``rule`` takes."""
    videos: list[list[Segment]] = []
    for segment in document.segments:
        if segment.continues:
            videos[-1].append(segment)
        else:
            videos.append([segment])
    return [frame for video in videos for frame in _chosen(video, rule)]


def _chosen(video: list[Segment], rule: FrameRule) -> Sequence[Segment]:
    """``video``: the frames of one, or any other segment alone."""
    first = video[0]
    if len(video) > 1 and not rule.most:
        what = f"a video of {len(video)} frames, and video_frames is 0; give --video-frames"
        raise BadSample("no-video-frames", f"{first.origin}: {what}")
    if isinstance(first.payload, str) or not (rule.most and medium_of(first.modality).video_list):
        return video
    try:
        if len(video) > 1:
            frames = [video[number] for number in rule.choose(len(video))]
        else:
            pictures = animation_frames(first.payload, rule.choose)
            frames = [replace(first, payload=picture) for picture in pictures] or video
    except BadSample as bad:
        raise BadSample(bad.cause, f"{first.origin}: {bad.message}") from bad
    return [replace(frame, continues=place > 0) for place, frame in enumerate(frames)]
