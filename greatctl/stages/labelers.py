"""Who names latents: a server that speaks the OpenAI protocol, or a language model on this machine.

    --labeler https://api.example.org/v1 --labeler-model NAME     POST …/chat/completions
    --labeler hf:NAME_OR_DIR                                      a local model; nothing is downloaded

The key of a server comes from GREATCTL_LABELER_KEY or OPENAI_API_KEY, goes into one header and nowhere else: no file, no
message and no error holds it, and over plain http it goes to this machine alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import AccessError, IntegrityError, ManifestError, NetworkError, StageError, UsageError
from ..events import Run
from ..store.addresses import is_loopback, mirror_base
from .context import Context

if TYPE_CHECKING:
    from ..features.label_prompts import Message
    from ..model import FrozenModel, ModelInfo
    from ..store.http import Client

__all__ = ["KEYS", "LOCAL", "Labeler", "open_labeler", "request_of"]

KEYS = ("GREATCTL_LABELER_KEY", "OPENAI_API_KEY")
LOCAL = "hf:"
WORKERS = 4  # questions that are under way at once; a server of one's own is busy with fewer
_HOST = "labeler"  # stands for the server's address in what the client is asked for
_TIMEOUT, _DEADLINE, _LONGEST_WAIT, _ATTEMPTS = 180.0, 900.0, 120.0, 6
_KNOCK = 10.0  # seconds for a connection to come about
_LONG = 8.0  # seconds of waiting that are announced
_NEW_TOKENS = 160
_SHORTEST = 1024  # tokens of context below which no question of ours fits


@dataclass(frozen=True)
class Labeler:
    """Somebody who answers messages.

    Attributes:
        name: the model's, for tables and fingerprints; it says nothing about the place.
        revision: of a local model, "" for a server, which does not say.
        workers: how many questions it may be asked at once.
        ask: messages to the text of an answer; "" where there is none.
        place: where the messages go, and whose key with them, in words; "" where they stay in this process.
        reach: gets ready (a local model is loaded); raises NetworkError where nobody listens, so that a wrong port costs
            no minute of patience.
    """

    name: str
    revision: str
    workers: int
    ask: Callable[[Sequence[Message]], str] = field(repr=False)
    place: str = ""
    reach: Callable[[], None] = field(default=lambda: None, repr=False)


def request_of(ctx: Context, labeler: str | None, model: str | None) -> None:
    """Check the settings before anything is asked.

    Raises:
        UsageError: a server without a model's name, a model without a labeler, or no address; a local model whose context
            is too short for any question.
        AccessError, InputError: the local model is not on this machine, or is none.
        ManifestError: the manifest names the server: a stranger's file must not be handed a key.
    """
    if labeler is None:
        if model is not None:
            raise UsageError("--labeler-model without --labeler", why="nobody is asked", fix="give --labeler URL")
        return
    if labeler.startswith(LOCAL):
        if not labeler[len(LOCAL) :].strip():
            raise UsageError("--labeler hf: names no model", why="a name or folder follows it", fix="hf:NAME_OR_DIR")
        _described(labeler[len(LOCAL) :].strip())
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
    """The labeler of these settings, checked as by `request_of`; a local model is not loaded yet. Errors as that."""
    request_of(ctx, labeler, model)
    if labeler.startswith(LOCAL):
        from .models import slug

        name = labeler[len(LOCAL) :].strip()
        local = _Local(ctx, name)
        return Labeler(slug(name), _described(name).revision, 1, local, reach=local.reach)
    key, key_from = _key(labeler, environ)
    server = _Server(_checked_address(labeler), str(model), key, key_from, ctx)
    place = f"{server.place}, with the key of {key_from}" if key else server.place
    return Labeler(str(model), "", WORKERS, server, place, server.reach)


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


def _key(url: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The key that may go to this address, or "", and the variable that it is from."""
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
    return key, KEYS[0] if own else KEYS[1]


