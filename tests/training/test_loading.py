"""What a decoding task does, and how its cost is reported; the loop itself is tested with Ray in tests/system."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from training.clips import BadClip, Sampling, load, picks
from training.draw import Plan, draw_clip
from training.layout import Manifest, video_path
from training.loading import Bench, Cost, attempts_of, decode_block, main, measure_plain, picks_per_block, table_of

SIZE = 48
SAMPLING = Sampling(3, "spread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three people, the last of which has lost its video."""
    folder = tmp_path_factory.mktemp("data")
    clips = tuple(draw_clip(Plan(folder, "poses", seed, length, SIZE)) for seed, length in enumerate((7, 9, 5)))
    video_path(folder, clips[2].name).unlink()
    return Manifest(folder, SIZE, 25.0, clips)


def rows_of(manifest, chosen):
    clips = [manifest.clips[pick.clip] for pick in chosen]
    return {
        "clip": np.array([pick.clip for pick in chosen]),
        "name": np.array([clip.name for clip in clips]),
        "num_frames": np.array([clip.num_frames for clip in clips]),
        "frames": np.array([pick.frames for pick in chosen]),
    }


def test_a_task_decodes_as_the_plain_loop_does_and_says_what_is_bad(data):
    chosen = list(islice(picks(data, SAMPLING, 2, 0, 1), 6))
    decoded = list(attempts_of(decode_block(rows_of(data, chosen), str(data.folder), SIZE)))
    assert len(decoded) == 6
    for pick, result in zip(chosen, decoded, strict=True):
        if pick.clip == 2:
            clip, error = result
            assert clip == 2 and isinstance(error, BadClip) and error.code == "missing_video"
            assert data.clips[2].name in str(error)
        else:
            expected = load(data, pick)
            assert result.clip == pick.clip
            for name in ("pixels", "boxes", "motions", "canonical"):
                found = getattr(result, name)
                assert found.dtype == getattr(expected, name).dtype and np.array_equal(found, getattr(expected, name))


def test_a_task_whose_picks_are_all_bad_gives_a_block_nevertheless(data):
    chosen = [pick for pick in islice(picks(data, SAMPLING, 2, 0, 1), 6) if pick.clip == 2]
    block = decode_block(rows_of(data, chosen), str(data.folder), SIZE)
    assert block["pixels"].shape == (2, 4, SIZE, SIZE, 3) and not block["pixels"].any()
    assert all(isinstance(error, BadClip) for _, error in attempts_of(block))


def test_tasks_take_many_small_samples_or_one_large_one():
    assert picks_per_block(256, 41) == 6
    assert picks_per_block(512, 41) == 1
    assert picks_per_block(1024, 100) == 1
    assert picks_per_block(64, 2) == 64


def test_the_plain_loop_is_measured(data):
    cost = measure_plain(Bench(data, SAMPLING, 2, num_warm_frames=8, num_frames=40))
    assert cost.frames_per_s > 0 and cost.cpu_ms_per_frame > 0


def test_ratios_are_taken_round_by_round():
    costs = {
        "plain": [Cost(100, 1.0), Cost(50, 2.0), Cost(80, 1.1)],
        "one_rank": [Cost(90, 1.2), Cost(40, 2.4), Cost(70, 3.3)],
        "two_ranks": [Cost(90, 1.5), Cost(40, 2.4), Cost(70, 3.3)],
    }
    table = table_of(costs)
    assert table["one_rank"]["over_plain"] == pytest.approx(1.2)
    assert table["two_ranks"]["over_one_rank"] == pytest.approx(1.0)
    assert table["plain"]["frames_per_s"] == 80


def test_the_command_names_what_is_wrong_with_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loading", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "manifest.json is missing" in capsys.readouterr().err


def test_tasks_do_not_load_torch():
    code = "import training.loading, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
