import inspect
import subprocess
import sys

import pytest
from ray import serve

from cluster.settings import PoolSettings
from serving.application import OTHER_REQUESTS, app, pool_settings
from serving.settings import Settings


def test_the_client_needs_no_ray_and_the_application_no_torch():
    code = "import serving.client, sys; print('ray' in sys.modules); serving.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_serve_finds_the_type_of_the_settings_at_the_builder():
    (parameter,) = inspect.signature(app).parameters.values()
    assert parameter.annotation is Settings


def test_every_place_of_a_replica_leaves_room_for_other_requests():
    application = app(Settings(max_sessions=100, num_replicas=2))
    assert isinstance(application, serve.Application)
    deployment = application._bound_deployment
    assert deployment.max_ongoing_requests == 100 + OTHER_REQUESTS
    assert deployment.num_replicas == 2


def test_all_that_decides_about_the_pool_is_passed_on(tmp_path):
    settings = Settings(weights=str(tmp_path), num_threads=1, max_batch=3, lease_s=5, device="cpu", max_sessions=9)
    assert pool_settings(settings) == PoolSettings(str(tmp_path), num_threads=1, max_batch=3, lease_s=5, device="cpu")


def test_the_package_has_nothing_else():
    import serving

    with pytest.raises(AttributeError, match="no attribute"):
        _ = serving.nothing
