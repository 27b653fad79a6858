"""The Hugging Face hub, and its refusals in plain words.

A gated model, a missing token and an empty cache are the three things that stop a newcomer; each gets an
error that says what to do. Nothing the hub or its library says is quoted, so that no token can slip into a
message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..errors import AccessError, GreatctlError, InputError, NetworkError

__all__ = ["snapshot"]


@cache
def snapshot(repo: str, patterns: tuple[str, ...], offline: bool, revision: str | None = None) -> Path:
    """The folder of `repo` in the Hugging Face cache, with `patterns` downloaded; asked once a process."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    offline = offline or constants.HF_HUB_OFFLINE
    bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None
    noise = logging.getLogger("huggingface_hub")
    level = noise.level
    noise.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["original/*"],
            local_files_only=offline,
        )
    except HFValidationError as error:
        raise InputError(f"{repo!r} is neither a folder nor a hub id", why=str(error).splitlines()[0]) from error
    except (OSError, RuntimeError) as error:
        raise _refusal(repo, error, offline) from error
    finally:
        noise.setLevel(level)
        if bars:
            enable_progress_bars()
    return Path(found)


def _refusal(repo: str, error: BaseException, offline: bool) -> GreatctlError:
    """The hub's refusal in our words. No message of the hub is quoted, so no token can slip through."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    causes = list(_causes(error))
    responses = [r for r in (getattr(cause, "response", None) for cause in causes) if r is not None]
    status = responses[0].status_code if responses else None
    steps = (
        f"1. accept the licence at https://huggingface.co/{repo}; "
        "2. set HF_TOKEN (or run `hf auth login`); or use `--model bundled`"
    )
    if status in (401, 403):
        token = "the token was refused" if get_token() else "no token was sent"
        return AccessError(
            f"no access to the model {repo}",
            why=f"the hub answered {status}; {token}",
            fix=steps,
            code="gated",
        )
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return AccessError(
            f"the hub has no model {repo}",
            why="it answered 404",
            fix="check the name; if it is private: " + steps,
        )
    if offline:
        return AccessError(
            f"the model {repo} is not in the Hugging Face cache",
            why="offline, so nothing can be downloaded",
            fix="run once without --offline (and without HF_HUB_OFFLINE), or use `--model bundled`",
            code="not-cached",
        )
    root = type(causes[-1]).__name__
    why = f"the hub answered {status}" if status else f"it could not be reached ({root})"
    return NetworkError(f"the model {repo} could not be downloaded", why=why, fix="try again, or use `--model bundled`")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what lies behind it, down to the root."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
