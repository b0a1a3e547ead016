"""Which driving frames fill the chunks at the end of a stream, and which outputs belong to which driving frames.

Pure arithmetic, shared by the offline tool and the server, so that both produce the same frames. No torch, no Ray.
Called by `stages.animate` and `serving.session`.
"""

from __future__ import annotations


def flush_indices(num_frames: int, chunk_frames: int, num_levels: int) -> list[int]:
    """Driving-frame indices to append after frame `num_frames - 1` so that every frame's output leaves the window.

    They complete the last partial chunk and add `num_levels - 1` chunks more. The video is mirrored at its end
    (n-2, n-3, ...); one that is too short for that repeats its last frame. spec/personalive.md section 11.
    """
    if num_frames < 1:
        raise ValueError(f"a stream of {num_frames} frames has no end to fill")
    num_missing = -num_frames % chunk_frames + (num_levels - 1) * chunk_frames
    last = num_frames - 1
    if num_missing > last:
        return [last] * num_missing
    return list(range(last - 1, last - 1 - num_missing, -1))


def num_flush_history(chunk_frames: int, num_levels: int) -> int:
    """How many of the latest driving frames a stream must keep so that every index of `flush_indices` is at hand."""
    return chunk_frames * num_levels


def source_chunk(result: int, num_levels: int) -> int | None:
    """The driving chunk (counted from 0) that the pipeline's result number `result` shows; None: the transition."""
    chunk = result - (num_levels - 1)
    return chunk if chunk >= 0 else None


def num_real_frames(chunk: int, num_frames: int, chunk_frames: int) -> int:
    """How many of the leading frames of driving chunk `chunk` are no padding, in a stream of `num_frames`: 0..f."""
    return max(0, min(chunk_frames, num_frames - chunk * chunk_frames))