class _Server:
    """A server that speaks the OpenAI protocol; one connection a thread."""

    def __init__(self, base: str, model: str, key: str, key_from: str, ctx: Context) -> None:
        self._base, self._model, self._key, self._key_from, self._ctx = base, model, key, key_from, ctx
        self._mine = threading.local()
        self._sleep = _watchful(ctx.run)
        self._cold = True  # temperature 0, until the server says that its model takes no temperature

    @property
    def place(self) -> str:
        """Scheme and host, for people."""
        parts = urlsplit(self._base)
        return f"{parts.scheme}://{parts.netloc}"

    def reach(self) -> None:
        """See that somebody listens. Nothing is sent; with --offline nothing is opened either."""
        if self._ctx.offline:
            return
        parts = urlsplit(self._base)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_KNOCK).close()
        except OSError as error:
            raise NetworkError(
                "nobody answers at the labeler's address",
                why=error.strerror or str(error),
                fix="start the labeler's server, or check host and port of --labeler",
                where=self.place,
            ) from None

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer's text; "" where it has none, or where it is longer than any answer to our questions."""
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
        except IntegrityError as error:
            if error.name != "too-large":
                raise
            return 200, b""
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
                sleep=self._sleep,
            )
        return self._mine.client

    def _refusal(self, status: int, body: bytes) -> StageError | AccessError:
        """The server's refusal, with its own words where they cannot hold the key."""
        if status in (401, 403):
            what, fix = f"the key of {self._key_from} was refused", f"check {self._key_from}"
            if not self._key:
                what, fix = "no key was sent", f"set {KEYS[0]} or {KEYS[1]}"
                if self._base.startswith("http:"):
                    what += " (over plain http one goes to this machine alone)"
            return AccessError(
                "no access to the labeler", why=f"it answered {status}; {what}", fix=fix, where=self.place
            )
        from ..features.inert import inert

        said = _reason(body)
        said = inert(said.replace(self._key, "…") if self._key else said, 200)
        ends = "" if urlsplit(self._base).path.strip("/") else "; most servers want /v1 at its end"
        return StageError(
            f"the labeler answered {status}",
            why=said or "without a word",
            fix=f"check --labeler (its address ends where /chat/completions begins{ends}) and --labeler-model {self._model}",
            where=self.place,
            code=f"http-{status}",
        )


def _reason(body: bytes) -> str:
    """What a refusal says: the message of an OpenAI-style error, else all of it."""
    said = body.decode("utf-8", "replace")
    try:
        message = json.loads(said)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return said
    return message if isinstance(message, str) else said


def _content(body: bytes) -> str:
    """The text of a completion; "" where there is none, so that the question is asked again like any unreadable one."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    if isinstance(content, list):  # some servers answer in parts
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _watchful(run: Run) -> Callable[[float], None]:
    """A sleep that a request to stop ends; a long one is announced, or a run at a rate limit would look dead.

    Several threads wait at once for the same reason: it is said once.
    """
    quiet_until = 0.0

    def sleep(seconds: float) -> None:
        nonlocal quiet_until
        end = time.monotonic() + seconds
        if seconds >= _LONG and time.monotonic() >= quiet_until:
            quiet_until = end
            run.notice(f"interpret: the labeler asks for patience: waiting {seconds:,.0f} s")
        while (left := end - time.monotonic()) > 0:
            run.stop_here()
            time.sleep(min(left, 0.25))

    return sleep


def _described(name: str) -> ModelInfo:
    """What a local model's folder says about it; nothing is loaded, and nothing downloaded."""
    from ..model import describe
    from .models import resolve

    source, display = resolve(name)
    try:
        info = describe(source, name=display, offline=True)
    except AccessError as error:
        if error.name != "not-cached":
            raise
        raise AccessError(
            f"the labeler's model {name} is not on this machine",
            why="a labeler's model is not downloaded on the way",
            fix=f"`hf download {name}` first, or name the folder of a model",
            code="not-cached",
        ) from None
    if info.n_ctx < _SHORTEST:
        raise UsageError(
            f"the labeler's model {name} reads {info.n_ctx:,} tokens at once",
            why=f"a question has up to about {_SHORTEST:,} and more",
            fix="name a language model with a longer context, best one that follows instructions",
        )
    return info


class _Local:
    """A model of this machine's Hugging Face cache, or of a folder; loaded when it is first needed."""

    def __init__(self, ctx: Context, name: str) -> None:
        self._ctx, self._name = ctx, name
        self._model: FrozenModel | None = None

    def reach(self) -> None:
        """Load it. Errors as `open_model`."""
        from .models import open_model

        if self._model is None:
            self._model = open_model(replace(self._ctx, offline=True), self._name)

    def __call__(self, messages: Sequence[Message]) -> str:
        """What the model writes after these messages."""
        from ..model.generate import generate

        self.reach()
        model: Any = self._model
        ids = _prompt(model.tokenizer, messages)
        if len(ids) + _NEW_TOKENS > model.n_ctx:
            return ""  # like an unreadable answer: this latent keeps its fallback, the others go on
        new = generate(model, ids, _NEW_TOKENS, stop=self._ctx.run.stop_here)
        return model.tokenizer.decode(new, skip_special_tokens=True)


def _prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids by the tokenizer's own chat template, or as plain paragraphs where it has none."""
    from ..model.tokenizer import encode

    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return encode(tokenizer, "\n\n".join([*(m["content"] for m in messages), "JSON: "]))
