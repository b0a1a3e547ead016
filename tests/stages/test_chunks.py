import pytest

from stages.chunks import flush_indices, num_flush_history, num_real_frames, source_chunk


def test_a_full_last_chunk_is_followed_by_one_chunk_per_further_level_in_mirror_order():
    assert flush_indices(num_frames=9, chunk_frames=3, num_levels=3) == [7, 6, 5, 4, 3, 2]


def test_a_partial_last_chunk_is_completed_first():
    assert flush_indices(num_frames=11, chunk_frames=3, num_levels=2) == [9, 8, 7, 6]


def test_a_video_too_short_to_mirror_repeats_its_last_frame():
    assert flush_indices(num_frames=2, chunk_frames=3, num_levels=3) == [1] * 7
    assert flush_indices(num_frames=1, chunk_frames=1, num_levels=2) == [0]


@pytest.mark.parametrize(("chunk_frames", "num_levels"), [(1, 2), (3, 2), (2, 5), (4, 4)])
def test_every_real_frame_gets_exactly_one_output_and_padding_gets_none(chunk_frames, num_levels):
    for num_frames in range(1, 60):
        total = num_frames + len(flush_indices(num_frames, chunk_frames, num_levels))
        assert total % chunk_frames == 0
        shown = []
        for result in range(total // chunk_frames):
            chunk = source_chunk(result, num_levels)
            if chunk is not None:
                first = chunk * chunk_frames
                shown += range(first, first + num_real_frames(chunk, num_frames, chunk_frames))
        assert shown == list(range(num_frames))


@pytest.mark.parametrize(("chunk_frames", "num_levels"), [(1, 2), (3, 2), (2, 5)])
def test_the_kept_history_reaches_back_to_every_mirrored_frame(chunk_frames, num_levels):
    for num_frames in range(1, 60):
        oldest = num_frames - num_flush_history(chunk_frames, num_levels)
        assert min(flush_indices(num_frames, chunk_frames, num_levels)) >= oldest


def test_the_first_results_are_the_transition():
    assert [source_chunk(result, num_levels=3) for result in range(4)] == [None, None, 0, 1]


def test_a_stream_without_frames_cannot_be_flushed():
    with pytest.raises(ValueError, match="no end"):
        flush_indices(0, 3, 2)
