"""The offline tool, from driving frames to the command line, with the small model."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.animate import animate_video, driving_chunks, main, parser
from stages.config import WindowConfig
from stages.pipeline import animate
from stages.portraits import BUNDLED_CLIP, MAX_BYTES, fit_portrait, load_portrait
from stages.video import FramesHash, TimedFrame, read_video, square_resize

WINDOW = WindowConfig(chunk_frames=2, timesteps=(0, 300, 650))
NUM_FRAMES = 7


def numbered(count: int) -> list[np.ndarray]:
    return [np.full((4, 4, 3), number, np.uint8) for number in range(count)]


def numbers(chunks) -> list[list[int]]:
    return [chunk[:, 0, 0, 0].tolist() for chunk in chunks]


@pytest.fixture
def timed(draw_picture):
    """timed(count, height, width): driving frames at uneven times."""

    def make(count: int, height: int = 48, width: int = 48) -> list[TimedFrame]:
        return [
            TimedFrame(draw_picture(seed, height, width), 0.5 + seed / 25 + seed % 2 / 100) for seed in range(count)
        ]

    return make


@pytest.fixture(scope="module")
def portrait_file(draw_picture, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("portrait") / "portrait.png"
    Image.fromarray(draw_picture(1, 90, 70)).save(path)
    return path


@pytest.fixture(scope="module")
def video(draw_picture, write_video, tmp_path_factory) -> Path:
    """Seven frames, neither square nor with even sides."""
    frames = [draw_picture(seed, 61, 75) for seed in range(NUM_FRAMES)]
    return write_video(tmp_path_factory.mktemp("video") / "driving.mp4", frames)


@pytest.fixture
def command(portrait_file, video, folder, tmp_path):
    """command(*flags, option=value, ...): runs the tool."""

    def run(*flags: str, **changes) -> int:
        options = {"portrait": portrait_file, "driving": video, "weights": folder, "out": tmp_path / "out.mp4"}
        options |= {"device": "cpu", "threads": 1} | changes
        return main([*flags, *(f"--{name}={value}" for name, value in options.items())])

    return run


def test_the_end_of_the_driving_frames_is_mirrored():
    assert numbers(driving_chunks(numbered(7), WINDOW)) == [[0, 1], [2, 3], [4, 5], [6, 5], [4, 3], [2, 1]]
    assert numbers(driving_chunks(numbered(6), WINDOW)) == [[0, 1], [2, 3], [4, 5], [4, 3], [2, 1]]


def test_few_driving_frames_are_filled_with_the_last():
    assert numbers(driving_chunks(numbered(3), WINDOW)) == [[0, 1], [2, 2], [2, 2], [2, 2]]
    assert numbers(driving_chunks(numbered(1), WINDOW)) == [[0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(("chunk_frames", "num_levels"), [(2, 3), (5, 2), (3, 4)])
def test_every_driving_frame_has_a_place_and_levels_less_one_chunks_follow(chunk_frames, num_levels):
    window = WindowConfig(chunk_frames=chunk_frames, timesteps=tuple(range(num_levels)))
    for count in range(1, 2 * window.num_frames + 1):
        chunks = list(driving_chunks(iter(numbered(count)), window))
        assert len(chunks) == math.ceil(count / chunk_frames) + num_levels - 1
        assert {chunk.shape for chunk in chunks} == {(chunk_frames, 4, 4, 3)}
        assert np.concatenate(chunks)[:count, 0, 0, 0].tolist() == list(range(count))


def test_without_driving_frames_there_are_no_chunks():
    assert list(driving_chunks([], WINDOW)) == []


def test_there_are_as_many_frames_as_driving_frames_with_their_times(stages, draw_picture, timed):
    for count in range(1, 2 * stages.config.window.num_frames + 1):
        driving = timed(count)
        made = list(animate_video(stages, draw_picture(1), iter(driving), seed=0))
        assert [frame.time_s for frame in made] == [frame.time_s for frame in driving]
        assert {frame.rgb.shape for frame in made} == {(48, 48, 3)}


def test_without_driving_frames_nothing_is_made(stages, draw_picture):
    assert list(animate_video(stages, draw_picture(1), [], seed=0)) == []


def test_frame_k_is_what_driving_frame_k_gave_without_the_transition(stages, draw_picture, timed):
    driving = timed(5)
    chunks = list(driving_chunks((frame.rgb for frame in driving), stages.config.window))
    results = np.concatenate(list(animate(stages, draw_picture(1), chunks, seed=2)))
    made = np.stack([frame.rgb for frame in animate_video(stages, draw_picture(1), driving, seed=2)])
    assert np.array_equal(made, results[stages.config.window.num_transition_frames :][:5])


def test_the_first_frame_comes_when_the_window_is_full(stages, draw_picture, timed):
    taken = []

    def driving():
        for number, frame in enumerate(timed(12)):
            taken.append(number)
            yield frame

    next(animate_video(stages, draw_picture(1), driving(), seed=0))
    assert len(taken) == stages.config.window.num_frames


@pytest.mark.parametrize(("height", "width"), [(61, 75), (100, 33), (20, 20)])
def test_driving_frames_of_any_size_are_cut_square_and_scaled(stages, draw_picture, timed, height, width):
    driving = timed(3, height, width)
    square = [TimedFrame(square_resize(frame.rgb, 48), frame.time_s) for frame in driving]
    made, expected = (
        np.stack([frame.rgb for frame in animate_video(stages, draw_picture(1), frames, seed=0)])
        for frames in (driving, square)
    )
    assert np.array_equal(made, expected)


def test_the_command_writes_a_video_as_long_as_the_driving_one(command, video, tmp_path, capsys):
    assert command() == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out.mp4'}: {NUM_FRAMES} frames")
    written, source = (list(read_video(path)) for path in (tmp_path / "out.mp4", video))
    assert {frame.rgb.shape for frame in written} == {(48, 48, 3)}
    assert [frame.time_s for frame in written] == pytest.approx([frame.time_s for frame in source], abs=1e-3)


def test_the_report_is_one_line_of_json_whose_hash_follows_from_the_seed(command, tmp_path, capsys):
    hashes = []
    for seed in (5, 5, 6):
        assert command("--json", seed=seed) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["frames"], report["seed"], report["out"]) == (NUM_FRAMES, seed, str(tmp_path / "out.mp4"))
        assert report["seconds"] >= 0 and report["fps"] > 0
        hashes.append(report["frames_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64


def test_the_hash_is_that_of_the_frames_before_compression(command, stages, portrait_file, video, capsys):
    assert command("--json", seed=3) == 0
    digest = FramesHash()
    portrait = load_portrait(portrait_file.read_bytes(), 48)
    for frame in animate_video(stages, portrait, read_video(video), seed=3):
        digest.update(frame.rgb)
    assert json.loads(capsys.readouterr().out)["frames_sha256"] == digest.hexdigest()


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (3, 3), (NUM_FRAMES, NUM_FRAMES), (100, NUM_FRAMES)])
def test_at_most_so_many_frames_are_taken(command, tmp_path, capsys, frames, expected):
    assert command("--json", frames=frames) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == expected
    assert len(list(read_video(tmp_path / "out.mp4"))) == expected


def test_a_seed_may_have_32_bits(command, capsys):
    hashes = set()
    for seed in (2**32 - 2, 2**32 - 1):
        assert command("--json", seed=seed, frames=1) == 0
        hashes.add(json.loads(capsys.readouterr().out)["frames_sha256"])
    assert len(hashes) == 2


def test_a_portrait_file_too_large_for_a_server_is_animated_as_a_server_would_see_it(
    command, portrait_file, tmp_path, capsys
):
    large, shrunk = tmp_path / "large.png", tmp_path / "shrunk.jpg"
    large.write_bytes(portrait_file.read_bytes() + bytes(MAX_BYTES))
    shrunk.write_bytes(fit_portrait(large.read_bytes()))
    hashes = []
    for path in (large, shrunk):
        assert command("--json", portrait=path, frames=1) == 0
        printed = capsys.readouterr()
        hashes.append(json.loads(printed.out)["frames_sha256"])
        assert ("is shrunk" in printed.err) == (path == large)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("option", "name", "code"),
    [
        ("driving", "none.mp4", "bad_video"),
        ("driving", "text", "bad_video"),
        ("portrait", "none.png", "bad_portrait"),
        ("portrait", "text", "bad_portrait"),
        ("portrait", "black.png", "no_face_in_portrait"),
        ("portrait", "small.png", "bad_portrait"),
        ("weights", "none", "bad_weights"),
        ("weights", "text", "bad_weights"),
        ("weights", ".", "bad_config"),
    ],
)
def test_what_cannot_be_used_ends_with_code_2_and_names_the_reason(command, tmp_path, capsys, option, name, code):
    (tmp_path / "text").write_text("neither a picture nor a video")
    Image.new("RGB", (70, 70)).save(tmp_path / "black.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "small.png")
    assert command(**{option: tmp_path / name}) == 2
    captured = capsys.readouterr()
    assert f"error ({code}): " in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out.mp4").exists()


def test_a_driving_video_without_a_face_still_gives_a_video(command, write_video, tmp_path, capsys):
    faceless = write_video(tmp_path / "black.mp4", [np.zeros((48, 48, 3), np.uint8)] * 3)
    assert command("--json", driving=faceless) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 3


@pytest.mark.parametrize("out", ["none/out.mp4", "text/out.mp4", ".", "out.gif", "driving.mp4", "linked.mp4"])
def test_a_place_that_cannot_be_written_ends_with_code_2_before_anything_is_loaded(
    command, video, portrait_file, tmp_path, capsys, out
):
    (tmp_path / "text").write_text("")
    driving = tmp_path / "driving.mp4"
    driving.write_bytes(video.read_bytes())
    (tmp_path / "linked.mp4").symlink_to(portrait_file)
    assert command(out=tmp_path / out, driving=driving, weights="none") == 2
    assert capsys.readouterr().err.startswith("error (bad_out): ")
    assert driving.read_bytes() == video.read_bytes()


@pytest.fixture
def outputs(tmp_path) -> Path:
    """A folder with a video in it that is to be replaced."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "out.mp4").write_text("old")
    return tmp_path / "outputs"


