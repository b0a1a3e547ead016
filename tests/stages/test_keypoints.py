"""Head pose, retargeting, drawing and boxes, on numbers small enough to follow."""

import numpy as np
import pytest
import torch

from stages.config import KeypointConfig
from stages.keypoints import (
    box_is_usable,
    boxes,
    draw,
    frame_pose,
    interpolate,
    interpolate_start,
    pose_from_raw,
    posed_keypoints,
    retarget,
    rotation,
    transform,
)
from stages.messages import Pose
from stages.networks.keypoint_extractor import RawPose, degrees_from_logits

CONFIG = KeypointConfig(
    num_keypoints=4,
    drawn=(0, 2, 3),
    colours=((255, 0, 0), (0, 255, 0), (51, 0, 255)),
    radius_px=1,
    translation_scale=0.25,
)


def pose(num_frames: int, seed: int) -> Pose:
    random = np.random.default_rng(seed)
    shapes = ((num_frames, 4, 3), (num_frames, 3), (num_frames, 3), (num_frames, 1))
    return Pose(*(random.normal(size=shape).astype(np.float32) for shape in shapes))


def at_pixels(*points: tuple[float, float], size_px: int) -> torch.Tensor:
    """Keypoints whose drawn ones lie at these pixel positions."""
    keypoints = torch.full((1, 4, 3), 9.0)
    for index, (x, y) in zip(CONFIG.drawn, points, strict=True):
        keypoints[0, index, :2] = torch.tensor([x, y]) / size_px * 2 - 1
    return keypoints


def test_degrees_are_three_per_bin_from_minus_97_and_a_half():
    logits = torch.full((2, 66), -1000.0)
    logits[0, 0] = 0
    logits[1, 33] = 0
    assert degrees_from_logits(logits).tolist() == [-97.5, 1.5]


