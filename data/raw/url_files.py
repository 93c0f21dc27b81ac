"""Files that rows name by URL, in a folder that the user has downloaded them to.

Nothing is fetched. With ``HEX`` the SHA-256 of the URL's UTF-8 bytes, 64 lower-case hexadecimal
digits, and ``EXT`` a suffix of the medium (``jpg``, ``png`` …), the file of a URL is the first of
``HEX`` and ``HEX.EXT`` that exists in the media root, else in its folders ``HE/`` or ``HE/X0/``,
named by the first two digits, and by the first two and the next two.
"""

import hashlib
from pathlib import Path

from earlyfuse.data.documents import BadSample
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import Medium
from earlyfuse.data.raw.media_files import is_url, read_file


def read_reference(root: Path, reference: str, medium: Medium) -> bytes:
    """The file of a URL, or at any other path below ``root``. ``BadSample`` as ``read_file``."""
    if not is_url(reference):
        return read_file(root, reference)
    digits = hashlib.sha256(reference.encode()).hexdigest()
    for folder in ("", f"{digits[:2]}/", f"{digits[:2]}/{digits[2:4]}/"):
        for suffix in ("", *(f".{suffix}" for suffix in medium.suffixes)):
            try:
                return read_file(root, f"{folder}{digits}{suffix}")
            except BadSample as error:
                if error.cause != "missing-file":
                    raise
    what = f"{shown(reference)} is not in the media root {root}, as {digits} or with a suffix"
    raise BadSample("missing-file", what)
