"""How the Hub is asked: no request waits for ever, and a Hub that stumbles is asked again. No torch here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub import errors, set_client_factory
from huggingface_hub.utils import _http


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds until a connection stands, and between two pieces of an answer.
TIME_LIMITS = {"connect": 10.0, "read": 60.0, "write": 60.0}
# Seconds between the tries, and the most that a server may ask for by `Retry-After`: the Hub counts in 5 minutes.
WAITS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT = 300.0
_STUMBLES = (408, 429, 500, 502, 503, 504)
_BREAKS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)


def persist(call: Callable[..., T], *arguments, **named) -> T:
    """Returns what a call that asks the Hub returns. Where the Hub stumbles (too many requests, an error of its own, a
    broken connection, no answer in time) it is called again, five times in all; other errors are raised at once."""
    for wait in WAITS:
        try:
            return call(*arguments, **named)
        except Exception as error:  # noqa: BLE001 (libraries wrap the error in one of theirs)
            cause = _stumble(error)
            # A file that is neither there nor in the cache: huggingface_hub has asked again itself.
            if cause is None or isinstance(error, errors.LocalEntryNotFoundError):
                raise
            asked = cause.response.headers.get("Retry-After", "") if isinstance(cause, errors.HfHubHTTPError) else ""
        seconds = min(max(wait, float(asked)), LONGEST_WAIT) if asked.isdigit() else wait
        logger.warning("The Hub stumbles (%s): it is asked again in %g s.", type(cause).__name__, seconds)
        time.sleep(seconds)
    return call(*arguments, **named)


def broken_off(repo_id: str, error: Exception) -> ConnectionError | None:
    """Returns the error of one line for a download that stumbled every time, or `None` if it was something else. To be
    raised `from None`: the errors of all tries, each the context of the next one, say nothing more."""
    cause = _stumble(error)
    if cause is None:
        return None
    request = cause.response.request if isinstance(cause, errors.HfHubHTTPError) else cause.request
    _, _, name = request.url.path.partition("/resolve/")
    file = name.partition("/")[2] or "its files"
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return ConnectionError(
        f"The download of {file} from {repo_id} broke off again and again, the last time with: {reason.rstrip('.')}. Try"
        " again later: what has arrived is kept."
    )


def _stumble(error: BaseException | None) -> httpx2.HTTPError | None:
    """The error of a Hub that may answer if it is asked again, or `None` if asking again is of no use."""
    while error is not None:
        if isinstance(error, errors.HfHubHTTPError):
            return error if error.response.status_code in _STUMBLES else None
        if isinstance(error, _BREAKS):
            return error
        error = error.__cause__
    return None


def _limit_time(request: httpx2.Request) -> None:
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: TIME_LIMITS.get(name) if given.get(name) is None else given[name] for name in (*TIME_LIMITS, "pool")
    }


def _follow_factory(make_client: Callable[[], httpx2.Client]) -> Callable[[], httpx2.Client]:
    def make_limited_client() -> httpx2.Client:
        client = make_client()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _limit_time]}
        return client

    return make_limited_client


# The clients of huggingface_hub have no limit, and diffusers gives none. A factory that somebody has set, for a proxy
# or for certificates, stays; there is no public name for it.
set_client_factory(_follow_factory(_http._GLOBAL_CLIENT_FACTORY))
