"use strict";
/* Neurons turned: what it does to the next token, and the text with and without, as they are written. */

(() => {
  const { h, say, later, troubleBox } = cratelm;
  const { chip, digits, percent, visible } = cratelm.text;

  /** @param {{state: any, made: HTMLElement, text: function(): string}} trial */
  cratelm.steering = ({ state, made, text }) => {
    const effect = h("div", { class: "effect" }), texts = h("div", { class: "texts" });
    made.replaceChildren(effect, texts);
    const length = h("input", { type: "number", min: 1, max: state.live.limits.new_tokens, value: Math.min(60, state.live.limits.new_tokens), "aria-label": "Tokens to write" });
    const heat = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0, "aria-label": "Temperature" });
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
      if (!made.contains(effect)) made.replaceChildren(effect, texts);
      try {
        const found = await cratelm.api.post("effect", request());
        if (own === asked) effect.replaceChildren(...effectOf(found));
      } catch (error) {
        if (own === asked) effect.replaceChildren(troubleBox(error));
      }
    }

    async function write(button) {
      if (writing) {
        writing.abort();
        return;
      }
      writing = new AbortController();
      button.textContent = "Stop";
      const sides = { plain: h("p", { class: "written" }), steered: h("p", { class: "written" }) };
      texts.replaceChildren(h("div", { class: "side two" },
        h("article", { class: "card" }, h("h3", {}, "As it is"), sides.plain),
        h("article", { class: "card" }, h("h3", {}, "Turned"), sides.steered)));
      for (const side of Object.values(sides)) side.append(h("span", { class: "soft" }, visible(text())));
      try {
        await cratelm.api.lines("continue", { ...request(), tokens: Number(length.value), temperature: Number(heat.value) }, (line) => {
          if (line.error) texts.append(troubleBox(new cratelm.Trouble(`${line.error}.`)));
          for (const [name, side] of Object.entries(sides)) if (line[name]) side.append(shown(line[name]));
        }, writing.signal);
        say("Both texts are written.");
      } catch (error) {
        if (error.name !== "AbortError") texts.append(troubleBox(error));
      }
      writing = null;
      button.textContent = "Write on";
    }

    function controls() {
      const button = h("button", { type: "button", class: "choice", on: { click: () => write(button) } }, writing ? "Stop" : "Write on");
      return h("p", { class: "answer" }, button, h("span", { class: "field" }, length, " tokens"), h("span", { class: "field" }, "temperature ", heat));
    }

    return { effectSoon: later(250, showEffect), controls };
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
