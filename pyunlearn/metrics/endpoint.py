"""A model behind a server that speaks the OpenAI protocol, such as vLLM or TGI: it writes answers, or judges them.

Nothing is asked twice: every answer is kept by what it is an answer to. The server's key comes from an environment
variable, and goes into the request's header and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .._progress import track
from ..data.rows import brief
from ..store import Store, digest_json

Messages = Sequence[Mapping[str, str]]
FORMAT = 1  # of what is kept: a later one does not read an earlier one's
KEY = "PYUNLEARN_API_KEY"
VARIABLE = r"[A-Za-z_]\w*"  # names of environment variables
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds between two attempts
LONGEST_ANSWER = 2**24  # bytes
LONGEST_TIMEOUT = 86400.0  # seconds
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SETTINGS: Mapping[str, Any] = {"temperature": 0}


class EndpointError(OSError):
    """A server did not answer, or not as it has to."""


class Refused(Exception):
    """One attempt that failed. wait: seconds that the server asks for; again: whether another one may do better."""

    def __init__(self, what: str, again: bool, wait: float | None = None):
        super().__init__(what)
        self.again, self.wait = again, wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class Endpoint:
    """See the module. It is safe to use from several threads.

    url: up to the version, e.g. http://localhost:8000/v1. model: as the server calls it. settings: of every request,
    beside SETTINGS; None leaves one out, for a server that does not take it. key: the environment variable of the
    server's key; no key is sent where it is not set. timeout: seconds for one attempt. retries: further attempts after
    a failure that may pass (no connection, a timeout, HTTP 408, 409, 425, 429, 5xx), after pauses that double, or as
    long as the server says. concurrency: requests at once. budget: requests in all, retries too; None is no limit.
    cache: the folder where answers are kept; None is in memory alone. progress: a bar on stderr.

    Raises ValueError for a url that is no http(s) address, holds a password or a query, and for bad numbers.
    """

    url: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    key: str = KEY
    timeout: float = 120.0
    retries: int = 4
    concurrency: int = 8
    budget: int | None = None
    cache: str | Path | None = None
    progress: bool = True
    first_wait: float = 1.0
    sent: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        self.url = self.url.rstrip("/")
        if not self.model:
            raise ValueError(f"model={self.model!r}: needs the name by which {self.url} knows a model")
        for name, least in (("retries", 0), ("concurrency", 1), ("budget", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: needs a whole number >= {least}")
        if not re.fullmatch(VARIABLE, self.key):
            raise ValueError("key: needs the name of an environment variable, which holds the key, not the key itself")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"timeout={self.timeout}: needs seconds, more than 0 and at most {LONGEST_TIMEOUT:g}")
        self.store = Store(None if self.cache is None else Path(self.cache) / "endpoints")
        handlers: list[Any] = [NoRedirect()]
        if urlsplit(self.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def chat(self, conversations: Sequence[Messages], *, description: str = "asking", **settings: Any) -> list[str]:
        """What the model says to each conversation, a sequence of {"role", "content"}, in their order.

        settings: of these requests, e.g. max_tokens. Raises EndpointError, one sentence that names the url, what came
        and what is needed, also where the budget would not do; what has come until then is kept.
        """
        bodies = [{"messages": [dict(turn) for turn in each]} for each in conversations]
        return self._finish("chat/completions", bodies, settings, description)

    def complete(self, prompts: Sequence[str], *, description: str = "writing", **settings: Any) -> list[str]:
        """How the model goes on with each prompt, a text as it is. The rest as `chat`."""
        return self._finish("completions", [{"prompt": prompt} for prompt in prompts], settings, description)

    def _finish(
        self, path: str, bodies: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], description: str
    ) -> list[str]:
        chosen = {key: value for key, value in {**SETTINGS, **self.settings, **settings}.items() if value is not None}
        full = [{"model": self.model, **body, **chosen} for body in bodies]
        identities = [{"format": FORMAT, "url": f"{self.url}/{path}", "body": body} for body in full]
        names = [digest_json(identity) for identity in identities]
        wanted = dict(zip(names, zip(identities, full, strict=True), strict=True))
        kept: dict[str, Any] = {name: self.store.get(name, identity) for name, (identity, _) in wanted.items()}
        missing = [name for name, text in kept.items() if text is None]
        left = math.inf if self.budget is None else self.budget - self.sent
        if len(missing) > left:
            raise EndpointError(
                f"{self.url}: {len(missing)} requests are needed, {left} of the budget of {self.budget} are left; "
                "raise it, or ask of fewer samples"
            )
        stop, failures = threading.Event(), []

        def ask(name: str) -> str:
            identity, body = wanted[name]
            try:
                return self.store.put(name, self._ask(path, body, stop), identity)
            except BaseException as error:
                failures.append(error)
                stop.set()  # one failure is the end of the others' attempts too
                raise

        pool = ThreadPoolExecutor(max_workers=self.concurrency)
        try:
            answers = {name: pool.submit(ask, name) for name in missing}
            for name in track(missing, description, self.progress, size=lambda _: 1):
                kept[name] = answers[name].result()
        except EndpointError:
            raise failures[0] from None
        finally:
            stop.set()  # Ctrl-C is, too
            pool.shutdown(wait=False, cancel_futures=True)
        return [kept[name] for name in names]

    def _ask(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> str:
        """One answer, with further attempts until `stop`."""
        for attempt in range(self.retries + 1):
            if stop.is_set():
                raise EndpointError(f"{self.url}/{path}: is not asked, as another request has failed")
            with self._lock:
                if self.budget is not None and self.sent >= self.budget:
                    raise EndpointError(f"{self.url}: the budget of {self.budget} requests is spent; raise it")
                self.sent += 1
            try:
                return text_of(self._send(path, body), path)
            except Refused as refused:
                if not refused.again or attempt == self.retries:
                    tried = "" if attempt == 0 else f" ({attempt + 1} attempts)"
                    raise EndpointError(f"{self.url}/{path}: {refused}{tried}") from None
                wait = refused.wait
                if wait is None:
                    wait = self.first_wait * 2**attempt * random.uniform(0.5, 1.0)  # not all threads at once
                stop.wait(min(wait, LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _send(self, path: str, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if secret := os.environ.get(self.key):
            if not re.fullmatch(r"[ -~]+", secret):  # told here: what urllib says holds the key
                raise EndpointError(
                    f"{self.url}: ${self.key} holds a line break, or another sign that no header takes; set it without"
                )
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return read_within(response, LONGEST_ANSWER, self.timeout)
        except urllib.error.HTTPError as error:
            content = b""
            with error, suppress(OSError, http.client.HTTPException):
                content = error.read1(2000)
            said = " ".join(content.decode("utf-8", "replace").split())
            hint = f"; is ${self.key} the server's key?" if error.code in (401, 403) else ""
            what = f"answered HTTP {error.code}, {brief(said)}; needs an OpenAI-compatible server with this model{hint}"
            raise Refused(what, error.code in TRY_AGAIN, seconds(error.headers.get("Retry-After"))) from None
        except TimeoutError:
            raise Refused(f"gave no answer in {self.timeout:g} seconds; needs a longer timeout", True) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Refused(f"gave no answer in {self.timeout:g} seconds; needs a longer timeout", True) from None
            raise Refused(f"cannot be reached ({reason}); needs a server that is up", True) from None


def read_within(response: Any, most: int, timeout: float) -> bytes:
    """An answer's first `most` bytes. Raises TimeoutError for a server that sends on and on, a little at a time."""
    end, content = time.monotonic() + timeout, b""
    while len(content) < most and (part := response.read1(most - len(content))):
        content += part
        if time.monotonic() > end:
            raise TimeoutError
    return content


