"""The motion stage on drawn pictures: the small extractor finds a face in every picture that is not black."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.errors import BadPortrait
from stages.images import detector_frames, detector_portrait, face_crop, portrait_tensor, signed
from stages.keypoints import boxes, frame_pose, pose_from_raw, posed_keypoints, retarget
from stages.messages import MotionState, Pose
from stages.motion import MotionStage, follow


@pytest.fixture
def motion(stages) -> MotionStage:
    return stages.motion


@pytest.fixture
def state(motion, draw_picture) -> MotionState:
    return motion.open(draw_picture(1))


def black(chunk: np.ndarray) -> np.ndarray:
    return np.zeros_like(chunk)


def random_pose(seed: int, num_frames: int = 1) -> Pose:
    random = np.random.default_rng(seed)
    shapes = ((num_frames, 9, 3), (num_frames, 3), (num_frames, 3), (num_frames, 1))
    return Pose(*(random.normal(size=shape).astype(np.float32) for shape in shapes))


def random_tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, 6)).astype(np.float32)


def random_state(**changes) -> MotionState:
    return replace(MotionState(random_pose(0), random_tokens(0)), **changes)


def assert_same_chunks(first, second, atol=0.0) -> None:
    np.testing.assert_allclose(first.tokens, second.tokens, rtol=0, atol=atol)
    np.testing.assert_allclose(first.keypoints, second.keypoints, rtol=0, atol=atol)
    assert first.no_face == second.no_face


def leaves(value) -> list[np.ndarray]:
    """All arrays of a state, or of a list."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [leaf for part in getattr(value, "__dict__", {}).values() for leaf in leaves(part)]


def test_opening_finds_the_portraits_pose_and_the_tokens_of_its_face(motion, config, draw_picture):
    portrait = draw_picture(1, 70)
    state = motion.open(portrait)
    expected = pose_from_raw(motion.keypoint_extractor(detector_portrait(portrait, 32)))
    assert np.array_equal(state.portrait.canonical, expected.canonical)
    box = boxes(posed_keypoints(expected), 48, config.keypoints)[0]
    tokens = motion.motion_encoder(face_crop(portrait_tensor(portrait, 48)[0], box, 24))[0]
    np.testing.assert_allclose(state.portrait_tokens, tokens.numpy(), rtol=0, atol=1e-6)
    assert (state.started, state.first, state.held, state.last_tokens) == (False, None, None, None)


def test_a_portrait_without_a_face_is_refused(motion, draw_picture):
    with pytest.raises(BadPortrait, match="no face") as error:
        motion.open(black(draw_picture(1)))
    assert error.value.code == "no_face_in_portrait"


def test_the_first_chunk_alone_carries_the_transition(motion, state, draw_chunks, config):
    lengths = []
    for frames in draw_chunks(0, 3):
        [(state, chunk)] = motion.run([state], [frames])
        assert len(chunk.tokens) == len(chunk.keypoints)
        assert chunk.no_face == (False, False)
        lengths.append(len(chunk.tokens))
    assert lengths == [config.window.num_frames, 2, 2]
    assert chunk.tokens.shape == (2, 5, 6) and chunk.keypoints.shape == (2, 9, 3)
    assert chunk.tokens.dtype == chunk.keypoints.dtype == np.float32


def test_the_transition_leads_from_the_portrait_to_the_first_frame(motion, state, draw_chunks):
    [(after, chunk)] = motion.run([state], [draw_chunks(0, 1)[0]])
    np.testing.assert_allclose(chunk.tokens[0], state.portrait_tokens, rtol=0, atol=1e-6)
    np.testing.assert_allclose(chunk.keypoints[0], posed_keypoints(state.portrait)[0].numpy(), rtol=0, atol=1e-6)
    step = (chunk.tokens[4] - chunk.tokens[0]) / 4
    for number in range(4):
        np.testing.assert_allclose(chunk.tokens[number + 1] - chunk.tokens[number], step, rtol=0, atol=1e-6)
    middle = replace(state.portrait, degrees=(state.portrait.degrees + after.first.degrees) / 2)
    np.testing.assert_allclose(chunk.keypoints[2], posed_keypoints(middle)[0].numpy(), rtol=0, atol=1e-5)