@pytest.mark.parametrize(
    ("degrees", "point", "expected"),
    [
        ((90.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        ((0.0, 90.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
        ((0.0, 0.0, 90.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        # Pitch acts first, then yaw, then roll: y goes to z, z to x, x to y.
        ((90.0, 90.0, 90.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
    ],
)
def test_rotation_is_right_handed_about_x_then_y_then_z(degrees, point, expected):
    turned = torch.tensor([point]) @ rotation(torch.tensor([degrees]))[0]
    torch.testing.assert_close(turned[0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_transform_scales_then_moves_in_x_and_y_only():
    canonical = torch.tensor([[[1.0, 2.0, 3.0]]])
    moved = transform(canonical, torch.zeros(1, 3), torch.tensor([[10.0, 20.0, 30.0]]), torch.tensor([[2.0]]))
    assert moved.tolist() == [[[12.0, 24.0, 6.0]]]


def test_raw_output_is_interpreted_per_frame():
    torch.manual_seed(0)
    logits = [torch.randn(2, 9) for _ in range(3)]
    raw = RawPose(torch.arange(24.0).reshape(2, 12), *logits, torch.randn(2, 3), torch.rand(2, 1))
    found = pose_from_raw(raw)
    assert found.canonical[1, 1].tolist() == [15.0, 16.0, 17.0]
    for index, part in enumerate(logits):
        assert np.array_equal(found.degrees[:, index], degrees_from_logits(part).numpy())
    second = frame_pose(found, 1)
    torch.testing.assert_close(posed_keypoints(second), posed_keypoints(found)[1:])


def test_retargeting_keeps_the_portraits_shape_and_takes_the_drivers_turn():
    portrait, driving = pose(1, 0), pose(3, 1)
    target = retarget(driving, frame_pose(driving, 0), portrait, CONFIG)
    assert np.array_equal(target.degrees, driving.degrees)
    assert np.array_equal(target.canonical, np.repeat(portrait.canonical, 3, axis=0))
    assert np.array_equal(target.scale, np.repeat(portrait.scale, 3, axis=0))
    np.testing.assert_allclose(target.translation[0], portrait.translation[0])
    moved = (driving.translation[2] - driving.translation[0]) * 0.25
    np.testing.assert_allclose(target.translation[2], portrait.translation[0] + moved, rtol=1e-6)


def test_a_face_that_drives_itself_stays_itself():
    portrait = pose(1, 0)
    torch.testing.assert_close(
        posed_keypoints(retarget(portrait, portrait, portrait, CONFIG)), posed_keypoints(portrait)
    )


def test_interpolation_starts_at_the_start_and_stops_one_step_before_the_end():
    steps = interpolate(np.float32([[0.0, 10.0]]), np.float32([[1.0, 20.0]]), 4)
    assert steps.dtype == np.float32
    assert steps.tolist() == [[0.0, 10.0], [0.25, 12.5], [0.5, 15.0], [0.75, 17.5]]


def test_transition_interpolates_angles_and_not_keypoints():
    portrait, first = pose(1, 0), pose(1, 1)
    start = interpolate_start(portrait, first, 6)
    torch.testing.assert_close(posed_keypoints(start)[:1], posed_keypoints(portrait))
    np.testing.assert_allclose(start.degrees[3], (portrait.degrees[0] + first.degrees[0]) / 2, rtol=1e-5)
    assert np.array_equal(start.canonical, np.repeat(portrait.canonical, 6, axis=0))


def test_a_point_is_drawn_as_a_disc_in_its_colour():
    canvas = draw(at_pixels((2, 3), (20, 20), (30, 30), size_px=32), 32, CONFIG)[0]
    red = torch.zeros(32, 32)
    for x, y in ((2, 3), (1, 3), (3, 3), (2, 2), (2, 4)):
        red[y, x] = 1
    assert torch.equal(canvas[0] == 1, red.bool())
    assert canvas[1, 20, 20] == 1
    assert canvas[:, 30, 30].tolist() == pytest.approx([0.2, 0, 1])
    assert canvas.is_contiguous()


def test_overlapping_discs_add_up_to_at_most_one():
    canvas = draw(at_pixels((8, 8), (8, 8), (8, 8), size_px=16), 16, CONFIG)[0]
    assert canvas[:, 8, 8].tolist() == [1, 1, 1]


def test_points_off_the_canvas_draw_only_what_falls_inside():
    canvas = draw(at_pixels((-1, 5), (1e9, -1e9), (float("nan"), 3), size_px=16), 16, CONFIG)[0]
    assert canvas[0].nonzero().tolist() == [[5, 0]]
    assert canvas[1:].sum() == 0


def test_positions_are_truncated_toward_zero():
    canvas = draw(at_pixels((-0.7, 4.9), (8, 8), (8, 8), size_px=16), 16, CONFIG)[0]
    assert canvas[0, 4, 0] == 1


def test_canvas_agrees_with_a_pixel_by_pixel_drawing():
    config = KeypointConfig()
    torch.manual_seed(0)
    keypoints = torch.randn(3, config.num_keypoints, 3) * 0.6
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    expected = torch.zeros(3, 3, 40, 40)
    for frame in range(3):
        for index, colour in zip(config.drawn, config.colours, strict=True):
            x, y = ((keypoints[frame, index, :2] * 0.5 + 0.5) * 40).long()
            near = (columns - x) ** 2 + (rows - y) ** 2 <= config.radius_px**2
            expected[frame] += near * torch.tensor(colour)[:, None, None] / 255
    torch.testing.assert_close(draw(keypoints, 40, config), expected.clamp(0, 1))


def test_box_surrounds_the_centre_a_little_further_right_and_down():
    # Centre (50, 48), highest point 39: the side is 9 · 2 · 1.7 = 30.6.
    box = boxes(at_pixels((50, 39), (40, 50), (60, 55), size_px=100), 100, CONFIG)
    assert box.dtype == torch.int64
    assert box.tolist() == [[35, 33, 66, 64]]
    assert box_is_usable(box[0])


@pytest.mark.parametrize(
    "points",
    [
        [(50, 50), (50, 50), (50, 50)],
        [(-500, 40), (-500, 50), (-500, 60)],
        [(900, 40), (900, 50), (900, 60)],
        [(float("nan"), float("nan"))] * 3,
    ],
)
def test_a_degenerate_or_absent_face_has_no_usable_box(points):
    assert not box_is_usable(boxes(at_pixels(*points, size_px=100), 100, CONFIG)[0])
