import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from cluster.errors import MemberLost, StageFailed
from cluster.unwrap import to_user_error
from stages.errors import BadPortrait


def wrapped(error: BaseException, times: int) -> BaseException:
    for _ in range(times):
        error = RayTaskError("task", "Traceback ...", error)
    return error


@pytest.mark.parametrize("times", [0, 1, 3])
def test_our_own_errors_come_out_as_they_were_raised(times: int) -> None:
    error = to_user_error(wrapped(BadPortrait("no face", "no_face_in_portrait"), times))
    assert (type(error), str(error), error.code) == (BadPortrait, "no face", "no_face_in_portrait")


@pytest.mark.parametrize(
    "lost", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16), ObjectLostError("00" * 28, None, "")]
)
@pytest.mark.parametrize("times", [0, 2])
def test_deaths_under_any_number_of_tasks_are_a_lost_member(lost: Exception, times: int) -> None:
    assert isinstance(to_user_error(wrapped(lost, times)), MemberLost)


def test_anything_else_names_what_a_stage_raised() -> None:
    error = to_user_error(wrapped(ZeroDivisionError("by zero"), 2))
    assert isinstance(error, StageFailed)
    assert "ZeroDivisionError: by zero" in str(error)
