"""Who names latents: a server that speaks the OpenAI protocol, or a language model on this machine.

    --labeler https://api.example.org/v1 --labeler-model NAME     POST …/chat/completions
    --labeler hf:NAME_OR_DIR                                      a local model; nothing is downloaded

The key of a server comes from GREATCTL_LABELER_KEY or OPENAI_API_KEY, goes into one header and nowhere else: no file, no
message and no error holds it, and over plain http it goes to this machine alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import AccessError, ManifestError, NetworkError, StageError, UsageError
from ..events import Run
from ..store.addresses import is_loopback, mirror_base
from .context import Context

if TYPE_CHECKING:
    from ..features.label_prompts import Message
    from ..store.http import Client

__all__ = ["KEYS", "LOCAL", "Labeler", "open_labeler", "request_of"]

KEYS = ("GREATCTL_LABELER_KEY", "OPENAI_API_KEY")
LOCAL = "hf:"
WORKERS = 4  # questions that are under way at once; a server of one's own is busy with fewer
_HOST = "labeler"  # stands for the server's address in what the client is asked for
_TIMEOUT, _DEADLINE, _LONGEST_WAIT, _ATTEMPTS = 180.0, 900.0, 120.0, 6
_NEW_TOKENS = 160
_SHORTEST = 1024  # tokens of context below which no question of ours fits


@dataclass(frozen=True)
class Labeler:
    """Somebody who answers messages.

    Attributes:
        name: the model's, for tables and fingerprints; it says nothing about the place.
        revision: of a local model, "" for a server, which does not say.
        workers: how many questions it may be asked at once.
    """

    name: str
    revision: str
    workers: int
    ask: Callable[[Sequence[Message]], str] = field(repr=False)


def request_of(ctx: Context, labeler: str | None, model: str | None) -> None:
    """Check the settings before anything is asked.

    Raises:
        UsageError: a server without a model's name, a model without a labeler, or no address.
        ManifestError: the manifest names the server: a stranger's file must not be handed a key.
    """
    if labeler is None:
        if model is not None:
            raise UsageError("--labeler-model without --labeler", why="nobody is asked", fix="give --labeler URL")
        return
    if labeler.startswith(LOCAL):
        if not labeler[len(LOCAL) :].strip():
            raise UsageError("--labeler hf: names no model", why="a name or folder follows it", fix="hf:NAME_OR_DIR")
        return
    if ctx.origins.get("labeler", "").startswith("sources.toml"):
        raise ManifestError(
            "a labeler's address is not taken from sources.toml",
            why="a key would go wherever a file from elsewhere says",
            fix="give --labeler URL, or GREATCTL_INTERPRET_LABELER in the environment",
        )
    _checked_address(labeler)
    if not model:
        raise UsageError(
            "--labeler URL needs --labeler-model", why="a server has several models", fix="give --labeler-model NAME"
        )


def open_labeler(ctx: Context, labeler: str, model: str | None, environ: Mapping[str, str] = os.environ) -> Labeler:
    """The labeler of these settings, checked as by `request_of`. Errors as that, and as `open_model`."""
    request_of(ctx, labeler, model)
    if labeler.startswith(LOCAL):
        return _local(ctx, labeler[len(LOCAL) :].strip())
    server = _Server(_checked_address(labeler), str(model), _key(labeler, environ), ctx)
    return Labeler(str(model), "", WORKERS, server)


def _checked_address(url: str) -> str:
    try:
        mirror_base(url)
    except UsageError:
        raise UsageError(
            "the address of --labeler cannot be used",
            why="it is neither http(s)://HOST/PATH without a user name, query and fragment, nor hf:NAME_OR_DIR",
            fix="--labeler http://127.0.0.1:8000/v1",
        ) from None
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(url: str, environ: Mapping[str, str]) -> str:
    """The key that may go to this address, or ""."""
    own, general = (environ.get(name, "").strip() for name in KEYS)
    parts = urlsplit(url)
    private = parts.scheme == "https" or is_loopback(parts.hostname or "")
    key = (own or general) if private else ""
    if own and not private:
        raise UsageError(
            f"the key of {KEYS[0]} would cross the network in the clear",
            why=f"{parts.scheme}://{parts.netloc} is neither https nor this machine",
            fix=f"use https, or unset {KEYS[0]} if the server needs none",
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError("the labeler's key holds odd characters", why="a header takes plain ASCII", fix="set it again")
    return key


class _Server:
    """A server that speaks the OpenAI protocol; one connection a thread."""

    def __init__(self, base: str, model: str, key: str, ctx: Context) -> None:
        self._base, self._model, self._key, self._ctx = base, model, key, ctx
        self._mine = threading.local()
        self._cold = True  # temperature 0, until the server says that its model takes no temperature

    def __call__(self, messages: Sequence[Message]) -> str:
        cold = self._cold
        status, body = self._post(messages, cold)
        if status == 400 and cold and b"temperature" in body:
            self._cold = False
            status, body = self._post(messages, False)
        if status != 200:
            raise self._refusal(status, body)
        return _content(body)

    def _post(self, messages: Sequence[Message], cold: bool) -> tuple[int, bytes]:
        asked: dict[str, object] = {"model": self._model, "messages": list(messages)}
        if cold:
            asked["temperature"] = 0
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(asked).encode()
        try:
            return self._client().post(f"https://{_HOST}/chat/completions", data, {_HOST}, headers)
        except NetworkError as error:
            if error.name == "offline":
                raise
            raise NetworkError(
                "the labeler does not answer",
                why=error.why.removesuffix(f": {error.where}"),
                fix="run the same command again: what it has answered is kept",
                where=error.where,
            ) from None

    def _client(self) -> Client:
        if not hasattr(self._mine, "client"):
            from ..store.http import Client

            self._mine.client = Client(
                mirror=self._base,
                offline=self._ctx.offline,
                pace=0.0,
                timeout=_TIMEOUT,
                deadline=_DEADLINE,
                attempts=_ATTEMPTS,
                longest_wait=_LONGEST_WAIT,
                sleep=_watchful(self._ctx.run),
            )
        return self._mine.client

    def _refusal(self, status: int, body: bytes) -> StageError | AccessError:
        """The server's refusal, with its own words where they cannot hold the key."""
        if status in (401, 403):
            what = "the key was refused" if self._key else "no key was sent"
            return AccessError(
                "no access to the labeler", why=f"it answered {status}; {what}", fix=f"set {KEYS[0]} or {KEYS[1]}"
            )
        from ..features.inert import inert

        said = body.decode("utf-8", "replace")
        said = inert(said.replace(self._key, "…") if self._key else said, 200)
        return StageError(
            f"the labeler answered {status}",
            why=said or "without a word",
            fix=f"check --labeler (its address ends where /chat/completions begins) and --labeler-model {self._model}",
            code=f"http-{status}",
        )


