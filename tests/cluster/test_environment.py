import os
import subprocess
import sys

SHOW = "import os; print(os.environ.get('RAY_AUTH_MODE'), os.environ.get('RAY_USAGE_STATS_ENABLED'))"


def shown(imports: str, **environment: str) -> list[str]:
    """What Ray's variables are after these imports, in a fresh process that has only these of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", f"import {imports}; {SHOW}"], env=clean, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_importing_cluster_decides_authentication_before_ray_reads_it() -> None:
    assert shown("cluster.session") == ["token", "0"]


def test_what_the_user_has_set_stays() -> None:
    assert shown("cluster.session", RAY_AUTH_MODE="disabled") == ["disabled", "0"]


def test_nothing_is_changed_behind_the_back_of_a_loaded_ray() -> None:
    assert shown("ray, cluster")[0] == "None"
