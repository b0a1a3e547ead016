"""Every error a user can cause, with a stable code and a sentence that names the fix. No torch, no Ray.

`code` is what clients match on; the text is for people. Errors cross process borders, so they carry nothing but text.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the caller gave us cannot be used. `code` is stable, the message says what to change."""

    code = "user_error"

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (str(self), self.code)


class BadPortrait(UserError):
    """The portrait is not a picture we can animate."""

    code = "bad_portrait"


class BadVideo(UserError):
    """The driving video cannot be read."""

    code = "bad_video"


class BadWeights(UserError):
    """A weights folder is incomplete, mis-shaped or unsafe."""

    code = "bad_weights"


class BadConfig(UserError):
    """A configuration has an unknown or impossible value."""

    code = "bad_config"