def is_untouched(outputs: Path) -> bool:
    return [path.name for path in outputs.iterdir()] == ["out.mp4"] and (outputs / "out.mp4").read_text() == "old"


def test_a_run_that_fails_midway_leaves_the_old_video_and_nothing_else(
    command, draw_picture, write_video, outputs, tmp_path, capsys
):
    broken = write_video(tmp_path / "broken.mp4", [draw_picture(number) for number in range(60)])
    data = bytearray(broken.read_bytes())
    end = data.index(b"moov")
    data[end * 3 // 4 : end - 4] = b"\xff" * (end - 4 - end * 3 // 4)
    broken.write_bytes(data)
    assert command(driving=broken, out=outputs / "out.mp4") == 2
    assert "error (bad_video): " in capsys.readouterr().err
    assert is_untouched(outputs)


def test_an_interrupted_run_leaves_the_old_video_and_nothing_else(outputs):
    # The bundled model is slow enough to be met at work.
    options = {"portrait": "ada", "driving": BUNDLED_CLIP, "out": outputs / "out.mp4", "device": "cpu", "threads": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.Popen(
        [sys.executable, "-m", "stages.animate", *arguments],
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        # A test run in a shell's background ignores interrupts, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while run.poll() is None and not any(outputs.glob(".*.part")):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, printed = run.communicate(timeout=60)
    assert run.returncode == 130 and b"Traceback" not in printed
    assert is_untouched(outputs)


@pytest.mark.parametrize("changes", [{"device": "abacus"}, {"threads": -1}])
def test_a_device_or_thread_number_that_does_not_exist_ends_with_code_2(command, capsys, changes):
    try:
        code = command(frames=1, **changes)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": 2**32}, {"seed": "x"}, {"frames": 0}, {"frames": "all"}])
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(command, capsys, changes):
    with pytest.raises(SystemExit) as end:
        command(weights="none", **changes)
    assert end.value.code == 2
    assert f"--{next(iter(changes))}: give a whole number, " in capsys.readouterr().err


def test_by_default_the_bundled_model_is_run_with_seed_0():
    options = parser().parse_args(["--portrait", "ada", "--driving", "a.mp4", "--out", "b.mp4"])
    assert (options.weights, options.seed, options.frames, options.device, options.threads) == (
        "tiny",
        0,
        None,
        "auto",
        0,
    )


def test_it_is_a_module_to_be_run(portrait_file, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "stages.animate", f"--portrait={portrait_file}", "--driving=none.mp4", "--out=o.mp4"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error (bad_video): none.mp4: no such file")
