import io
import random

import pytest
from PIL import Image

from stages.jpeg import MAX_SCANS, num_scans


def saved(**options):
    buffer = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("options", "expected"), [({}, 1), ({"quality": 100}, 1), ({"progressive": True}, 10)])
def test_the_scans_of_usual_pictures_are_counted(options, expected):
    assert num_scans(saved(**options)) == expected < MAX_SCANS


def test_scans_that_come_again_are_counted():
    whole = saved(progressive=True)
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    assert num_scans(whole[:-2] + last_scan * 100 + whole[-2:]) == 110


def test_a_video_behind_the_picture_is_no_scan():
    assert num_scans(saved() + random.Random(1).randbytes(4 * 2**20)) == 1
