import contextlib
import os
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from stages.errors import BadVideo
from stages.video import (
    BadOutput,
    FramesHash,
    VideoWriter,
    check_output,
    header_num_frames,
    read_video,
    sound_blocks,
    square_resize,
    upright,
    with_square_pixels,
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
    assert len(times) == 20 and 19 / (times[-1] - times[0]) == pytest.approx(fps, rel=1e-3)
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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".mp4", ".MP4", ".m4v", ".mov", ".mkv"])
def test_every_kind_of_file_that_is_offered_can_be_written_and_read(tmp_path, ending):
    source = make_source(tmp_path / "a.mp4", [k / 25 for k in range(10)], 0.0, click_s=0.2)
    path = tmp_path / f"out{ending}"
    check_output(path, source)
    times = [frame.time_s for frame in read_video(copy(source, path))]
    assert times == pytest.approx([k / 25 for k in range(10)], abs=2e-3)
    assert click_time_s(path) == pytest.approx(0.2, abs=0.03)


def write_two(writer):
    for time_s in (0.0, 0.04):
        writer.write(flat(100), time_s)


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_everything_as_it_was(tmp_path, interruption):
    (tmp_path / "out.mp4").write_text("precious")
    for name in ("out.mp4", "new.mp4"):
        with pytest.raises(interruption), VideoWriter(tmp_path / name) as writer:
            write_two(writer)
            raise interruption
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "precious"


def test_an_existing_video_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_text("old")
    with VideoWriter(path) as writer:
        write_two(writer)
        assert path.read_text() == "old"
    assert len(list(read_video(path))) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_only_closes_keeps_what_came_before_an_error(tmp_path):
    with pytest.raises(RuntimeError), contextlib.closing(VideoWriter(tmp_path / "out.mp4")) as writer:
        write_two(writer)
        raise RuntimeError
    assert len(list(read_video(tmp_path / "out.mp4"))) == 2


def test_a_link_is_followed_and_a_new_file_has_the_usual_rights(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "folder" / "real.mp4")
    with VideoWriter(tmp_path / "link.mp4") as writer:
        write_two(writer)
    assert (tmp_path / "link.mp4").is_symlink() and len(list(read_video(tmp_path / "folder" / "real.mp4"))) == 2
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "link.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_video_that_cannot_be_written_is_a_typed_error_and_stays_ended(tmp_path):
    (tmp_path / "gone").mkdir()
    writer = VideoWriter(tmp_path / "gone" / "out.mp4")
    (tmp_path / "gone").rmdir()
    with pytest.raises(BadOutput, match="another place"), writer:
        write_two(writer)
    with pytest.raises(ValueError, match="after the end"):
        writer.write(flat(100), 0.04)
    writer.close()
    assert not list(tmp_path.iterdir())


def locked_folder(tmp_path):
    """A folder in which nobody can make a file; the rights alone would not stop root."""
    if os.geteuid() == 0:
        return Path("/proc")
    (tmp_path / "locked").mkdir(mode=0o555)
    return tmp_path / "locked"


def test_a_place_where_no_video_can_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, words in [
        (tmp_path / "none" / "out.mp4", "make the folder"),
        (tmp_path / "file" / "out.mp4", "is not a folder"),
        (tmp_path / "folder.mp4", "is a folder: name a file in it"),
        (tmp_path / "out.avi", "let it end in .mp4"),
        (tmp_path / "out", "let it end in .mp4"),
        (tmp_path / "pipe.mp4", "may not be replaced"),
        (tmp_path / f"{'x' * 300}.mp4", "cannot be written"),
        (locked_folder(tmp_path) / "out.mp4", "cannot be written"),
    ]:
        with pytest.raises(BadOutput, match=words) as error:
            check_output(path)
        assert error.value.code == "bad_out"
    assert {path.name for path in tmp_path.iterdir()} - {"locked"} == {"folder.mp4", "file", "pipe.mp4"}


def test_an_output_that_is_also_an_input_is_refused_whatever_it_is_called(tmp_path):
    (tmp_path / "driving.mp4").write_text("precious")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "driving.mp4")
    for out in ("driving.mp4", "link.mp4"):
        with pytest.raises(BadOutput, match="would replace"):
            check_output(tmp_path / out, "ada", tmp_path / "driving.mp4")
    check_output(tmp_path / "other.mp4", "ada", tmp_path / "driving.mp4")
    check_output(tmp_path / "driving.mp4", "ada", tmp_path / "none.mp4")
    assert (tmp_path / "driving.mp4").read_text() == "precious"


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


def make_anamorphic(path, aspect, rotation=0):
    """64x48 pixels of the given width over height, bright in the left quarter, with the turn that a player does."""
    picture = flat(20)
    picture[:, :16] = 220
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.set_display_rotation(rotation)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.time_base, frame.pts = Fraction(1, 25), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("aspect", "rotation", "shape"),
    [("1", 0, (48, 64)), ("2", 0, (24, 64)), ("1/2", 0, (48, 32)), ("4/3", 90, (64, 36)), ("3/4", -90, (48, 48))],
)
def test_pixels_that_are_not_square_are_made_square_before_the_picture_is_turned(
    tmp_path, ending, aspect, rotation, shape
):
    shown = next(read_video(make_anamorphic(tmp_path / f"a{ending}", aspect, rotation))).rgb
    assert shown.shape == (*shape, 3)
    # Turned back, the bright part is a quarter of the width again.
    bright = upright(shown, -rotation)[..., 0].mean(axis=0) > 120
    assert bright.sum() == len(bright) // 4 and bright[: len(bright) // 4].all()


def test_square_pixels_stay_as_they_are_and_no_header_makes_a_picture_vanish_or_grow():
    picture = flat(90)
    for aspect in (None, Fraction(0), Fraction(1)):
        assert with_square_pixels(picture, aspect) is picture
    assert with_square_pixels(picture, Fraction(10**6)).shape == (1, 64, 3)
    assert with_square_pixels(picture, Fraction(1, 10**6)).shape == (48, 1, 3)


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