def _content(body: bytes) -> str:
    """The text of a completion; "" where there is none, so that the question is asked again like any unreadable one."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _watchful(run: Run) -> Callable[[float], None]:
    """A sleep that a request to stop ends."""

    def sleep(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            run.stop_here()
            time.sleep(min(left, 0.25))

    return sleep


def _local(ctx: Context, name: str) -> Labeler:
    """A model of this machine's Hugging Face cache, or of a folder."""
    from .models import open_model, slug

    model: Any = open_model(replace(ctx, offline=True), name)
    if model.n_ctx < _SHORTEST:
        raise UsageError(
            f"{name} reads {model.n_ctx:,} tokens at once",
            why=f"a question has up to about {_SHORTEST:,} and more",
            fix="name a language model with a longer context",
        )

    def ask(messages: Sequence[Message]) -> str:
        from ..model.generate import generate

        ids = _prompt(model.tokenizer, messages)
        if len(ids) + _NEW_TOKENS > model.n_ctx:
            return ""  # like an unreadable answer: this latent keeps its fallback, the others go on
        new = generate(model, ids, _NEW_TOKENS, stop=ctx.run.stop_here)
        return model.tokenizer.decode(new, skip_special_tokens=True)

    return Labeler(slug(name), model.revision, 1, ask)


def _prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids by the tokenizer's own chat template, or as plain paragraphs where it has none."""
    from ..model.tokenizer import encode

    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return encode(tokenizer, "\n\n".join([*(m["content"] for m in messages), "JSON: "]))
