"""Picks are pure and shared out fairly, frames are found by their times, and bad clips are named and replaced."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from training.clips import (
    BadClip,
    Pick,
    Sampling,
    decode_frames,
    epoch_order,
    load,
    pick_frames,
    picks,
    plain_batches,
)
from training.draw import Plan, draw_clip
from training.layout import (
    BadData,
    Boxes,
    Clip,
    Manifest,
    Truth,
    boxes_path,
    read_boxes,
    read_truth,
    truth_path,
    video_path,
    write_boxes,
    write_truth,
)

SIZE = 48
LENGTHS = (14, 9, 21, 11, 13)
SPREAD = Sampling(3, "spread")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Five people of unequal lengths."""
    folder = tmp_path_factory.mktemp("data")
    clips = [draw_clip(Plan(folder, "talk", seed, length, SIZE)) for seed, length in enumerate(LENGTHS)]
    return Manifest(folder, SIZE, 25.0, tuple(clips))


@pytest.fixture
def data(drawn, tmp_path):
    """A copy to spoil."""
    shutil.copytree(drawn.folder, tmp_path / "copy")
    return dataclasses.replace(drawn, folder=tmp_path / "copy")


def many(num_clips, num_frames=100):
    return Manifest(Path("nowhere"), SIZE, 25.0, tuple(Clip(f"{i:06d}", num_frames) for i in range(num_clips)))


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(50, 3, 1).tolist() == orders[1]


def test_ranks_together_visit_every_clip_once_an_epoch_but_for_a_remainder():
    manifest = many(11)
    for epoch in range(3):
        visited = [pick.clip for rank in range(3) for pick in islice(picks(manifest, SPREAD, 5, rank, 3, 3 * epoch), 3)]
        assert len(set(visited)) == len(visited) == 9


def test_picks_go_on_from_any_start():
    manifest, all_picks = many(7), list(islice(picks(many(7), SPREAD, 5, 1, 2), 20))
    for start in (0, 2, 3, 8, 15):
        assert list(islice(picks(manifest, SPREAD, 5, 1, 2, start), 5)) == all_picks[start : start + 5]


def test_a_far_start_costs_no_more_than_an_epoch():
    started_s = time.monotonic()
    next(picks(many(1000), SPREAD, 5, 1, 2, 10**12))
    assert time.monotonic() - started_s < 0.5


def test_what_a_clip_shows_depends_on_neither_rank_nor_world_size():
    alone = {pick.clip: pick.frames for pick in islice(picks(many(8), SPREAD, 5, 0, 1), 8)}
    shared = {pick.clip: pick.frames for rank in (0, 1) for pick in islice(picks(many(8), SPREAD, 5, rank, 2), 4)}
    assert alone == shared


def test_epochs_and_seeds_show_different_frames():
    shown = [
        {pick.clip: pick.frames for pick in islice(picks(many(6), SPREAD, seed, 0, 1, start), 6)}
        for seed, start in ((5, 0), (5, 6), (6, 0))
    ]
    assert shown[0] != shown[1] and shown[0] != shown[2]


def test_more_workers_than_clips_are_refused():
    with pytest.raises(BadData, match="fewer workers"):
        next(picks(many(2), SPREAD, 5, 0, 3))


def drawn_frames(sampling, num_frames, num_draws=200):
    return [pick_frames(sampling, num_frames, np.random.default_rng(seed)) for seed in range(num_draws)]


def test_spread_keeps_its_distance_from_the_reference_in_long_clips_only():
    sampling = Sampling(4, "spread", margin=30)
    distances = [abs(frame - first) for first, *others in drawn_frames(sampling, 65) for frame in others]
    assert min(distances) == 30
    assert min(abs(f - first) for first, *others in drawn_frames(sampling, 64) for f in others) == 1


def test_spread_starts_from_the_portrait_as_often_as_asked():
    for share in (0.0, 0.25, 1.0):
        firsts = [frames[0] == 0 for frames in drawn_frames(Sampling(2, "spread", portrait_first=share), 1000, 1000)]
        assert np.mean(firsts) == pytest.approx(share, abs=0.05)


def test_spread_repeats_frames_only_where_there_are_too_few():
    assert all(len(set(frames)) == 7 for frames in drawn_frames(Sampling(6, "spread"), 7))
    assert all(frames[0] not in frames[1:] and max(frames) < 4 for frames in drawn_frames(Sampling(6, "spread"), 4))


def test_a_run_keeps_its_stride_behind_the_portrait():
    runs = np.array(drawn_frames(Sampling(5, "run", stride=3), 20))
    assert not runs[:, 0].any() and (np.diff(runs[:, 1:]) == 3).all()
    assert (runs[:, 1].min(), runs[:, -1].max()) == (1, 19)


