"""How many scans a JPEG asks its decoder for. Called by whatever decodes pictures of strangers.

A progressive JPEG gives its pixels in several scans, usually ten, and each is a walk over all pixels. One may have as
few as 16 bytes, so that a file of few kilobytes keeps a decoder busy for seconds, and one of a few megabytes for
minutes. No torch.
"""

from __future__ import annotations

MAX_SCANS = 64
"""More than any tool writes; of the largest pictures that are taken they cost little more than the pixels."""
BEGINNINGS = tuple(b"\xff\xda\0" + bytes((6 + 2 * num_colours, num_colours)) for num_colours in (1, 2, 3, 4))
"""Of a scan. The decoder takes no others, and compressed pixels never look like one."""


def num_scans(data: bytes) -> int:
    """How many scans there are at most in the file, those of pictures inside it included."""
    return sum(data.count(beginning) for beginning in BEGINNINGS)
