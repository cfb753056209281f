"""The pages in a browser: they run their script alone, find samples, fit a phone, and can be used without a mouse."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .pages import PAGES, make_records, run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
AXE = os.environ.get("PYUNLEARN_AXE")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module", params=PAGES)
def page(request) -> str:
    return PAGES[request.param]()


@pytest.fixture(scope="module")
def samples() -> str:
    """The page of a run."""
    return run_page()


def browse(page: str, folder: Path) -> tuple[str, str]:
    """The document after its scripts, and what the browser logged."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--hide-scrollbars", "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *options, file.as_uri()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def ask(page: str, folder: Path, script: str, width: int = 1280) -> Any:
    """What an (async) script's `return` gives in a copy of the page, which lets scripts of others in.

    It is in a frame, since a window may not be as narrow as a phone.
    """
    tell = f"""<script>
        const tell = (told) => parent.document.querySelector("#told").textContent = JSON.stringify(told);
        (async () => {{ {script} }})().then(tell, (error) => tell(String(error)));</script>"""
    asked = html.escape(POLICY.sub("", page).replace("</body>", f"{tell}</body>"))
    frame = f'<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{asked}"></iframe>'
    document, _ = browse(f'<!doctype html><meta charset="utf-8"><pre id="told"></pre>{frame}', folder)
    told = re.search(r'<pre id="told">(.*?)</pre>', document, re.DOTALL)
    assert told, document[-2000:]
    return json.loads(html.unescape(told[1]))


@in_browser
def test_the_console_is_clean(page, tmp_path):
    document, logged = browse(page, tmp_path)
    assert "<h1>" in document
    assert not [line for line in logged.splitlines() if "CONSOLE" in line]
    assert 'data-copies="" hidden' not in document  # its script has run, under its own policy


@in_browser
def test_no_other_script_runs(page, tmp_path):
    document, logged = browse(page.replace("</body>", "<script>document.title = 'taken'</script></body>"), tmp_path)
    assert "<title>taken" not in document
    assert "Content Security Policy" in logged


STRUCTURE = """
    const name = (element) => element.outerHTML.slice(0, 120), every = (query) => [...document.querySelectorAll(query)];
    for (const details of every("details")) details.open = true;
    const ids = every("[id]").map((element) => element.id);
    return {
      width: [document.documentElement.scrollWidth, innerWidth],
      beyond: every("main *").filter((part) => part.getBoundingClientRect().right > innerWidth + 1
        && !part.closest(".scroll, pre, svg")).map(name),
      landmarks: [every("main").length, every("h1").length],
      twice: ids.filter((id, i) => ids.indexOf(id) !== i),
      unlabelled: every("input, select").filter((control) => !control.labels.length).map(name),
      unnamed: every("svg, [role=region]").filter((part) => !part.getAttribute("aria-label")).map(name),
      unreachable: every("main *").filter((box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowX)
        && box.scrollWidth > box.clientWidth && box.tabIndex < 0).map(name),
      slugs: every("main :not(pre, code)").filter((part) => /^[a-z]+_[a-z_]+$/.test(part.textContent)).map(name),
      figures: every("figure").length, data: every('figure a[download$=".csv"][href^="data:text/csv"]').length,
    };"""


@in_browser
def test_it_fits_a_phone_and_needs_no_mouse(page, tmp_path):
    found = ask(page, tmp_path, STRUCTURE, width=390)
    assert found["width"] == [390, 390], found["beyond"]
    assert found["landmarks"] == [1, 1]
    assert found["figures"] == found["data"] > 0
    for wrong in ("twice", "unlabelled", "unnamed", "unreachable", "slugs"):
        assert found[wrong] == [], wrong


EXPLORE = """
    const form = document.querySelector("#find"), more = document.querySelector("#more");
    const seen = () => [...document.querySelectorAll(".sample")].filter((each) => !each.hidden);
    const look = (values) => {
      form.reset();
      for (const [name, value] of Object.entries(values)) {
        if (typeof value === "boolean") form.elements[name].checked = value; else form.elements[name].value = value;
      }
      form.elements.text.dispatchEvent(new InputEvent("input", { bubbles: true }));
      return seen().map((each) => each.querySelector("b").textContent.split(":")[0]);
    };
    const told = {
      first: [seen().length, more.hidden, form.querySelector("output").textContent],
      forgotten: look({ state: "forgotten" }), known: look({ state: "known", set: "forget" }),
      changed: look({ state: "changed", by: "before", down: true }), text: look({ text: " RETAIN   question 7:" }),
      rising: look({ set: "retain", by: "after" }), words: look({ set: "forget", by: "words" }),
    };
    look({});
    more.click();
    told.all = [seen().length, more.hidden];
    const [one] = document.querySelectorAll('.sample[data-tokens]');
    one.open = true;
    await new Promise((done) => setTimeout(done, 100));
    const lines = [...one.querySelectorAll(".tokens")];
    told.lines = lines.map((line) => line.previousElementSibling.textContent);
    told.answer = one.querySelector("dd").textContent;
    told.tokens = lines.map((line) => line.textContent);
    told.chances = lines.map((line) => line.firstChild.title);
    told.shades = lines.map((line) => getComputedStyle(line.firstChild).backgroundColor);
    told.question = one.querySelector("b").textContent;
    return told;"""


@in_browser
def test_samples_are_found(samples, tmp_path):
    told = ask(samples, tmp_path, EXPLORE)
    assert told["first"] == [50, False, "76 found, 50 shown"]
    assert told["all"] == [76, True]
    gone = [f"forget question {i}" for i in (1, 2, 4, 5)]
    assert told["forgotten"] == gone
    assert told["known"] == ["forget question 0", "forget question 3"]
    assert told["changed"] == gone[::-1]
    assert told["text"] == ["retain question 7"]
    assert told["rising"] == [f"retain question {i}" for i in range(50)]
    records = make_records({"forget": 6, "retain": 70})["after"]["forget"]
    asked = sorted((0, 2, 4), key=lambda i: records[i]["rouge_l"])
    assert told["words"] == [f"forget question {i}" for i in (*asked, 1, 3, 5)]  # who was not asked comes last
    assert told["lines"] == ["tokens before", "tokens after", "tokens retrained"]
    assert told["tokens"] == [f"{told['answer']}</s>"] * 3
    assert told["question"].startswith("forget question 1")
    before, after, _ = (float(chance.removeprefix("p = ")) for chance in told["chances"])
    assert before > after
    assert told["shades"][0] != told["shades"][1]


def test_without_a_script_all_samples_are_there(samples):
    assert samples.count('<details class="sample"') == 76
    assert samples.count('<details class="sample" open') == 3
    assert "76 samples; 38 of them were asked to write an answer." in samples
    assert '<form id="find" role="search" aria-labelledby="what-it-says" hidden>' in samples
    assert "<del>Ada wrote 2 plays.</del><ins>I do not know that, sorry.</ins>" in samples
    assert "<b>bold" not in samples


@in_browser
@pytest.mark.skipif(AXE is None, reason="PYUNLEARN_AXE does not name a file of axe-core (axe.min.js)")
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_barrier(page, tmp_path, width):
    axe = Path(str(AXE)).read_text(encoding="utf-8").replace("</script", "<\\/script")
    script = """for (const details of document.querySelectorAll("details")) details.open = true;
        const { violations } = await axe.run();
        return violations.map(({ id, impact, nodes }) => [id, impact, ...nodes.map((node) => node.html)]);"""
    found = ask(page.replace("</head>", f"<script>{axe}</script></head>"), tmp_path, script, width)
    assert [each for each in found if each[1] in ("serious", "critical")] == []
