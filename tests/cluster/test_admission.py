import pytest

from cluster.admission import EXPECTED_STAY_S, FORGET_S, Line, num_places, round_ms

SLOW = {"motion": {1: 20.0}, "reference": {1: 900.0}, "denoise": {1: 100.0, 2: 180.0, 4: 340.0}, "decode": {1: 50.0}}


def places(*members: dict[str, dict[int, float]], target_fps: float = 8.0) -> int:
    return num_places(members, target_fps, chunk_frames=4, max_batch=4, max_sessions=16)


def test_a_round_is_made_of_as_large_calls_as_may_be() -> None:
    assert [round_ms(SLOW["denoise"], num, 4) for num in (1, 2, 3, 4, 7)] == [100, 180, 280, 340, 620]
    assert round_ms({1: 50.0}, 3, 4) == 150
    assert round_ms({2: 90.0}, 1, 4) == 45


def test_places_are_the_sessions_whose_round_fits_into_a_chunk_at_the_target_rate() -> None:
    # 450 ms of the 500 that a chunk lasts at 8 frames a second: five sessions need 440, six 520.
    assert places(SLOW) == 5
    assert places(SLOW, target_fps=16.0) == 2
    assert places(SLOW, target_fps=1.0) == 16


def test_one_person_is_always_served() -> None:
    assert places(SLOW, target_fps=100.0) == 1
    assert places() == 1


def test_a_stage_has_the_places_of_all_its_members_and_the_scarcest_decides() -> None:
    denoise, rest = {"denoise": SLOW["denoise"]}, {"motion": SLOW["motion"], "decode": SLOW["decode"]}
    assert places(denoise, rest) == 5
    assert places(denoise, denoise, rest) == 9
    assert places(denoise, denoise, denoise, rest) == 9


def test_the_line_keeps_the_order_of_arrival_and_forgets_who_stops_asking() -> None:
    line = Line().ask("anna", since_s=10.0, now_s=0.0).ask("ben", since_s=5.0, now_s=1.0)
    assert (line.position("ben"), line.position("anna")) == (1, 2)
    line = line.ask("anna", since_s=99.0, now_s=2.0)
    assert line.position("anna") == 2
    line = line.ask("anna", since_s=99.0, now_s=FORGET_S + 1.5)
    assert line.position("anna") == 1 and set(line.since_s) == {"anna"}
    assert line.without("anna").since_s == {}


def test_the_estimate_follows_how_long_people_stay() -> None:
    line = Line().ask("anna", 0.0, 0.0).ask("ben", 1.0, 0.0)
    assert line.waiting("ben", places=4).estimate_s == pytest.approx(2 * EXPECTED_STAY_S / 4)
    for _ in range(50):
        line = line.stayed(20.0)
    assert line.waiting("ben", places=4).estimate_s == pytest.approx(10.0, rel=0.05)
