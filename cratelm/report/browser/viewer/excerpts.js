"use strict";
/* Excerpts: every token on the colour of its activation, with the exact value for pointer and keyboard. */

(() => {
  const { h, memory } = cratelm;
  const { marked, visible, exact, digits } = cratelm.text;
  const LEVELS = 8;

  /** Shade of a token, 1 to 8, by its activation in units of the neuron's largest; warm above 0, blue below. */
  function shade(value, scale) {
    if (!value || !Number.isFinite(value) || !(scale > 0)) return "";
    const level = Math.min(LEVELS, Math.max(1, Math.ceil((LEVELS * Math.abs(value)) / scale)));
    return `${value > 0 ? "h" : "b"}${level}`;
  }

  /** The unit of the colours: the neuron's largest activation, either way from 0. */
  const scaleOf = (statistics) => Math.max(Math.abs(statistics.maximum ?? 0), Math.abs(statistics.minimum ?? 0));

  function showTip(token, excerpt, at, tell) {
    const tip = document.getElementById("tip");
    tip.replaceChildren(h("b", {}, visible(excerpt.tokens[at])), h("span", {}, tell(excerpt.values[at])),
      excerpt.predicted ? h("i", {}, `predicted ${digits(excerpt.predicted[at])}`) : "");
    tip.hidden = false;
    const own = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(own.left + own.width / 2 - size.width / 2, 6), innerWidth - size.width - 6);
    const above = own.top - size.height - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : own.bottom + 6) + scrollY}px`;
  }

  function hideTip() {
    document.getElementById("tip").hidden = true;
  }

  /**
   * One excerpt. One token of it can be reached with Tab, the strongest; arrows lead to the others.
   * @param {any} excerpt @param {number} scale @param {function(number): string} [tell] how a value is written
   */
  function excerptBox(excerpt, scale, tell = exact) {
    let peak = 0;
    excerpt.values.forEach((value, i) => { if (value > excerpt.values[peak]) peak = i; });
    const tokens = excerpt.tokens.map((text, i) => h("span", {
      class: shade(excerpt.values[i], scale) || null, tabindex: i === peak ? "0" : "-1", data: { at: i },
    }, marked(text)));
    const box = h("div", {
      class: "excerpt", dir: "ltr", role: "group", translate: "no",
      "aria-label": `Excerpt of document ${excerpt.document}; strongest on ${visible(excerpt.tokens[peak])}, ${tell(excerpt.values[peak])}. Arrows read the value of each token.`,
    }, tokens);
    const place = (event) => {
      const token = event.target.closest("[data-at]");
      return token ? Number(token.dataset.at) : -1;
    };
    const show = (event) => {
      const at = place(event);
      if (at >= 0) showTip(tokens[at], excerpt, at, tell);
    };
    box.addEventListener("pointerover", show);
    box.addEventListener("pointerleave", hideTip);
    box.addEventListener("focusin", (event) => {
      const at = place(event);
      if (at < 0) return;
      tokens[at].setAttribute("aria-label", `${visible(excerpt.tokens[at])} ${tell(excerpt.values[at])}${excerpt.predicted ? `, predicted ${digits(excerpt.predicted[at])}` : ""}`);
      tokens[at].setAttribute("aria-describedby", "tip");
      showTip(tokens[at], excerpt, at, tell);
    });
    box.addEventListener("focusout", hideTip);
    box.addEventListener("keydown", (event) => {
      const to = { ArrowRight: place(event) + 1, ArrowLeft: place(event) - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      tokens[Math.min(Math.max(to, 0), tokens.length - 1)].focus();
    });
    if (!excerpt.predicted) return box;
    // The same text once more, on the colours of what the explanation predicts; shown when it is asked for.
    return h("div", { class: "pair" }, box, h("div", { class: "excerpt predicted", dir: "ltr", translate: "no", "aria-hidden": "true" },
      excerpt.tokens.map((text, i) => h("span", { class: shade(excerpt.predicted[i], scale) || null }, marked(text)))));
  }

  /** A switch for what the explanation predicts; remembered. */
  function predictions(by) {
    const box = h("input", { type: "checkbox", checked: memory.read("predicted") === "yes" });
    const apply = () => document.documentElement.classList.toggle("predicts", box.checked);
    box.addEventListener("change", () => {
      memory.write("predicted", box.checked ? "yes" : "no");
      apply();
    });
    apply();
    return h("label", { class: "predictions" }, box, ` Below each scored excerpt, what the explanation predicts (${by})`);
  }

  /** How to read the colours, in the neuron's own numbers unless told otherwise. */
  function legend(statistics, tell = exact, unit = "the model's own units; a token without colour is 0") {
    const scale = scaleOf(statistics), below = statistics.minimum < 0;
    const steps = (letter, levels) => levels.map((level) => h("i", { class: `${letter}${level}` }));
    const up = [1, 2, 3, 4, 5, 6, 7, 8];
    return h("p", { class: "legend" },
      below && [h("span", {}, tell(-scale)), h("span", { class: "scale", "aria-hidden": "true" }, steps("b", up.toReversed()))],
      h("span", {}, "0"), h("span", { class: "scale", "aria-hidden": "true" }, steps("h", up)), h("span", {}, tell(scale)),
      h("span", { class: "soft" }, unit));
  }

  cratelm.excerpts = { excerptBox, predictions, legend, scaleOf, shade, hideTip };
})();
