"""The environment that Ray must find when it is imported. Called by `cluster/__init__`, before `cluster` does so.

Ray reads `RAY_AUTH_MODE` once, at its import, but hands the variable as it then is to the processes that it starts.
Set in between, its own processes would ask for a token that nobody has made. Where Ray is loaded already (`serve run`)
the variables are therefore left alone: `ray.init` without one turns token authentication on by itself.
"""

from __future__ import annotations

import os
import sys

DEFAULTS = {
    # Ray's own default differs between `ray.init` (token) and `ray start` (disabled): then one refuses the other.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def prepare_ray() -> None:
    """Sets what the user has not set, unless Ray has read it already."""
    if "ray" in sys.modules:
        return
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
