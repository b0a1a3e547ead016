import struct
from fractions import Fraction
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest

from stages.errors import BadVideo
from stages.video import (
    FramesHash,
    VideoWriter,
    frame_rate,
    header_num_frames,
    read_video,
    sound_blocks,
    square_resize,
    upright,
)

RATE_HZ = 44_100


def flat(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def make_source(path, video_times_s, audio_start_s=None, audio_s=1.0, click_s=0.5):
    """A video with frames at the given times, and a tone-free sound with one loud click at `click_s`."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", options={"crf": "10", "bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.time_base = Fraction(1, 90_000)
        audio = container.add_stream("aac", rate=RATE_HZ, layout="mono") if audio_start_s is not None else None
        for number, time_s in enumerate(video_times_s):
            frame = av.VideoFrame.from_ndarray(flat(40 + number % 8 * 20), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 90_000), round(time_s * 90_000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = np.zeros((1, int(audio_s * RATE_HZ)), dtype=np.float32)
            at = int((click_s - audio_start_s) * RATE_HZ)
            samples[0, at : at + 200] = 0.9
            block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            block.sample_rate, block.time_base = RATE_HZ, Fraction(1, RATE_HZ)
            block.pts = round(audio_start_s * RATE_HZ)
            container.mux(audio.encode(block))
            container.mux(audio.encode(None))
    return path


def click_time_s(path) -> float:
    best = (0.0, 0.0)
    for block in sound_blocks(path, -1e9):
        loud = np.abs(block.samples).max(axis=0)
        best = max(best, (float(loud.max()), block.time_s + int(loud.argmax()) / 48_000))
    assert best[0] > 0.2
    return best[1]


def copy(source, target, skip=0):
    with VideoWriter(target, audio_from=source) as writer:
        for frame in list(read_video(source))[skip:]:
            writer.write(frame.rgb, frame.time_s)
    return target


def test_frames_come_with_their_real_times_also_at_a_changing_rate(tmp_path):
    times = [0.0, 0.04, 0.12, 0.5, 0.52]
    frames = list(read_video(make_source(tmp_path / "a.mp4", times)))
    assert [frame.time_s for frame in frames] == pytest.approx(times, abs=1e-3)
    assert frames[0].rgb.shape == (48, 64, 3) and frames[0].rgb.dtype == np.uint8


def test_the_written_video_keeps_every_time_and_size(tmp_path):
    times = [0.3, 0.34, 0.42, 0.8, 0.82]
    with VideoWriter(tmp_path / "out.mp4") as writer:
        for time_s in times:
            writer.write(flat(100, 33, 51), time_s)
    frames = list(read_video(tmp_path / "out.mp4"))
    assert [frame.time_s for frame in frames] == pytest.approx([time_s - 0.3 for time_s in times], abs=1e-3)
    assert frames[0].rgb.shape == (34, 52, 3)
    assert np.abs(frames[0].rgb.astype(int) - 100).max() <= 3


@pytest.mark.parametrize("fps", [12.5, 25, 30000 / 1001, 60])
def test_the_rate_of_the_source_is_kept(tmp_path, fps):
    source = make_source(tmp_path / "a.mp4", [k / fps for k in range(20)])
    times = [frame.time_s for frame in read_video(copy(source, tmp_path / "b.mp4"))]
    assert len(times) == 20 and frame_rate(times) == pytest.approx(fps, rel=1e-3)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-2)


@pytest.mark.parametrize(
    ("video_start_s", "audio_start_s", "skip"),
    [(0, 0, 0), (0, 0.3, 0), (0.3, 0, 0), (0.2, 0.2, 0), (0, 0, 6), (0, 0.3, 4), (0.3, 0, 5)],
)
def test_sound_keeps_its_place_beside_the_picture(tmp_path, video_start_s, audio_start_s, skip):
    times = [video_start_s + k / 25 for k in range(30)]
    source = make_source(tmp_path / "a.mp4", times, audio_start_s, click_s=audio_start_s + 0.6)
    read = [frame.time_s for frame in read_video(source)][skip:]
    copied = [frame.time_s for frame in read_video(copy(source, tmp_path / "b.mp4", skip))]
    assert len(copied) == len(read)
    expected = click_time_s(source) - read[0]
    assert click_time_s(tmp_path / "b.mp4") - copied[0] == pytest.approx(expected, abs=0.02)


def test_the_first_sound_stays_as_far_from_the_first_frame_as_it_was(tmp_path):
    for start in (0.0, 0.4):
        source = make_source(tmp_path / "a.mp4", [0.2 + k / 25 for k in range(30)], start, click_s=start + 0.5)
        offsets = []
        for path in (source, copy(source, tmp_path / "b.mp4")):
            first_sound = next(sound_blocks(path, -1e9)).time_s
            offsets.append(first_sound - next(read_video(path)).time_s)
        assert offsets[1] == pytest.approx(offsets[0], abs=0.03)


def test_sound_ends_with_the_picture(tmp_path):
    source = make_source(tmp_path / "a.mp4", [k / 25 for k in range(10)], 0.0, audio_s=5.0, click_s=0.1)
    *_, last = sound_blocks(copy(source, tmp_path / "b.mp4"), -1e9)
    assert last.time_s < 0.5


def test_blocks_of_sound_follow_each_other_without_holes(tmp_path):
    source = make_source(tmp_path / "a.mp4", [k / 25 for k in range(30)], 0.25, click_s=0.5)
    blocks = list(sound_blocks(source, from_s=0.4))
    assert blocks[0].time_s == pytest.approx(0.4, abs=1e-4)
    for earlier, later in pairwise(blocks):
        assert later.time_s == pytest.approx(earlier.time_s + earlier.samples.shape[1] / 48_000)


def test_a_video_without_sound_is_copied_without_sound(tmp_path):
    source = make_source(tmp_path / "a.mp4", [0, 0.04, 0.08])
    with av.open(str(copy(source, tmp_path / "b.mp4"))) as container:
        assert not container.streams.audio


def test_a_writer_without_frames_leaves_no_file(tmp_path):
    VideoWriter(tmp_path / "none.mp4").close()
    assert not (tmp_path / "none.mp4").exists()


def turned_mp4(path, matrix):
    """Writes the display matrix into the track header, as a phone that is held upright does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


def test_the_rotation_in_the_header_is_honoured(tmp_path):
    path = tmp_path / "a.mp4"
    picture = flat(20)
    picture[:, :16] = 220  # bright on the left
    with VideoWriter(path) as writer:
        for k in range(3):
            writer.write(picture, k / 25)
    turned_mp4(path, [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30])  # show turned clockwise by 90 degrees
    shown = next(read_video(path)).rgb
    assert shown.shape == (64, 48, 3)
    assert shown[:8].mean() > 180 and shown[-8:].mean() < 60  # what was left is now on top


def test_turning_by_full_quarters_only():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert upright(picture, 0) is picture
    assert np.array_equal(upright(picture, 90), np.rot90(picture))
    assert np.array_equal(upright(picture, -90), np.rot90(picture, 3))


def test_what_is_no_video_is_refused_with_the_reason(tmp_path):
    with pytest.raises(BadVideo, match="no such file"):
        next(read_video(tmp_path / "none.mp4"))
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(BadVideo, match="not a video"):
        next(read_video(tmp_path / "text.mp4"))
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(BadVideo, match="not a video"):
        next(read_video(tmp_path / "empty.mp4"))
    with pytest.raises(BadVideo, match="not a video"):
        next(read_video(tmp_path))


def test_a_truncated_video_is_refused(tmp_path):
    source = make_source(tmp_path / "a.mp4", [k / 25 for k in range(50)])
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(BadVideo, match="damaged"):
        list(read_video(cut))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        block.sample_rate = RATE_HZ
        container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    with pytest.raises(BadVideo, match="no video stream"):
        next(read_video(tmp_path / "a.wav"))


def test_a_video_stream_without_frames_is_refused(tmp_path):
    source = make_source(tmp_path / "a.mp4", [])
    with pytest.raises(BadVideo):
        list(read_video(source))


@pytest.mark.parametrize(("height", "width", "size_px"), [(90, 160, 64), (161, 91, 64), (33, 47, 64), (64, 65, 64)])
def test_any_size_becomes_a_square_once_and_for_all(height, width, size_px):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = square_resize(picture, size_px)
    assert square.shape == (size_px, size_px, 3) and square.flags.c_contiguous
    assert np.array_equal(square_resize(square, size_px), square)


def test_shrinking_averages_and_cropping_is_central():
    picture = np.zeros((40, 80, 3), dtype=np.uint8)
    picture[:, 20:60] = cv2.resize(flat(90, 40, 40), (40, 40))
    assert np.unique(square_resize(picture, 10)).tolist() == [90]


def test_the_hash_is_that_of_the_raw_pixels_in_order():
    a, b = flat(1, 4, 4), flat(2, 4, 4)
    first, second = FramesHash(), FramesHash()
    for frame in (a, b):
        first.update(frame)
    second.update(np.concatenate([a, b]))
    assert first.hexdigest() == second.hexdigest()
    swapped = FramesHash()
    swapped.update(b)
    swapped.update(a)
    assert swapped.hexdigest() != first.hexdigest()


def test_the_header_gives_an_estimate_of_the_number_of_frames(tmp_path):
    assert header_num_frames(make_source(tmp_path / "a.mp4", [0, 0.04, 0.08])) == 3
