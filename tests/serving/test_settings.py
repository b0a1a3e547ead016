import pytest
from pydantic import ValidationError

from serving.protocol import Ready, pack, parse_server
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


def test_a_misspelt_variable_of_the_environment_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PERSONALIVE_NUM_THREAD", "3")
    with pytest.raises(ValidationError, match="unknown setting PERSONALIVE_NUM_THREAD; known are"):
        Settings()


@pytest.mark.parametrize("name", ["lease_s", "idle_timeout_s", "pause_timeout_s", "hello_timeout_s", "max_fps"])
@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e30"])
def test_times_and_rates_are_finite_and_sensible(name, value):
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: value})


def test_every_setting_that_is_accepted_can_be_told_to_a_client():
    settings = Settings(max_input_bytes_per_s=10**12, idle_timeout_s=86_400, max_fps=1000)
    ready = Ready("id", 64, 3, 4, 9, settings.max_fps, 6, 1, settings.max_input_bytes_per_s, settings.idle_timeout_s)
    assert parse_server(pack(ready))[0] == ready


def test_a_weights_folder_is_made_absolute_and_the_bundled_name_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for given, expected in (("tiny", "tiny"), ("mine", str(tmp_path / "mine")), ("/elsewhere", "/elsewhere")):
        assert Settings(weights=given).with_absolute_weights().weights == expected


def test_a_relative_folder_that_is_not_here_is_refused_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"weights=mine is no folder in {tmp_path}: give its absolute path"):
        Settings(weights="mine").with_absolute_weights()
