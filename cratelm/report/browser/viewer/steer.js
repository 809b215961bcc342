"use strict";
/* Steer neurons: the effect on the next token, and the text continued with and without steering. */

(() => {
  const { h, announce, debounce, errorBox, smallTable } = cratelm;
  const { chip, digits, percent, visible } = cratelm.text;

  /** @param {{state: any, text: function(): string}} page */
  cratelm.steering = ({ state, text }) => {
    const effect = h("div", { class: "effect" }), texts = h("div", { class: "texts" }), most = state.live.limits.new_tokens;
    const length = h("input", { type: "number", min: 1, max: most, value: Math.min(60, most), "aria-label": "Tokens to generate" });
    const temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0, "aria-label": "Temperature" });
    const button = cratelm.button("Continue", () => (running ? stop() : generate()), { class: "choice" });
    let latest = 0, running = null;

    const request = () => ({
      model: state.model.slug, text: text(),
      changes: state.changes.map(({ layer, neuron, how, strength, ofMaximum }) => ({ layer, neuron, how, strength, of_maximum: ofMaximum })),
    });

    async function showEffect() {
      const number = ++latest;
      let shown = [];
      if (state.changes.length && text()) {
        shown = await cratelm.api.post("effect", request()).then((answer) => [...effectTables(answer)], (error) => [errorBox(error)]);
      }
      if (number === latest) effect.replaceChildren(...shown);
    }

    /** Cancel the running request; the server then stops generating. */
    function stop() {
      running?.abort();
      running = null;
      button.textContent = "Continue";
    }

    /** Remove all results and ignore answers that are still under way. */
    function clear() {
      latest += 1;
      stop();
      effect.replaceChildren();
      texts.replaceChildren();
    }

    async function generate() {
      const controller = new AbortController();
      running = controller;
      button.textContent = "Stop";
      const side = (title, output) => h("article", { class: "card" }, h("h3", {}, title, h("small", {}, state.model.title)), output);
      const outputs = { plain: h("p", { class: "written" }), steered: h("p", { class: "written" }) };
      texts.replaceChildren(h("div", { class: "side two" }, side("Without steering", outputs.plain), side("Steered", outputs.steered)));
      for (const output of Object.values(outputs)) output.append(h("span", { class: "soft" }, visible(text())));
      try {
        await cratelm.api.lines("continue", { ...request(), tokens: Number(length.value), temperature: Number(temperature.value) }, (line) => {
          if (controller.signal.aborted) return;
          if (line.error) texts.append(errorBox(new cratelm.PageError(`${line.error}.`)));
          for (const [name, output] of Object.entries(outputs)) if (line[name]) output.append(withLineBreaks(line[name]));
        }, controller.signal);
        announce("Both texts are complete.");
      } catch (error) {
        if (error.name !== "AbortError") texts.append(errorBox(error));
      }
      if (running === controller) stop();
    }

    const controls = h("p", { class: "answer" }, button, h("span", { class: "field" }, length, " tokens"), h("span", { class: "field" }, "temperature ", temperature));
    return { results: h("div", { class: "made" }, effect, texts), effectSoon: debounce(250, showEffect), controls, clear };
  };

  /** Generated text with visible line breaks. */
  const withLineBreaks = (text) => Array.from(text, (letter) => (letter === "\n" ? "↵\n" : letter === " " ? letter : visible(letter))).join("");

  /** Tables of the tokens that become more and less probable. */
  function* effectTables(answer) {
    yield h("h3", {}, "Next token", h("small", {}, `${percent(answer.moved)} % of the probability moves; divergence ${digits(answer.divergence)} nats; ${answer.changes.join(", ")}`));
    yield h("div", { class: "side three" }, [["rises", "More probable"], ["falls", "Less probable"], ["likeliest", "Most probable before"]].map(([name, title]) =>
      smallTable(title, [title, "before", "after"], answer[name].length
        ? answer[name].map(({ text, before, after }) => [chip(text), `${percent(before)} %`, `${percent(after)} %`]) : [["none"]])));
  }
})();
