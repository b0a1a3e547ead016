"""The denoise stage with the small networks: windows in, windows, clean chunks and keyframes out."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from stages.canvas import ShownPortrait, canvases
from stages.keypoints import draw
from stages.messages import MotionChunk
from stages.networks.unet import attention_names, project_memory
from stages.pipeline import Stages
from stages.window import WindowState, transition_noise


@dataclass(frozen=True)
class Session:
    """An opened session and its first chunks of motion."""

    state: WindowState
    chunks: list[MotionChunk]


def start(stages: Stages, draw_picture, draw_chunks, seed: int, num_chunks: int = 4) -> Session:
    portrait = draw_picture(seed)
    motion_state = stages.motion.open(portrait)
    state = stages.denoise.open(stages.reference.open(portrait), motion_state.portrait_tokens, seed)
    chunks = []
    for frames in draw_chunks(seed, num_chunks):
        [(motion_state, chunk)] = stages.motion.run([motion_state], [frames])
        chunks.append(chunk)
    return Session(state, chunks)


@pytest.fixture
def session(stages, draw_picture, draw_chunks) -> Session:
    return start(stages, draw_picture, draw_chunks, 3)


def memory_lengths(state: WindowState) -> list[int]:
    assert all(layer.keys.shape == layer.values.shape for layer in state.memory)
    return [layer.keys.shape[1] for layer in state.memory]


# Tokens of one picture in every attention layer of the small model.
PICTURE = [36, 9, 4, 9, 9, 36, 36]


def test_opening_projects_the_portraits_features(stages, config, draw_picture):
    portrait = stages.reference.open(draw_picture(3))
    tokens = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    state = stages.denoise.open(portrait, tokens, seed=2**64 - 1)
    features = [torch.from_numpy(layer).float() for layer in portrait.features.layers]
    names, token = attention_names(config.unet), torch.from_numpy(portrait.token)
    expected = project_memory(stages.denoise.denoising_unet, names, features, token)
    for ours, theirs in zip(state.memory, expected, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
        torch.testing.assert_close(ours.constant, theirs.constant)
    assert memory_lengths(state) == PICTURE
    assert torch.equal(state.bank, torch.from_numpy(tokens).reshape(1, 30))
    assert torch.equal(state.portrait, torch.from_numpy(portrait.latent))
    assert (state.seed, state.num_calls) == (2**64 - 1, 0)


def test_every_call_gives_one_chunk_of_clean_latents(stages, session):
    state = session.state
    for number, chunk in enumerate(session.chunks):
        [(state, clean, keyframe)] = stages.denoise.run([state], [chunk])
        assert (clean.latents.shape, clean.latents.dtype) == ((2, 12, 6, 6), np.float32)
        assert np.isfinite(clean.latents).all()
        assert keyframe is None
        assert state.num_calls == number + 1
    assert memory_lengths(state) == PICTURE


def test_the_pose_is_drawn_where_it_is_read(stages, session, config):
    [(state, _, _)] = stages.denoise.run([session.state], [session.chunks[0]])
    canvases = draw(torch.from_numpy(session.chunks[0].keypoints), 48, config.keypoints)
    expected = stages.denoise.pose_guider(canvases)
    torch.testing.assert_close(state.pose, expected[2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["showing_stages", "moving_stages"])
def test_canvases_that_show_the_portrait_move_it_from_the_first_keypoints(request, draw_picture, draw_chunks, kind):
    stages = request.getfixturevalue(kind)
    session = start(stages, draw_picture, draw_chunks, 3, num_chunks=2)
    assert session.state.portrait_keypoints is None
    state = session.state
    for chunk in session.chunks:
        [(state, _, _)] = stages.denoise.run([state], [chunk])
        assert np.array_equal(state.portrait_keypoints, session.chunks[0].keypoints[0])
    picture = torch.from_numpy(draw_picture(3)).permute(2, 0, 1) / 255
    chunk, guider = session.chunks[1], stages.denoise.pose_guider
    own, keypoints, tokens = map(torch.from_numpy, (session.chunks[0].keypoints[0], chunk.keypoints, chunk.tokens))
    portrait = ShownPortrait(picture, own, torch.from_numpy(stages.motion.open(draw_picture(3)).portrait_tokens))
    with torch.inference_mode():
        expected = guider(canvases(keypoints, tokens, portrait, guider.mover, stages.config))
    torch.testing.assert_close(state.pose[2:], expected, rtol=0, atol=1e-5)


def test_only_the_portraits_pixels_tell_two_such_sessions_apart(showing_stages, draw_picture, draw_chunks):
    session = start(showing_stages, draw_picture, draw_chunks, 3, num_chunks=1)
    other = replace(session.state, picture=1 - session.state.picture)
    results = showing_stages.denoise.run([session.state, other], session.chunks * 2)
    assert np.abs(results[0][1].latents - results[1][1].latents).max() > 1e-4
    for state, (after, clean, _) in zip((session.state, other), results, strict=True):
        [(alone, clean_alone, _)] = showing_stages.denoise.run([state], session.chunks)
        np.testing.assert_allclose(clean.latents, clean_alone.latents, rtol=0, atol=1e-4)
        assert np.array_equal(after.portrait_keypoints, alone.portrait_keypoints)


def test_chunks_carry_the_moved_portrait_where_decoded_frames_get_detail_of_it(
    showing_stages, moving_stages, draw_picture, draw_chunks
):
    plain = start(showing_stages, draw_picture, draw_chunks, 3, num_chunks=1)
    assert showing_stages.denoise.run([plain.state], plain.chunks)[0][1].moved is None
    session = start(moving_stages, draw_picture, draw_chunks, 3, num_chunks=4)
    state, left = session.state, []
    for chunk in session.chunks:
        [(state, clean, _)] = moving_stages.denoise.run([state], [chunk])
        left.append(clean.moved)
    entered = np.concatenate([chunk.moved for chunk in session.chunks])
    assert np.array_equal(np.concatenate(left), entered[: len(left) * 2]) and entered[:8].std() > 0.01


@pytest.mark.parametrize("kind", ["showing_stages", "moving_stages"])
@pytest.mark.parametrize("num_calls", [0, 1, 3])
def test_a_restored_window_shows_the_same_portrait(request, draw_picture, draw_chunks, num_calls, kind):
    stages = request.getfixturevalue(kind)
    session = start(stages, draw_picture, draw_chunks, 3)
    state = session.state
    for chunk in session.chunks[:num_calls]:
        [(state, _, _)] = stages.denoise.run([state], [chunk])
    snapshot = pickle.loads(pickle.dumps(stages.denoise.snapshot(state)))
    assert (snapshot.portrait_keypoints is None) == (num_calls == 0)
    restored = stages.denoise.restore(stages.reference.open(draw_picture(3)), [], snapshot)
    results = [stages.denoise.run([window], [session.chunks[num_calls]])[0][1] for window in (state, restored)]
    np.testing.assert_allclose(results[0].latents, results[1].latents, rtol=0, atol=1e-5)
    if kind == "moving_stages":
        np.testing.assert_allclose(results[0].moved, results[1].moved, rtol=0, atol=1e-3)


def test_seed_tokens_and_keypoints_all_show_in_the_result(stages, session, draw_picture, draw_chunks):
    first = session.chunks[0]
    portrait = stages.reference.open(draw_picture(3))
    tokens = stages.motion.open(draw_picture(3)).portrait_tokens
    base = stages.denoise.run([session.state], [first])[0][1].latents
    reseeded = stages.denoise.open(portrait, tokens, seed=4)
    variants = [
        (reseeded, first),
        (session.state, MotionChunk(first.tokens + 1, first.keypoints, first.no_face)),
        (session.state, MotionChunk(first.tokens, first.keypoints + 0.5, first.no_face)),
    ]
    for state, chunk in variants:
        assert np.abs(stages.denoise.run([state], [chunk])[0][1].latents - base).max() > 1e-4
    again = stages.denoise.open(portrait, tokens, seed=3)
    np.testing.assert_allclose(stages.denoise.run([again], [first])[0][1].latents, base, rtol=0, atol=1e-5)


def test_two_sessions_in_one_call_equal_two_single_calls(keyframe_stages, draw_picture, draw_chunks):
    """One session is at its first call, the other has a keyframe in its memory."""
    stages = keyframe_stages
    young, old = (start(stages, draw_picture, draw_chunks, seed) for seed in (3, 4))
    [(state, _, _)] = stages.denoise.run([old.state], [old.chunks[0]])
    [(state, _, keyframe)] = stages.denoise.run([state], [old.chunks[1]])
    state = stages.denoise.add_keyframe(state, stages.reference.keyframe(keyframe))
    states, chunks = [young.state, state], [young.chunks[0], old.chunks[2]]
    together = stages.denoise.run(states, chunks)
    for before, chunk, (after, clean, _) in zip(states, chunks, together, strict=True):
        [(after_alone, clean_alone, _)] = stages.denoise.run([before], [chunk])
        np.testing.assert_allclose(clean.latents, clean_alone.latents, rtol=0, atol=1e-4)
        torch.testing.assert_close(after.latents, after_alone.latents, rtol=0, atol=1e-4)
        assert torch.equal(after.bank, after_alone.bank)


def test_keyframes_extend_the_memory_until_there_are_enough(keyframe_stages, draw_picture, draw_chunks):
    stages = keyframe_stages
    session = start(stages, draw_picture, draw_chunks, 3, num_chunks=6)
    state, lengths, found = session.state, [], []
    for chunk in session.chunks:
        [(state, clean, keyframe)] = stages.denoise.run([state], [chunk])
        found.append(keyframe is not None)
        if keyframe is not None:
            assert np.array_equal(keyframe.latent, clean.latents[0])
            assert np.array_equal(keyframe.token, stages.reference.open(draw_picture(3)).token)
            before = state
            state = stages.denoise.add_keyframe(state, stages.reference.keyframe(keyframe))
            assert memory_lengths(before) == [n - m for n, m in zip(memory_lengths(state), PICTURE, strict=True)]
        lengths.append(memory_lengths(state))
    # The first chunk to leave starts as the portrait itself, whose motion is in the bank from the beginning.
    assert found == [False, True, True, False, False, False]
    assert lengths[-1] == [3 * length for length in PICTURE]
    assert (state.num_keyframes, len(state.bank)) == (2, 6)


def test_a_keyframe_changes_the_next_call_and_not_the_window(keyframe_stages, draw_picture, draw_chunks):
    stages = keyframe_stages
    session = start(stages, draw_picture, draw_chunks, 3)
    [(state, _, _)] = stages.denoise.run([session.state], [session.chunks[0]])
    [(state, _, keyframe)] = stages.denoise.run([state], [session.chunks[1]])
    extended = stages.denoise.add_keyframe(state, stages.reference.keyframe(keyframe))
    assert torch.equal(extended.latents, state.latents)
    results = [stages.denoise.run([window], [session.chunks[2]])[0][1].latents for window in (state, extended)]
    assert np.abs(results[0] - results[1]).max() > 1e-4


def test_given_noise_replaces_the_seeds(stages, session, config, draw_picture):
    portrait = stages.reference.open(draw_picture(3))
    noise = transition_noise(config.window, 3, (12, 6, 6))
    tokens = stages.motion.open(draw_picture(3)).portrait_tokens
    state = stages.denoise.open(portrait, tokens, seed=8, noise=noise)
    torch.testing.assert_close(state.latents, session.state.latents)
    entering = torch.zeros(2, 12, 6, 6)
    steps = [stages.denoise.steps([window], session.chunks[:1], [entering])[0] for window in (state, session.state)]
    torch.testing.assert_close(steps[0].clean, steps[1].clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(steps[0].state.latents, steps[1].state.latents, rtol=0, atol=1e-5)
    assert steps[0].prediction.shape == (6, 12, 6, 6)


def test_the_stage_keeps_nothing_of_a_session(stages, session, draw_picture, draw_chunks):
    first = stages.denoise.run([session.state], session.chunks[:1])[0][1]
    other = start(stages, draw_picture, draw_chunks, 4, num_chunks=1)
    stages.denoise.run([other.state], other.chunks)
    again = stages.denoise.run([session.state], session.chunks[:1])[0][1]
    assert np.array_equal(first.latents, again.latents)


@pytest.mark.parametrize("num_calls", [0, 1, 2, 4])
def test_a_restored_window_goes_on_as_if_nothing_had_happened(keyframe_stages, draw_picture, draw_chunks, num_calls):
    stages = keyframe_stages
    session = start(stages, draw_picture, draw_chunks, 3, num_chunks=6)

    def go_on(state, chunks):
        latents = []
        for chunk in chunks:
            [(state, clean, keyframe)] = stages.denoise.run([state], [chunk])
            latents.append(clean.latents)
            if keyframe is not None:
                state = stages.denoise.add_keyframe(state, stages.reference.keyframe(keyframe))
        return state, latents

    state, _ = go_on(session.state, session.chunks[:num_calls])
    snapshot = stages.denoise.snapshot(state)
    assert len(snapshot.keyframes) == min(max(num_calls - 1, 0), 2)
    features = [stages.reference.keyframe(keyframe) for keyframe in snapshot.keyframes]
    restored = stages.denoise.restore(stages.reference.open(draw_picture(3)), features, snapshot)
    assert memory_lengths(restored) == memory_lengths(state)
    rest = session.chunks[num_calls:]
    for ours, theirs in zip(go_on(restored, rest)[1], go_on(state, rest)[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
