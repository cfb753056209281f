"""An endpoint against a server in this process: what is sent, what is kept, and what is told when it fails."""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import Endpoint, EndpointError, evaluate

SECRET = "sk-very-secret"


def reply(text, path="/v1/chat/completions"):
    return {"choices": [{"message": {"content": text}} if path.endswith("chat/completions") else {"text": text}]}


class Server(ThreadingHTTPServer):
    """Keeps what it is asked; `answer(path, body)` gives a status, an object, bytes or an iterator of these, and
    headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked, self.keys, self.at_once, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        self.answer = lambda path, body: (200, reply(f"<{said_in(body)}>", path), {})

    def handle_error(self, *_):
        """A client that has gone is no news here."""

    def count(self, change):
        with self.lock:
            self.at_once += change
            self.most = max(self.most, self.at_once)


def said_in(body):
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.count(1)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        status, value, headers = self.server.answer(self.path, body)
        self.server.count(-1)
        self.send_response(status)
        if isinstance(value, Iterator):
            self.end_headers()
            self.wfile.writelines(value)
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def at(server, **options):
    return Endpoint(server.url, "judge-1", **{"progress": False, "first_wait": 0.001, "timeout": 20.0, **options})


def turns(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_come_in_order_each_asked_once(server):
    endpoint = at(server, settings={"seed": 3})
    assert endpoint.chat(turns("a", "b", "a", "c"), max_tokens=9) == ["<a>", "<b>", "<a>", "<c>"]
    assert Counter(said_in(body) for _, body in server.asked) == {"a": 1, "b": 1, "c": 1}
    assert endpoint.complete(["a"], max_tokens=9) == ["<a>"]
    path, body = server.asked[-1]
    assert path == "/v1/completions"
    assert body == {"model": "judge-1", "prompt": "a", "temperature": 0, "seed": 3, "max_tokens": 9}
    assert at(server, settings={"temperature": None}).chat(turns("d")) == ["<d>"]
    assert server.asked[-1] == ("/v1/chat/completions", {"model": "judge-1", "messages": turns("d")[0]})
    assert endpoint.sent == 4


def test_what_was_answered_is_kept_for_the_same_model_and_settings(server, tmp_path):
    assert at(server, cache=tmp_path).chat(turns("a", "b")) == ["<a>", "<b>"]
    server.answer = lambda path, body: (200, reply("other", path), {})
    assert at(server, cache=tmp_path).chat(turns("b", "c", "a")) == ["<b>", "other", "<a>"]
    assert at(server, cache=tmp_path, settings={"top_p": 0.5}).chat(turns("a")) == ["other"]
    assert Endpoint(server.url, "judge-2", cache=tmp_path, progress=False).chat(turns("a")) == ["other"]
    assert len(server.asked) == 5


def test_the_key_goes_into_the_header_alone(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYUNLEARN_API_KEY", SECRET)
    endpoint = at(server, cache=tmp_path)
    endpoint.chat(turns("a"))
    assert server.keys == [f"Bearer {SECRET}"]
    server.answer = lambda path, body: (401, {"error": "no such key"}, {})
    with pytest.raises(EndpointError, match=r"HTTP 401.*is \$PYUNLEARN_API_KEY the server's key\?") as told:
        endpoint.chat(turns("b"))
    assert SECRET not in f"{endpoint!r} {told.value} {capfd.readouterr()} {server.asked}"
    kept = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert kept
    assert not any(SECRET in path.read_text() for path in kept)
    monkeypatch.setenv("OTHER_KEY", "other")
    server.answer = lambda path, body: (200, reply("x", path), {})
    at(server, key="OTHER_KEY").chat(turns("c"))
    at(server, key="NO_SUCH_KEY").chat(turns("d"))
    assert server.keys[-2:] == ["Bearer other", None]


def test_a_failure_that_passes_is_tried_again(server):
    left = {"a": [503, 429], "b": [500]}

    def answer(path, body):
        queue = left.get(said_in(body), [])
        if queue:
            return queue.pop(), {"error": "busy"}, {"Retry-After": "0"}
        return 200, reply("done", path), {}

    server.answer = answer
    endpoint = at(server)
    assert endpoint.chat(turns("a", "b", "c")) == ["done"] * 3
    assert endpoint.sent == len(server.asked) == 6


@pytest.mark.parametrize(
    ("status", "answer", "attempts", "message"),
    [
        (
            503,
            {"error": "busy"},
            3,
            r"chat/completions: answered HTTP 503, '\{\"error\": \"busy\"\}'; needs .*\(3 attempts\)",
        ),
        (404, {"error": "no such model"}, 1, "answered HTTP 404, .*no such model.*; needs an OpenAI-compatible server"),
        (200, b"<html>hello</html>", 3, "answered '<html>hello</html>'; needs JSON with a text in choices"),
        (200, {"choices": []}, 3, r"needs JSON with a text in choices\[0\].message.content"),
        (200, {"choices": [{"message": {"content": None}}]}, 3, "needs JSON with a text"),
        (200, b"[" * 100_000, 3, "needs JSON with a text"),
    ],
)
def test_what_fails_is_told_in_one_sentence(server, tmp_path, status, answer, attempts, message):
    good = server.answer
    server.answer = lambda path, body: (status, answer, {}) if said_in(body) == "b" else good(path, body)
    endpoint = at(server, retries=2, cache=tmp_path, concurrency=1)
    with pytest.raises(EndpointError, match=message) as told:
        endpoint.chat(turns("a", "b", "c"))
    assert str(told.value).startswith(server.url)
    assert "\n" not in str(told.value)
    assert Counter(said_in(body) for _, body in server.asked)["b"] == attempts
    server.answer = good
    before = len(server.asked)
    assert endpoint.chat(turns("a", "b")) == ["<a>", "<b>"]
    assert [said_in(body) for _, body in server.asked[before:]] == ["b"]  # a was kept


def test_a_server_that_is_slow_or_gone(server):
    release = threading.Event()

    def answer(path, body):
        release.wait(20)
        return 200, reply("late", path), {}

    server.answer = answer
    with pytest.raises(EndpointError, match=r"gave no answer in 0\.2 seconds; needs a longer timeout \(2 attempts\)"):
        at(server, timeout=0.2, retries=1).chat(turns("a"))
    release.set()
    gone = Endpoint("http://127.0.0.1:9/v1", "m", retries=0, progress=False)
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/v1/chat/completions: cannot be reached \(.*refused"):
        gone.chat(turns("a"))


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_sends_on_and_on(server, status):
    """Whatever it sends in time is not the end of its answer."""
    stop = threading.Event()

    def slowly():
        for _ in range(100):
            if not stop.wait(0.05):
                yield b" "
        yield json.dumps(reply("late")).encode()

    server.answer = lambda path, body: (status, slowly(), {})
    with pytest.raises(EndpointError, match=r"gave no answer in 0\.3 seconds" if status == 200 else "HTTP 500"):
        at(server, timeout=0.3, retries=0).chat(turns("a"))
    stop.set()


def test_half_a_character_is_kept_as_a_replaced_one(server, tmp_path):
    server.answer = lambda path, body: (200, reply("a \ud800 b \U0001f600", path), {})
    for _ in range(2):
        assert at(server, cache=tmp_path).chat(turns("a")) == ["a \ufffd b \U0001f600"]
    assert len(server.asked) == 1


@pytest.mark.parametrize("end", ["\r", "\n", "\nX-Other: header", "é", "\u2026"])
def test_a_key_that_no_header_takes_is_not_told(server, monkeypatch, end):
    monkeypatch.setenv("PYUNLEARN_API_KEY", SECRET + end)
    with pytest.raises(EndpointError, match=r"\$PYUNLEARN_API_KEY holds a line break, or another sign") as told:
        at(server).chat(turns("a"))
    assert SECRET not in "".join(traceback.format_exception(told.value))
    assert server.asked == []


def test_a_redirect_is_not_followed(server, monkeypatch):
    monkeypatch.setenv("PYUNLEARN_API_KEY", SECRET)
    server.answer = lambda path, body: (302, b"", {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(EndpointError, match="answered HTTP 302"):
        at(server).chat(turns("a"))
    assert len(server.asked) == 1


def test_requests_at_once(server):
    def answer(path, body):
        time.sleep(0.02)
        return 200, reply("x", path), {}

    server.answer = answer
    at(server, concurrency=3).chat(turns(*"abcdefghijkl"))
    assert 1 < server.most <= 3


def test_the_budget_counts_every_request(server):
    endpoint = at(server, budget=3, retries=5)
    with pytest.raises(EndpointError, match="4 requests are needed, 3 of the budget of 3 are left; raise it"):
        endpoint.chat(turns(*"abcd"))
    assert server.asked == []
    endpoint.chat(turns("a", "b"))
    endpoint.chat(turns("a", "b"))
    server.answer = lambda path, body: (500, {}, {})
    with pytest.raises(EndpointError, match="the budget of 3 requests is spent"):
        endpoint.chat(turns("c"))
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000': needs an http or https address"),
        ({"url": "file:///etc/passwd"}, "needs an http or https address"),
        ({"url": "http://host:port/v1"}, "needs an http or https address"),
        ({"url": f"http://me:{SECRET}@host/v1"}, "url: has a user, a password, a query or a fragment"),
        ({"url": f"http://host/v1?key={SECRET}"}, "url: has a user"),
        ({"key": SECRET}, "key: needs the name of an environment variable"),
        ({"model": ""}, "model='': needs the name"),
        ({"retries": -1}, "retries=-1"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"budget": 0}, "budget=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": math.inf}, "timeout=inf: needs seconds, more than 0 and at most 86400"),
        ({"url": "http://localhost/v1\n"}, "needs an http or https address"),
        ({"url": "http://.host/v1"}, "needs an http or https address"),
        ({"url": "http://h\u00f6st/v1"}, "needs an http or https address"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as told:
        Endpoint(**{"url": "http://host/v1", "model": "m", **options})
    assert SECRET not in str(told.value)


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHAT], ids=["completions", "chat"])
def test_a_server_writes_in_the_place_of_the_model(server, template):
    items = [QA("Who?", "Ada wrote it."), QA("Where?", "By the sea.")]
    tokenizer = train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in items], vocab_size=300)
    tokenizer.chat_template = template
    server.answer = lambda path, body: (200, reply(" Ada wrote it. ", path), {})
    options = {"metrics": ["rouge_l"], "max_new_tokens": 5, "progress": False}
    result = evaluate(None, tokenizer, items, writer=at(server), **options)
    assert [record["generated"] for record in result.records] == ["Ada wrote it."] * 2
    assert result.records[0]["rouge_l"] == 1
    paths, bodies = {path for path, _ in server.asked}, [body for _, body in server.asked]
    assert paths == {"/v1/completions" if template is None else "/v1/chat/completions"}
    asked = {"Who?", "Where?"} if template else {"Question: Who?\nAnswer:", "Question: Where?\nAnswer:"}
    assert {said_in(body) for body in bodies} == asked
    assert all(body["max_tokens"] == 5 and body["temperature"] == 0 for body in bodies)
    with pytest.raises(ValueError, match="needs a model; an endpoint alone writes"):
        evaluate(None, tokenizer, items, writer=at(server), metrics=["probability"])
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)
    both = evaluate(model, tokenizer, items, writer=at(server), **{**options, "metrics": ["rouge_l", "probability"]})
    assert both.records[0]["generated"] == "Ada wrote it."
    assert 0 < both.summary["probability"] < 1
