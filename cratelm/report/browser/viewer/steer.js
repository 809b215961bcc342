"use strict";
/* Neurons turned: what it does to the next token, and the text with and without, as they are written. */

(() => {
  const { h, say, later, troubleBox } = cratelm;
  const { chip, digits, percent, visible } = cratelm.text;

  /** @param {{state: any, text: function(): string}} trial */
  cratelm.steering = ({ state, text }) => {
    const effect = h("div", { class: "effect" }), texts = h("div", { class: "texts" });
    const length = h("input", { type: "number", min: 1, max: state.live.limits.new_tokens, value: Math.min(60, state.live.limits.new_tokens), "aria-label": "Tokens to write" });
    const heat = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0, "aria-label": "Temperature" });
    const button = h("button", { type: "button", class: "choice", on: { click: () => (writing ? stop() : write()) } }, "Write on");
    let asked = 0, writing = null;

    const request = () => ({
      model: state.model.slug, text: text(),
      changes: state.turns.map((one) => ({ layer: one.layer, neuron: one.neuron, how: one.how, strength: one.strength, of_maximum: one.ofMaximum })),
    });

    async function showEffect() {
      const own = ++asked;
      if (!state.turns.length || !text()) {
        effect.replaceChildren();
        return;
      }
      try {
        const found = await cratelm.api.post("effect", request());
        if (own === asked) effect.replaceChildren(...effectOf(found));
      } catch (error) {
        if (own === asked) effect.replaceChildren(troubleBox(error));
      }
    }

    /** The server writes no further. */
    function stop() {
      writing?.abort();
      writing = null;
      button.textContent = "Write on";
    }

    /** Nothing stays of what was asked, and no answer to it comes any more. */
    function clear() {
      asked += 1;
      stop();
      effect.replaceChildren();
      texts.replaceChildren();
    }

    async function write() {
      const own = new AbortController(), model = h("small", {}, state.model.title);
      writing = own;
      button.textContent = "Stop";
      const sides = { plain: h("p", { class: "written" }), steered: h("p", { class: "written" }) };
      texts.replaceChildren(h("div", { class: "side two" },
        h("article", { class: "card" }, h("h3", {}, "As it is", model), sides.plain),
        h("article", { class: "card" }, h("h3", {}, "Turned", model.cloneNode(true)), sides.steered)));
      for (const side of Object.values(sides)) side.append(h("span", { class: "soft" }, visible(text())));
      try {
        await cratelm.api.lines("continue", { ...request(), tokens: Number(length.value), temperature: Number(heat.value) }, (line) => {
          if (own.signal.aborted) return;
          if (line.error) texts.append(troubleBox(new cratelm.Trouble(`${line.error}.`)));
          for (const [name, side] of Object.entries(sides)) if (line[name]) side.append(shown(line[name]));
        }, own.signal);
        say("Both texts are written.");
      } catch (error) {
        if (error.name !== "AbortError") texts.append(troubleBox(error));
      }
      if (writing === own) stop();
    }

    const controls = h("p", { class: "answer" }, button, h("span", { class: "field" }, length, " tokens"), h("span", { class: "field" }, "temperature ", heat));
    return { made: h("div", { class: "made" }, effect, texts), effectSoon: later(250, showEffect), controls, clear };
  };

  /** Written text as it is, but that its line ends can be seen. */
  const shown = (text) => Array.from(text, (letter) => (letter === "\n" ? "↵\n" : letter === " " ? letter : visible(letter))).join("");

  /** Which tokens become more and less likely. */
  function* effectOf(found) {
    yield h("h3", {}, "Next token", h("small", {}, `${percent(found.moved)} % of the probability moves; divergence ${digits(found.divergence)} nats; ${found.changes.join(", ")}`));
    yield h("div", { class: "side three" }, [["rises", "Rises"], ["falls", "Falls"], ["likeliest", "Most likely before"]].map(([name, title]) =>
      h("div", { class: "scroll" }, h("table", { "aria-label": title }, h("thead", {}, h("tr", {}, [title, "before", "after"].map((one, i) => h("th", { scope: "col", class: i ? "n" : null }, one)))),
        h("tbody", {}, found[name].length ? found[name].map((one) => h("tr", {}, h("th", { scope: "row" }, chip(one.text)),
          h("td", { class: "n" }, `${percent(one.before)} %`), h("td", { class: "n" }, `${percent(one.after)} %`))) : h("tr", {}, h("td", { colspan: 3, class: "missing" }, "none")))))));
  }
})();
