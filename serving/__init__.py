"""What a person connects to: the Serve application, its websocket protocol, its page and its client. No torch.

`serve run serving:app` builds the application; `python -m serving.client` is the client and needs no Ray, so `app` is
imported when it is asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    from serving.application import app

    return app