def test_a_run_has_a_smaller_stride_in_a_shorter_clip():
    assert drawn_frames(Sampling(5, "run", stride=3), 11, 1) == [(0, 1, 3, 5, 7, 10)]
    assert drawn_frames(Sampling(5, "run", stride=3), 6, 1) == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize(("sampling", "num_frames"), [(Sampling(5, "run"), 5), (Sampling(1, "spread"), 1)])
def test_a_clip_that_is_too_short_is_asked_for_frames_that_it_has_not(sampling, num_frames):
    assert max(max(frames) for frames in drawn_frames(sampling, num_frames)) >= num_frames


def test_frames_are_found_whatever_is_asked(drawn):
    path = video_path(drawn.folder, drawn.clips[2].name)
    with av.open(str(path)) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(everything) == LENGTHS[2]
    rng = np.random.default_rng(1)
    for _ in range(60):
        asked = rng.integers(0, LENGTHS[2], rng.integers(1, 6)).tolist()
        assert np.array_equal(decode_frames(path, asked), everything[asked])


def write_video(path, sizes, times=None, **options):
    """Noise of these sizes, shown at `times`, in 25ths of a second."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = sizes[0], sizes[0], "yuv420p"
        rng = np.random.default_rng(1)
        for index, size in enumerate(sizes):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (size, size, 3), np.uint8), format="rgb24")
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_sample_holds_what_the_folder_says_of_its_frames(drawn):
    sample = load(drawn, Pick(3, (4, 0, 9, 9)))
    name = drawn.clips[3].name
    truth, boxes = read_truth(drawn.folder, name), read_boxes(drawn.folder, name)
    assert sample.pixels.shape == (4, SIZE, SIZE, 3) and np.array_equal(sample.pixels[2], sample.pixels[3])
    assert np.array_equal(sample.motions, truth.motions[[4, 0, 9, 9]])
    assert np.array_equal(sample.canonical, truth.canonical)
    assert np.array_equal(sample.boxes[:, 0], boxes.face[[4, 0, 9, 9]])
    assert np.array_equal(sample.boxes[:, 3], boxes.mouth[[4, 0, 9, 9]])


def test_a_filmed_clip_has_no_truth(data):
    truth_path(data.folder, data.clips[3].name).unlink()
    sample = load(data, Pick(3, (0, 1)))
    assert np.isnan(sample.motions).all() and sample.motions.shape == (2, 14)
    assert np.isnan(sample.canonical).all() and sample.canonical.shape == (21, 3)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_off(path):
    write_video(path, [SIZE] * LENGTHS[0], movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


VIDEOS = {
    "missing": (lambda path: path.unlink(), "missing_video"),
    "cut": (cut, "unreadable_video"),
    "breaking off": (break_off, "unreadable_video"),
    "no video": (lambda path: path.write_text("not a video"), "unreadable_video"),
    "empty": (lambda path: path.write_bytes(b""), "unreadable_video"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "unreadable_video"),
    "too short": (lambda path: write_video(path, [SIZE] * 12), "too_few_frames"),
    "of variable rate": (
        lambda path: write_video(path, [SIZE] * 14, [0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 30, 31, 32, 33]),
        "unreadable_video",
    ),
    "too large": (lambda path: write_video(path, [SIZE + 16] * LENGTHS[0]), "wrong_size"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_bad_video_is_refused_with_its_reason(data, name):
    spoil, code = VIDEOS[name]
    spoil(video_path(data.folder, data.clips[0].name))
    with pytest.raises(BadClip) as raised:
        load(data, Pick(0, (0, 3, 11)))
    assert raised.value.code == code and data.clips[0].name in str(raised.value)
    with pytest.raises(BadClip) as raised:
        load(data, Pick(0, (0, 3, 11)), np.empty((3, SIZE, SIZE, 3), np.uint8))
    assert raised.value.code == code


def test_pixels_are_decoded_where_the_caller_wants_them(data):
    out, pick = np.empty((3, SIZE, SIZE, 3), np.uint8), Pick(0, (0, 3, 11))
    sample = load(data, pick, out)
    assert np.shares_memory(sample.pixels, out) and np.array_equal(out, load(data, pick).pixels)


def test_a_pick_beyond_the_clip_is_refused(drawn):
    with pytest.raises(BadClip) as raised:
        load(drawn, Pick(1, (0, 9)))
    assert raised.value.code == "too_few_frames"


def boxes_of(num_frames, face=(3, 4, 30, 32)):
    part = np.tile(np.int32(face), (num_frames, 1))
    return Boxes(part, part, part, part)


BOXES = {
    "missing": lambda folder, name: boxes_path(folder, name).unlink(),
    "damaged": lambda folder, name: boxes_path(folder, name).write_bytes(b"PK"),
    "too few": lambda folder, name: write_boxes(folder, name, boxes_of(13)),
    "empty": lambda folder, name: write_boxes(folder, name, boxes_of(14, (9, 9, 9, 20))),
    "outside": lambda folder, name: write_boxes(folder, name, boxes_of(14, (9, 9, SIZE + 1, 20))),
}


@pytest.mark.parametrize("name", BOXES)
def test_bad_boxes_are_refused(data, name):
    BOXES[name](data.folder, data.clips[0].name)
    with pytest.raises(BadClip) as raised:
        load(data, Pick(0, (0, 3)))
    assert raised.value.code == "bad_boxes"


def test_truth_of_a_wrong_shape_is_refused(data):
    write_truth(data.folder, data.clips[0].name, Truth(np.zeros((14, 13), np.float32), np.zeros((21, 3), np.float32)))
    with pytest.raises(BadClip) as raised:
        load(data, Pick(0, (0, 3)))
    assert raised.value.code == "bad_truth"


def take(manifest, num_batches, start_batch=0, rank=0, sampling=SPREAD):
    return list(islice(plain_batches(manifest, sampling, 2, 5, rank, 2, start_batch), num_batches))


def same(first, second):
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name), equal_nan=field.name != "bad")
        if field.name != "bad"
        else first.bad == second.bad
        for field in dataclasses.fields(first)
    )


def test_batches_have_the_samples_of_their_picks(drawn):
    [batch] = take(drawn, 1)
    assert batch.pixels.shape == (2, 4, SIZE, SIZE, 3) and batch.pixels.dtype == np.uint8
    assert batch.boxes.shape == (2, 4, 4, 4) and batch.boxes.dtype == np.int32
    assert batch.motions.shape == (2, 4, 14) and batch.motions.dtype == np.float32
    assert batch.canonical.shape == (2, 21, 3) and batch.canonical.dtype == np.float32
    chosen = list(islice(picks(drawn, SPREAD, 5, 0, 2), 2))
    assert batch.clips.tolist() == [pick.clip for pick in chosen] and batch.clips.dtype == np.int64
    assert np.array_equal(batch.pixels[1], load(drawn, chosen[1]).pixels)
    assert batch.bad == ()


def test_batches_go_on_from_any_batch(drawn):
    whole = take(drawn, 6)
    assert all(same(*pair) for pair in zip(take(drawn, 3, start_batch=3), whole[3:], strict=True))


def test_bad_clips_are_replaced_by_the_next_good_pick_and_named(data):
    order = [pick.clip for pick in islice(picks(data, SPREAD, 5, 0, 2), 8)]
    spoilt = order[0]
    video_path(data.folder, data.clips[spoilt].name).unlink()
    batches = take(data, 4)
    later = [next(clip for clip in order[number:] if clip != spoilt) for number in range(7)]
    assert [clip for batch in batches for clip in batch.clips][:7] == later
    assert batches[0].bad == ((data.clips[spoilt].name, "missing_video"),)
    assert sum(len(batch.bad) for batch in batches) >= order.count(spoilt)


def test_replacements_do_not_depend_on_where_a_run_started(data):
    for clip in data.clips[:2]:
        cut(video_path(data.folder, clip.name))
    whole = take(data, 8)
    assert any(batch.bad for batch in whole[5:])
    assert all(same(*pair) for pair in zip(take(data, 3, start_batch=5), whole[5:], strict=True))


def test_a_bad_clip_is_logged_once(data, caplog):
    video_path(data.folder, data.clips[0].name).unlink()
    with caplog.at_level(logging.WARNING):
        batches = take(data, 12)
    assert sum(len(batch.bad) for batch in batches) > 1
    assert len(caplog.records) == 1 and data.clips[0].name in caplog.text


def test_more_than_half_of_the_clips_bad_is_the_end(data):
    for clip in data.clips[:3]:
        video_path(data.folder, clip.name).unlink()
    with pytest.raises(BadData, match="3 of the 5 clips are bad"):
        take(data, 100)


def test_clips_that_are_too_short_are_bad_clips(drawn):
    batches = take(drawn, 10, sampling=Sampling(10, "run"))
    assert {pair for batch in batches for pair in batch.bad} == {(drawn.clips[1].name, "too_few_frames")}


def test_neither_torch_nor_ray_is_loaded():
    code = "import training.clips, sys; sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
