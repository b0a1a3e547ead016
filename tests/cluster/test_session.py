"""What a session makes of an interruption; its life on real actors is in tests/system/test_cluster.py."""

import pytest

from cluster.messages import Life, Route
from cluster.session import PARTS, Interruption, interruption_ms

DEAD = Life("dead", 1, "node", created_s=10.0)


def route(name: str, life: Life) -> Route:
    return Route(None, None, None, None, 0, {"motion": "m-0", "denoise": name}, {"motion": DEAD, "denoise": life})


def parts(name: str, life: Life) -> list[float]:
    interruption = Interruption(detected_s=100.0, route=route("d-0", DEAD), restored_s=107.0)
    parts_ms = interruption_ms(interruption, route(name, life), now_s=107.5)
    assert list(parts_ms) == list(PARTS)
    return [pytest.approx(ms / 1e3) for ms in parts_ms.values()]


def test_a_restart_is_made_of_process_imports_weights_restore_and_first_frame() -> None:
    assert parts("d-0", Life("new", 2, "node", 101.0, imports_ms=4000, weights_ms=1500)) == [1.0, 4.0, 1.5, 0.5, 0.5]


def test_what_has_happened_before_the_death_was_noticed_takes_no_time() -> None:
    assert parts("d-0", Life("new", 2, "node", 99.0, imports_ms=4000, weights_ms=1500)) == [0, 3.0, 1.5, 2.5, 0.5]


def test_a_stand_in_needs_nothing_but_the_session() -> None:
    assert parts("spare-0", Life("spare", 3, "node", 20.0, imports_ms=4000, weights_ms=100)) == [0, 0, 0, 7.0, 0.5]


def test_a_member_that_lives_on_needs_nothing_but_the_session() -> None:
    assert parts("d-0", DEAD) == [0, 0, 0, 7.0, 0.5]