def text_of(answer: bytes, path: str) -> str:
    """The text in a server's answer, halves of characters replaced: no file takes these. Raises Refused for anything
    else."""
    try:
        choice = json.loads(answer)["choices"][0]
        text = choice["message"]["content"] if path.startswith("chat") else choice["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        where = "choices[0].message.content" if path.startswith("chat") else "choices[0].text"
        shown = brief(answer.decode("utf-8", "replace"))
        raise Refused(f"answered {shown}; needs JSON with a text in {where}", True)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def seconds(retry_after: str | None) -> float | None:
    """Of a header that counts seconds; None for a date or none."""
    try:
        wait = float(retry_after or "")
    except ValueError:
        return None
    return wait if math.isfinite(wait) and wait >= 0 else None


def check_url(url: str) -> None:
    """Raises ValueError unless it is an address that may be told in records."""
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[!-~]+", url)
        (parts.hostname or "").encode("idna")
        told = parts.username or parts.password or parts.query or parts.fragment
        _ = parts.port
    except ValueError:
        bad, told = True, None
    if told:
        raise ValueError(
            f"url: has a user, a password, a query or a fragment, which would be in records; the key goes into ${KEY}"
        )
    if bad:
        raise ValueError(f"url={url!r}: needs an http or https address, e.g. http://localhost:8000/v1")
