import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import PREFIX, ManagerMetrics, MemberMetrics, Metric, declarations, on_ray, record_call, rss_mb
from serving.metrics import IngressMetrics

ROOT = Path(__file__).parents[2]
SETS = [MemberMetrics, ManagerMetrics, IngressMetrics]
METRICS = {name: metric for each in SETS for name, metric in declarations(each).items()}
DASHBOARD = json.loads((ROOT / "cluster/grafana/personalive.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def named_in(expression: str) -> set[tuple[str, str]]:
    """The names of our metrics in an expression, each with the suffix that Prometheus gives a histogram's parts."""
    return set(re.findall(rf"ray_{PREFIX}(\w+?)(_bucket|_sum|_count)?\b", expression))


def labels_in(expression: str) -> set[str]:
    grouped = re.findall(r"by \(([\w, ]+)\)", expression)
    return {label for group in grouped for label in group.split(", ")} - {"le"}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = {name for expression in expressions() for name, _ in named_in(expression)}
    assert shown == METRICS.keys()


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_groups_by_labels_that_its_metrics_have_and_reads_the_parts_of_histograms(
    expression: str,
) -> None:
    for name, part in named_in(expression):
        assert labels_in(expression) <= {METRICS[name].label}
        assert bool(part) == (METRICS[name].kind == "histogram")


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert DASHBOARD["uid"] == "personalive" and "id" not in DASHBOARD
    assert [variable["type"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    sources = [each["datasource"]["uid"] for panel in panels for each in (panel, *panel["targets"])]
    assert set(sources) == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_table_in_the_docs_names_every_metric_with_its_kind_and_label() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (?:`(\w+)`)?", text, re.M)
    assert {name: (kind, label or None) for name, kind, label in rows} == {
        name: (metric.kind, metric.label) for name, metric in METRICS.items()
    }


@pytest.mark.parametrize(("name", "metric"), METRICS.items())
def test_a_metric_is_declared_as_prometheus_wants_it(name: str, metric: Metric) -> None:
    assert name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.bounds) == (metric.kind == "histogram")
    assert list(metric.bounds) == sorted(set(metric.bounds))


def test_no_label_could_name_a_session() -> None:
    labels = {metric.label for metric in METRICS.values()}
    assert labels == {None, "stage", "reason", "kind", "outcome", "state", "code", "part"}


def test_sets_need_no_ray_until_they_record_with_it() -> None:
    code = "import serving.metrics, sys; serving.metrics.IngressMetrics(); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_ray_every_metric_takes_what_it_is_given() -> None:
    for each in SETS:
        for name, metric in declarations(each).items():
            getattr(each(), name)(1.5, *(["motion"] if metric.label else []))


def test_a_call_is_one_call_of_a_batch_with_a_wait_for_each_session() -> None:
    told: list[Any] = []

    def into(name: str) -> Any:
        return lambda value, label: told.append((name, value, label))

    record_call(MemberMetrics(**{name: into(name) for name in declarations(MemberMetrics)}), "decode", 30.0, [1.0, 4.0])
    assert told == [
        ("stage_calls_total", 1, "decode"),
        ("stage_ms", 30.0, "decode"),
        ("batch_size", 2, "decode"),
        ("stage_wait_ms", 1.0, "decode"),
        ("stage_wait_ms", 4.0, "decode"),
    ]


def test_memory_is_in_mebibytes() -> None:
    assert 10 < rss_mb() < 100_000


def test_every_metric_can_be_recorded_with_ray_with_nothing_to_add_too_but_not_with_another_label() -> None:
    for each in SETS:
        metrics = on_ray(each)
        for name, metric in declarations(each).items():
            record, labels = getattr(metrics, name), ["motion"] if metric.label else []
            record(0, *labels)
            record(2.5, *labels)
            with pytest.raises(ValueError, match="zip"):
                record(1, *labels, "one label too many")
