"""What is not on the Hub, or has no Hub to ask, ends within seconds; what is in the cache asks no one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from pyunlearn._hub import check_hub, here_or_asked
from pyunlearn.data.tiny import tiny_llama, train_tokenizer

SCRIPT = """
import json, sys, time, types
from pyunlearn.data.rows import hub_rows
from pyunlearn.metrics.encoders import Embedder
from pyunlearn.model.load import load_model

def told(load):
    begun = time.monotonic()
    try:
        outcome = type(load()).__name__
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.monotonic() - begun

sys.modules.setdefault("datasets", types.ModuleType("datasets"))  # which is not asked either
outcomes = {
    "cached": told(lambda: load_model("someone/tiny")[0]),
    "connections": open(sys.argv[1]).read(),
    "model": told(lambda: load_model("embeded")),
    "part": told(lambda: load_model("someone/part")),
    "encoder": told(lambda: Embedder("no/encoder")),
    "rows": told(lambda: list(hub_rows("no/rows", None, "train"))),
}
print(json.dumps(outcomes))
"""


@contextmanager
def silent(log: Path) -> Iterator[str]:
    """An endpoint that takes connections and says nothing; log: a line for each."""
    log.write_text("")
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                log.write_text(f"{len(held)} connections")

        Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def keep(cache: Path, name: str, folder: Path) -> Path:
    """A model's files as the Hub's cache has them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))


def test_a_hub_that_does_not_answer(tmp_path):
    tokenizer = train_tokenizer(["a b"], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tiny")
    model = tiny_llama(tokenizer, hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "tiny")
    keep(tmp_path / "cache", "someone/tiny", tmp_path / "tiny")
    (keep(tmp_path / "cache", "someone/part", tmp_path / "tiny") / "model.safetensors").unlink()
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    del environment["HF_HUB_OFFLINE"]
    with silent(tmp_path / "log") as endpoint:
        environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        command, options = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")], {"env": environment, "cwd": tmp_path}
        done = subprocess.run(command, **options, capture_output=True, text=True, check=True, timeout=120)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("cached")[0] == "LlamaForCausalLM"
    assert outcomes.pop("connections") == ""
    whats = {
        "model": "model or tokenizer 'embeded'",
        "part": "model or tokenizer 'someone/part'",
        "encoder": "model or tokenizer 'no/encoder'",
        "rows": "data set 'no/rows'",
    }
    assert outcomes.keys() == whats.keys()
    for part, (told, seconds) in outcomes.items():
        assert told.startswith(f"FileNotFoundError: {whats[part]}: not a folder here and not available from the Hub (")
        assert f"({endpoint} gives no answer within 2 s; HF_HUB_ETAG_TIMEOUT=10 waits longer)" in told
        assert seconds < 5


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, code = {"none": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "there": (404, "EntryNotFound")}[
            self.path.split("/")[1]
        ]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        use(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield constants.ENDPOINT
        server.shutdown()


def use(monkeypatch, endpoint):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/model", "{endpoint} shows you none of this name"),
        ("gated/model", "{endpoint} shows it to those who were granted access; log in by `hf auth login`"),
        ("no model at all", "the Hub has no such names"),
    ],
)
def test_answers(name, message, endpoint):
    with pytest.raises(FileNotFoundError) as told:
        here_or_asked(name, "weights")
    assert f"({message.format(endpoint=endpoint)})" in str(told.value)


def test_a_repository_without_the_file_is_one(endpoint):
    assert here_or_asked("there/model", "weights") == "there/model"


def test_a_hub_out_of_reach(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(FileNotFoundError, match=rf"data set 'no/rows': .*\(http://127.0.0.1:{port} cannot be reached"):
        check_hub("no/rows", "dataset")


def test_a_data_set_in_the_cache_is_left_to_its_library(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "some___rows").mkdir()
    check_hub("some/rows", "dataset")
    with pytest.raises(FileNotFoundError, match="data set 'some/others'"):
        check_hub("some/others", "dataset")


def test_folders_and_offline_work_ask_no_one(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *args, **options: pytest.fail("asked"))
    assert here_or_asked("someone/else", "weights") == "someone/else"  # HF_HUB_OFFLINE is set in tests
    check_hub("someone/else")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert here_or_asked(str(tmp_path), "weights") == str(tmp_path)
