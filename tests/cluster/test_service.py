"""The files that a server for many people is started with."""

from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

import cluster
from serving.bench import server as bench_server
from serving.settings import Settings

FOLDER = Path(cluster.__file__).parent


def test_serve_and_the_application_take_what_the_file_says():
    schema = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "service.yaml").read_text()))
    (application,) = schema.applications
    assert application.import_path == "serving:app"
    assert [deployment.name for deployment in application.deployments] == ["Ingress"]
    Settings(**application.args)


def test_a_replica_that_comes_or_goes_cuts_nobody_for_a_day():
    variables = environment()
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= 24 * 60 * 60


def test_what_is_measured_is_what_is_shipped():
    shipped, measured = environment(), bench_server.HAPROXY
    shared = shipped.keys() & measured.keys()
    assert shared >= {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"}
    assert [shipped[name] for name in shared] == [measured[name] for name in shared]


def environment():
    lines = (FOLDER / "haproxy.env").read_text().splitlines()
    return dict(line.split("=") for line in lines if not line.startswith("#"))
