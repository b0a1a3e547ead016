import pytest
from pydantic import ValidationError

from serving.settings import Settings


def test_values_from_the_command_line_arrive_as_text():
    settings = Settings.model_validate({"num_threads": "2", "max_fps": "12.5", "weights": "tiny"})
    assert (settings.num_threads, settings.max_fps) == (2, 12.5)


def test_the_environment_sets_what_the_command_line_does_not(monkeypatch):
    monkeypatch.setenv("PERSONALIVE_NUM_THREADS", "3")
    monkeypatch.setenv("PERSONALIVE_MAX_SESSIONS", "5")
    settings = Settings.model_validate({"max_sessions": "7"})
    assert (settings.num_threads, settings.max_sessions) == (3, 7)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_thread": "1"}, "unknown setting num_thread; known are device"),
        ({"num_threads": "many"}, "num_threads"),
        ({"max_chunks_in_flight": "0"}, "max_chunks_in_flight"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_unknown_keys_and_impossible_values_are_refused_by_name(values, says):
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate(values)


def test_a_weights_folder_is_made_absolute_and_the_bundled_name_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings(weights="tiny").weights_path == "tiny"
    assert Settings(weights="mine").weights_path == str(tmp_path / "mine")
