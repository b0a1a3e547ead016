import numpy as np
import pytest

from serving.codec import encode
from serving.intake import Intake, decode_frames
from serving.protocol import DrivingFrame, Hello, ProtocolError
from stages.chunks import flush_indices
from stages.config import ModelConfig, UNetConfig, WindowConfig

WINDOW = WindowConfig(chunk_frames=3, timesteps=(0, 1))
CONFIG = ModelConfig(size_px=64, window=WINDOW, unet=UNetConfig(max_positions=64))


class Camera:
    """Feeds an intake with raw frames, each of one grey value: its sequence number."""

    def __init__(self, mode="live", codec="raw"):
        self.intake = Intake(Hello(1, mode=mode, codec=codec), CONFIG)
        self.seq = 0

    def take(self, now_s=None, seq=None, side=20, payload=None, credit=10**6, period_s=None):
        seq = self.seq if seq is None else seq
        self.seq = seq + 1
        now_s = seq / 25 if now_s is None else now_s
        data = encode(np.full((side, side, 3), seq % 256, np.uint8), "raw") if payload is None else payload
        message = DrivingFrame(seq, now_s * 1000, side, side)
        self.intake.take(message, memoryview(data), now_s, credit, period_s)

    def refused(self, **options):
        with pytest.raises(ProtocolError) as error:
            self.take(**options)
        return error.value.code

    def chunk(self, now_s=0.0, period_s=None):
        """Sequence numbers of the next chunk's driving frames, and the grey values of its pictures; None: none yet."""
        frames = self.intake.take_out(now_s, period_s)
        if frames is None:
            return None
        stamps, pictures = self.intake.use(decode_frames(frames, "raw", 64))
        assert pictures.shape == (3, 64, 64, 3)
        return [stamp.seq for stamp in stamps], pictures[:, 5, 5, 0].tolist()


def test_a_lossless_chunk_is_the_next_frames_in_order():
    camera = Camera("lossless")
    for _ in range(7):
        camera.take()
    assert camera.chunk() == ([0, 1, 2], [0, 1, 2])
    assert camera.chunk() == ([3, 4, 5], [3, 4, 5])
    assert camera.chunk() is None


def test_a_live_chunk_needs_new_frames_and_takes_them_spread_up_to_the_newest():
    camera = Camera()
    for _ in range(6):
        camera.take()
    assert camera.chunk() == ([1, 3, 5], [1, 3, 5])
    camera.take()
    assert camera.chunk() is None
    assert +camera.intake.dropped == {"surplus": 3}


def test_frames_are_resized_to_the_models_square():
    camera = Camera("lossless")
    camera.take(side=30)
    (picture,) = decode_frames(camera.intake._pending, "raw", 64)
    assert picture.shape == (64, 64, 3)


def test_a_live_ring_is_bounded_whatever_comes_in():
    camera = Camera()
    for _ in range(100):
        camera.take()
    assert camera.intake.dropped["surplus"] == 91
    assert camera.chunk()[0][-1] == 99


def test_frames_too_old_are_dropped_but_a_slow_camera_is_not_starved():
    camera = Camera()
    for k in range(2):
        camera.take(now_s=k * 0.04, period_s=0.1)
    camera.take(now_s=10.0, period_s=0.1)
    assert camera.intake.dropped["stale"] == 2
    slow = Camera()
    chunks = 0
    for k in range(30):
        slow.take(now_s=k * 0.5, period_s=0.1)
        chunks += slow.chunk(k * 0.5, 0.1) is not None
    assert chunks >= 9


def test_frames_that_have_grown_old_while_the_pipeline_was_full_are_not_used():
    camera = Camera()
    for k in range(4):
        camera.take(now_s=k * 0.04, period_s=0.1)
    assert camera.chunk(now_s=5.0, period_s=0.1) is None
    assert camera.intake.dropped["stale"] == 4


def test_what_came_last_before_the_end_is_used_however_old():
    camera = Camera()
    for k in range(3):
        camera.take(now_s=k * 0.04, period_s=0.1)
    camera.intake.end()
    assert camera.chunk(now_s=5.0, period_s=0.1)[0] == [0, 1, 2]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 6, 11, 20])
