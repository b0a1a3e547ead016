"""One line in the log for each thing that happens to a session, readable by people and by programs.

Called by `serving.session`. In Serve's text encoding a line is `event=ready session=1f3c… mode=live`; with
`logging_config: {encoding: JSON}` the same fields are also keys of the line's object. See docs/observability.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Event = Literal["opened", "queued", "ready", "resumed", "recovering", "recovered", "idle", "ended"]
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+.:/,")
"""What stands in a value without quotes."""


def log_event(
    logger: logging.Logger,
    event: Event,
    session: str,
    *,
    level: int = logging.INFO,
    exc_info: bool = False,
    **fields: Any,
) -> None:
    """Logs `event` with its fields: text, numbers, bool, None, or a mapping of such.

    A field may not be named like an attribute of `logging.LogRecord` (`name`, `args`, `message`, ...), nor like what
    Serve adds to its JSON lines (`replica`, `deployment`, `application`, `route`, `request_id`, ...).
    """
    record = {"event": event, "session": session, **fields}
    if logger.isEnabledFor(level):
        logger.log(level, "%s", as_text(record), extra=record, exc_info=exc_info, stacklevel=2)


def as_text(fields: Mapping[str, Any]) -> str:
    """`key=value` after `key=value`, on one line whatever the values are; a mapping's keys follow its own by a dot."""
    return " ".join(f"{key}={_value(value)}" for key, value in _flat(fields))


def _flat(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _value(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, int | float) else str(value)
    return text if text and PLAIN.issuperset(text) else json.dumps(text)