def test_without_an_interpolated_start_all_but_the_first_frame_has_the_drivers_motion(motion, state, draw_chunks):
    window = replace(motion.config.window, interpolated_start=False)
    sudden = replace(motion, config=replace(motion.config, window=window))
    frames = draw_chunks(0, 1)[0]
    [(_, chunk)], [(_, usual)] = sudden.run([state], [frames]), motion.run([state], [frames])
    num_leading = window.num_transition_frames
    for ours, theirs in ((chunk.tokens, usual.tokens), (chunk.keypoints, usual.keypoints)):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[num_leading:], theirs[num_leading:])
        assert np.array_equal(ours[1:num_leading], np.repeat(theirs[num_leading, None], num_leading - 1, 0))


def test_every_frame_is_cropped_by_its_own_box_and_retargeted(motion, state, config, draw_chunks):
    first, second = draw_chunks(0, 2)
    [(state, _)] = motion.run([state], [first])
    [(_, chunk)] = motion.run([state], [second])
    poses = pose_from_raw(motion.keypoint_extractor(detector_frames(signed(second), 32)))
    for frame in range(2):
        pose = frame_pose(poses, frame)
        box = boxes(posed_keypoints(pose), 48, config.keypoints)[0]
        tokens = motion.motion_encoder(face_crop(signed(second)[frame], box, 24))[0]
        np.testing.assert_allclose(chunk.tokens[frame], tokens.numpy(), rtol=0, atol=1e-5)
        target = retarget(pose, state.first, state.portrait, config.keypoints)
        np.testing.assert_allclose(chunk.keypoints[frame], posed_keypoints(target)[0].numpy(), rtol=0, atol=1e-5)


def test_a_frame_without_a_face_holds_the_last_motion(motion, state, draw_chunks):
    first, second = draw_chunks(0, 2)
    [(state, before)] = motion.run([state], [first])
    mixed = np.stack([second[0] * 0, second[1]])
    [(after, chunk)] = motion.run([state], [mixed])
    assert chunk.no_face == (True, False)
    assert np.array_equal(chunk.tokens[0], before.tokens[-1])
    assert np.array_equal(chunk.keypoints[0], before.keypoints[-1])
    [(_, whole)] = motion.run([state], [second])
    np.testing.assert_allclose(chunk.tokens[1], whole.tokens[1], rtol=0, atol=1e-5)
    [(_, later)] = motion.run([after], [black(second)])
    assert later.no_face == (True, True)
    for frame in range(2):
        assert np.array_equal(later.tokens[frame], chunk.tokens[1])
        assert np.array_equal(later.keypoints[frame], chunk.keypoints[1])


def test_until_there_is_a_face_the_portrait_stays_as_it_is(motion, state, draw_chunks):
    first, second = draw_chunks(0, 2)
    [(still, chunk)] = motion.run([state], [black(first)])
    assert chunk.no_face == (True, True)
    assert len(chunk.tokens) == 6 and still.started and still.first is None
    own = posed_keypoints(state.portrait)[0].numpy()
    for frame in range(6):
        np.testing.assert_allclose(chunk.tokens[frame], state.portrait_tokens, rtol=0, atol=1e-6)
        np.testing.assert_allclose(chunk.keypoints[frame], own, rtol=0, atol=1e-6)
    [(moving, chunk)] = motion.run([still], [second])
    assert len(chunk.tokens) == 2 and chunk.no_face == (False, False)
    assert np.abs(chunk.tokens[0] - state.portrait_tokens).max() > 1e-3
    # Translations count from the first frame that has a face, so that frame stays where the portrait is.
    turned = replace(state.portrait, degrees=moving.first.degrees)
    np.testing.assert_allclose(chunk.keypoints[0], posed_keypoints(turned)[0].numpy(), rtol=0, atol=1e-6)


