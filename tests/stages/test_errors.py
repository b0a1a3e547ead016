import pickle

import pytest

from stages.errors import BadConfig, BadPortrait, BadVideo, BadWeights, UserError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UserError, "user_error"),
        (BadPortrait, "bad_portrait"),
        (BadVideo, "bad_video"),
        (BadWeights, "bad_weights"),
        (BadConfig, "bad_config"),
    ],
)
def test_every_error_is_a_user_error_with_its_stable_code(kind, code):
    error = kind("take another one")
    assert isinstance(error, UserError)
    assert (error.code, str(error)) == (code, "take another one")


def test_a_finer_code_replaces_the_kinds_own():
    assert BadPortrait("no face", "no_face_in_portrait").code == "no_face_in_portrait"
    assert BadPortrait("no face").code == "bad_portrait"


@pytest.mark.parametrize("error", [BadVideo("cut off"), BadPortrait("no face", "no_face_in_portrait")])
def test_errors_cross_process_borders_whole(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.code) == (str(error), error.code)
