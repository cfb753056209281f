"use strict";
(() => {
  for (const button of document.querySelectorAll("button[data-copies]")) {
    const list = button.parentElement.querySelector("dl"), name = button.textContent;
    button.hidden = false;
    button.addEventListener("click", async () => {
      const lines = [...list.querySelectorAll("dt")].map((term) => `${term.textContent}: ${term.nextElementSibling.textContent}`);
      try {
        await navigator.clipboard.writeText(lines.join("\n"));
        button.textContent = "Copied";
      } catch { // a page that may not: the reader can
        getSelection().selectAllChildren(list);
        button.textContent = "Selected, to be copied";
      }
      setTimeout(() => { button.textContent = name; }, 2000);
    });
  }

  const list = document.querySelector("#samples");
  if (list) explore(list, document.querySelector("#find"), document.querySelector("#more"));

  function oneSpaced(text) {
    return text.trim().replace(/\s+/g, " ").toLowerCase();
  }

  // Without this script all samples are there, as a list; with it a page of them at a time.
  function explore(list, form, more) {
    const PAGE = 50, CHANGED = 0.1;
    let most = PAGE;
    const samples = [...list.children].map((element, place) => {
      const { set, state, before, after, words, length } = element.dataset;
      const numbers = { place, before: +before, after: +after, change: after - before, words: +(words ?? NaN), length: +length };
      return { element, set, state, ...numbers, text: oneSpaced(element.textContent) };
    });

    function update() {
      const asked = Object.fromEntries(new FormData(form)), text = oneSpaced(asked.text), sign = asked.down ? -1 : 1;
      const found = samples.filter((sample) =>
        (!asked.set || sample.set === asked.set) &&
        (!asked.state || sample.state === asked.state || (asked.state === "changed" && Math.abs(sample.change) >= CHANGED)) &&
        sample.text.includes(text));
      found.sort((a, b) => {
        const [x, y] = [a[asked.by], b[asked.by]];
        return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || a.place - b.place; // without a value: last
      });
      for (const sample of samples) sample.element.hidden = true;
      for (const { element } of found.slice(0, most)) {
        element.hidden = false;
        if (asked.open) element.open = true;
        list.append(element);
      }
      form.querySelector("output").textContent = `${found.length} found` + (found.length > most ? `, ${most} shown` : "");
      more.hidden = found.length <= most;
    }

    form.addEventListener("input", (event) => {
      most = PAGE;
      if (event.target.name === "open" && !event.target.checked) for (const { element } of samples) element.open = false;
      update();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { most += PAGE; update(); });
    list.addEventListener("toggle", (event) => shade(event.target), true);
    for (const { element } of samples) if (element.open) shade(element);
    form.hidden = false;
    update();
  }

  // The right answer's tokens before and after, when a sample is first opened.
  function shade(sample) {
    if (!sample.open || !sample.dataset.tokens) return;
    const { tokens, ...moments } = JSON.parse(sample.dataset.tokens), list = sample.querySelector("dl");
    delete sample.dataset.tokens;
    for (const [moment, surprises] of Object.entries(moments)) {
      const [term, line] = ["dt", "dd"].map((tag) => list.appendChild(document.createElement(tag)));
      term.textContent = `tokens ${moment}`;
      line.className = "tokens";
      tokens.forEach((token, i) => {
        const span = line.appendChild(document.createElement("span"));
        span.textContent = i ? token : token.trimStart();
        span.title = `p = ${Math.exp(-surprises[i] / 100).toPrecision(3)}`;
        span.style.background = `rgb(59 130 246 / ${0.5 * Math.max(0, 1 - surprises[i] / 800)})`;
      });
    }
  }
})();