def test_two_sessions_in_one_call_equal_two_single_calls(motion, draw_picture, draw_chunks):
    """One is at its first chunk, the other is not and has a frame without a face; their chunks differ in length."""
    young, old = (motion.open(draw_picture(seed)) for seed in (1, 2))
    [(old, _)] = motion.run([old], [draw_chunks(5, 1)[0]])
    longer = np.concatenate(draw_chunks(6, 2))[:3]
    longer[1] = 0
    frames = [draw_chunks(4, 1)[0], longer]
    together = motion.run([young, old], frames)
    for state, chunk, (after, found) in zip((young, old), frames, together, strict=True):
        [(after_alone, alone)] = motion.run([state], [chunk])
        assert_same_chunks(found, alone, atol=1e-5)
        for ours, theirs in zip(leaves(after), leaves(after_alone), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert together[1][1].no_face == (False, True, False)


def test_nothing_of_a_session_stays_in_the_stage(motion, state, draw_chunks):
    first, second = draw_chunks(0, 2)
    [(_, before)] = motion.run([state], [first])
    motion.run([state], [second])
    [(_, again)] = motion.run([state], [first])
    assert_same_chunks(before, again)


def test_following_is_a_pure_function(config):
    state = random_state(started=True, first=random_pose(1), last_tokens=random_tokens(1), held=random_pose(2))
    poses, tokens = [random_pose(3), random_pose(4)], [random_tokens(3), None]
    inputs = (state, poses, tokens)
    kept = copy.deepcopy(inputs)
    first, second = follow(config, *inputs), follow(config, *inputs)
    assert_same_chunks(first[1], second[1])
    for ours, theirs in zip(leaves(first[0]), leaves(second[0]), strict=True):
        assert np.array_equal(ours, theirs)
    before, now = ([array for part in parts for array in leaves(part)] for parts in (kept, inputs))
    assert len(now) == 14 + 8 + 1
    assert all(np.array_equal(*pair) for pair in zip(before, now, strict=True))


def test_the_first_face_is_remembered_for_good(config):
    state, _ = follow(config, random_state(), [random_pose(1), random_pose(2)], [None, random_tokens(2)])
    assert np.array_equal(state.first.translation, random_pose(2).translation)
    later, _ = follow(config, state, [random_pose(3)], [random_tokens(3)])
    assert np.array_equal(later.first.translation, random_pose(2).translation)
    assert np.array_equal(later.last_tokens, random_tokens(3))


def test_a_pose_whose_box_is_unusable_does_not_move_the_portrait(config):
    state, _ = follow(config, random_state(), [random_pose(1)], [random_tokens(1)])
    after, chunk = follow(config, state, [random_pose(8), random_pose(9)], [None, None])
    target = retarget(random_pose(1), random_pose(1), state.portrait, config.keypoints)
    assert np.array_equal(chunk.keypoints, np.repeat(posed_keypoints(target).numpy(), 2, axis=0))
    assert np.array_equal(after.held.degrees, random_pose(1).degrees)


def test_chunks_of_any_length_are_followed(config):
    _, chunk = follow(config, random_state(started=True), [random_pose(n) for n in range(3)], [random_tokens(1)] * 3)
    assert chunk.tokens.shape == (3, 5, 6) and chunk.no_face == (False,) * 3


def test_the_transition_starts_exactly_at_the_portraits_own_pose(motion, state, draw_chunks):
    """The denoise stage takes the first keypoints of a session for the portrait's."""
    own = posed_keypoints(state.portrait).numpy()[0]
    for frames in (draw_chunks(4, 1)[0], black(draw_chunks(4, 1)[0])):
        [(_, chunk)] = motion.run([state], [frames])
        assert np.array_equal(chunk.keypoints[0], own)


def test_where_the_model_has_a_mover_the_motion_stage_moves_the_portrait(moving_stages, draw_picture, draw_chunks):
    motion, state = moving_stages.motion, moving_stages.motion.open(draw_picture(1))
    chunks, states = [], []
    for frames in draw_chunks(2, 2):
        [(state, chunk)] = motion.run([state], [frames])
        chunks.append(chunk)
        states.append(state)
    first, second = chunks
    for name in ("depths", "fields", "light", "apart"):
        assert getattr(states[0], name) is getattr(states[1], name), "a portrait is looked at once"
        doubled = replace(states[0], **{name: 2 * np.abs(getattr(states[0], name))})
        [(_, other)] = motion.run([doubled], [draw_chunks(2, 2)[1]])
        assert np.abs(other.moved - second.moved).max() > 1e-3
    assert [len(chunk.moved) for chunk in chunks] == [len(chunk.keypoints) for chunk in chunks]
    np.testing.assert_array_equal(state.own_keypoints, first.keypoints[0])
    seen = moving_stages.denoise.open(moving_stages.reference.open(draw_picture(1)), state.portrait_tokens, 0)
    both = (first, replace(first, moved=None))
    poses = [moving_stages.denoise.run([seen], [chunk])[0][0].pose for chunk in both]
    torch.testing.assert_close(*poses, rtol=0, atol=1e-5)
    assert np.abs(second.moved[0].astype(np.float32) - second.moved[-1]).max() > 1e-3


def test_other_models_leave_the_portrait_to_the_denoise_stage(showing_stages, draw_picture, draw_chunks):
    state = showing_stages.motion.open(draw_picture(1))
    [(state, chunk)] = showing_stages.motion.run([state], [draw_chunks(2, 1)[0]])
    kept = ("picture", "own_keypoints", "depths", "fields", "light", "apart")
    assert {getattr(state, name) for name in kept} == {None} and chunk.moved is None