def test_the_tail_is_that_of_the_offline_tool(num_frames):
    camera = Camera("lossless")
    seqs, pictures = [], []

    def use_all():
        while (chunk := camera.chunk()) is not None:
            seqs.extend(chunk[0])
            pictures.extend(chunk[1])

    for _ in range(num_frames):
        camera.take()
        use_all()
    assert not camera.intake.is_used_up
    camera.intake.end()
    use_all()
    assert pictures == [*range(num_frames), *flush_indices(num_frames, 3, 2)]
    assert seqs == list(range(num_frames)) and camera.intake.num_used == num_frames
    assert camera.intake.is_used_up


def test_an_end_without_frames_needs_no_pipeline():
    camera = Camera()
    camera.intake.end()
    assert camera.chunk() is None and camera.intake.is_used_up


def test_a_damaged_frame_is_dropped_and_the_others_wait_for_the_next():
    camera = Camera()
    for _ in range(3):
        camera.take()
    assert len(camera.intake.take_out(0.0, None)) == 3
    camera.intake.give_back([False, True, False])
    assert camera.chunk() is None
    camera.take()
    assert camera.chunk() == ([0, 2, 3], [0, 2, 3])
    assert +camera.intake.dropped == {"bad_frame": 1}


def test_a_damaged_last_frame_changes_the_padding():
    camera = Camera("live")
    for _ in range(2):
        camera.take()
    camera.intake.end()
    camera.intake.take_out(0.0, None)
    camera.intake.give_back([False, True])
    assert camera.chunk() == ([0], [0, 0, 0])
    assert camera.chunk() == ([], [0, 0, 0])
    assert camera.intake.is_used_up


def test_only_damage_before_the_end_is_like_no_frame():
    camera = Camera()
    camera.take()
    camera.intake.end()
    camera.intake.take_out(0.0, None)
    camera.intake.give_back([True])
    assert camera.intake.is_used_up


def test_pictures_are_decoded_as_they_come_or_told_what_is_wrong():
    camera = Camera(codec="jpeg")
    camera.take(payload=encode(np.full((64, 64, 3), 80, np.uint8), "jpeg"))
    camera.take(payload=encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "jpeg")[:-900])
    good, bad = decode_frames(camera.intake._pending, "jpeg", 64)
    assert np.abs(good.astype(int) - 80).max() <= 1
    assert bad.code == "bad_frame" and "not a whole jpeg picture" in str(bad)


def test_a_picture_keeps_no_larger_one_in_memory():
    camera = Camera(codec="raw")
    camera.intake.take(DrivingFrame(0, 0.0, 64, 2000), memoryview(bytes(64 * 2000 * 3)), 0.0, 1, None)
    (picture,) = decode_frames(camera.intake._pending, "raw", 64)
    assert picture.base is None and picture.shape == (64, 64, 3)


def test_every_received_frame_is_used_or_dropped_for_a_reason():
    camera = Camera()
    for k in range(40):
        camera.take()
        if k % 7 == 0:
            camera.chunk(k / 25)
    camera.refused(seq=3)
    assert camera.intake.take_out(40 / 25, None) is not None
    camera.intake.drop_pending()
    intake = camera.intake
    assert intake.num_received == 41 == intake.num_used + sum(intake.dropped.values())
    assert intake.dropped["unused"] >= 3


def test_what_is_wrong_with_a_frame_is_said_and_counted():
    camera = Camera()
    camera.take(seq=5)
    assert camera.refused(seq=5) == "seq_backwards"
    assert camera.refused(seq=4) == "seq_backwards"
    assert camera.refused(seq=6, side=21) == "frame_size_changed"
    assert camera.refused(seq=7, payload=b"xyz") == "bad_frame"
    camera.take(seq=8)
    camera.intake.end()
    assert camera.refused(seq=9) == "unexpected"
    assert camera.intake.dropped["seq_backwards"] == 2


def test_a_lossless_client_without_credit_is_refused_and_a_live_one_needs_none():
    camera = Camera("lossless")
    camera.take(credit=1)
    assert camera.refused(credit=1) == "no_credit"
    Camera("live").take(credit=0)
