"""Chameleon's names for image codes, and where they put the codes among all ids.

There a code is an ordinary token of the text vocabulary with a telling name: ``IMGIMG``, the code's
decimal digits written A … J for 0 … 9, ``Z``; code 12 is ``IMGIMGBCZ``. Ids need not follow the
order of codes, so everything goes through this map.
"""

import re
from collections.abc import Mapping

_CODE = re.compile("IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def image_code_ids(tokens: Mapping[str, int]) -> dict[int, int]:
    """Code → id of every token (name → id) that is named after an image code."""
    named = ((_CODE.fullmatch(name), token) for name, token in tokens.items())
    return {int(match[1].translate(_DIGITS)): token for match, token in named if match}


def code_range(tokens: Mapping[str, int], codes: int) -> tuple[int, list[int]]:
    """(first id of the image codes, place of each code among them: id = first + place).

    Raises ``ValueError`` unless ``tokens`` name exactly the codes ``0 … codes − 1`` and their ids
    are a range without gaps, in any order: our vocabulary keeps a medium's codes in one range.
    """
    ids = image_code_ids(tokens)
    missing = [code for code in range(codes) if code not in ids]
    foreign = sorted(code for code in ids if code >= codes)
    if missing or foreign:
        raise ValueError(
            f"vocabulary_map names {len(ids)} image codes, the codebook has {codes}: "
            f"{len(missing)} have no name {missing[:3]}, {len(foreign)} names have no code "
            f"{foreign[:3]}; take the map and the codebook from one checkpoint"
        )
    used = sorted(ids.values())
    start = used[0]
    gap = next((token for token, found in enumerate(used, start) if token != found), None)
    if gap is not None:
        raise ValueError(
            f"vocabulary_map spreads the {codes} image codes over the ids {start} … {used[-1]}, "
            f"and id {gap} is not one of them or stands for two: they must be one range of ids, as "
            "embedding rows and counts per modality are kept by range; renumber the tokens (and "
            "rows) of the source first"
        )
    return start, [ids[code] - start for code in range(codes)]
