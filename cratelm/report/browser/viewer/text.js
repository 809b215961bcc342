"use strict";
/* Numbers and text of a corpus as a person reads them. */

(() => {
  const { h } = cratelm;
  const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
  const JOINERS = new Set(["\u200c", "\u200d"]);

  /** What stands for a letter that cannot be seen or that reorders its line; empty for one that can be seen. */
  function sign(letter) {
    if (letter === "\n") return "↵";
    if (letter === "\t") return "⇥";
    if (letter === "\r") return "␍";
    if (!INVISIBLE.test(letter) || JOINERS.has(letter)) return "";
    return `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  }

  /** Text of a corpus on one line, signs for what is invisible. */
  function visible(text) {
    if (!INVISIBLE.test(text)) return text;
    return Array.from(text, (letter) => sign(letter) || letter).join("");
  }

  /** The same as nodes, with the signs set apart. */
  function marked(text) {
    const parts = [];
    let plain = "";
    for (const letter of text) {
      const shown = sign(letter);
      if (!shown) {
        plain += letter;
        continue;
      }
      if (plain) parts.push(plain);
      plain = "";
      parts.push(h("b", {}, shown));
    }
    if (plain) parts.push(plain);
    return parts;
  }

  /** A token in a list: spaces only are drawn, others keep their text. */
  function legible(token) {
    return /^ *$/.test(token) ? "␣".repeat(token.length) || "(empty)" : visible(token);
  }

  /** Spaces that no letter follows are seen: four of them or fewer one by one, more by their number. */
  const spaced = (text) => text.replace(/ {2,}| +$/g, (run) => (run.length <= 4 ? "␣".repeat(run.length) : `␣×${run.length}`));

  /** A token as a chip, its leading space shown faintly. */
  function chip(token, attributes = {}) {
    const leading = /^ (?=[^ ])/.test(token);
    return h("span", { class: "chip", dir: "ltr", ...attributes },
      leading ? h("i", {}, "␣") : "", spaced(leading ? visible(token.slice(1)) : legible(token)));
  }

  const minus = (text) => text.replace("-", "\u2212");

  /** So many significant digits, no exponent for everyday sizes. */
  function digits(value, count = 3) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(count - 1));
    const rounded = Number(value.toPrecision(count));
    return minus(Math.abs(rounded) >= 1000 ? rounded.toLocaleString("en") : String(rounded));
  }

  /** The shortest text that stands for this float32 and no other. */
  function exact(value) {
    for (let count = 6; count <= 9; count += 1) {
      const text = value.toPrecision(count);
      if (Math.fround(Number(text)) === Math.fround(value)) return minus(String(Number(text)));
    }
    return minus(String(value));
  }

  /** A correlation as points, one decimal. */
  function points(correlation) {
    if (correlation === null || correlation === undefined || Number.isNaN(correlation)) return "\u2013";
    const text = (100 * correlation).toFixed(1);
    return minus(Number(text) === 0 ? "0.0" : text);
  }

  /** A share as per cent. */
  function percent(share) {
    if (share === null || share === undefined || Number.isNaN(share)) return "\u2013";
    const value = 100 * share;
    return value === 0 ? "0" : value >= 0.1 ? value.toFixed(1) : digits(value, 1);
  }

  const count = (number) => number.toLocaleString("en");

  /** Why a neuron has no score, or which state it is in, as a sentence. */
  const STATES = new Map([
    ["scored", "Scored."],
    ["dead", "Dead: it never fired in the whole collected text."],
    ["too rare", "Too rare: it fired in fewer documents than the protocol needs to explain it and to score it."],
    ["constant activations", "Not scored: its activation is the same on every scored token, so no correlation is defined."],
    ["constant simulation", "Not scored: its explanation predicts the same on every scored token, so no correlation is defined."],
    ["not simulated", "Not scored: nothing was simulated for it."],
    ["not scored", "Not scored yet."],
    ["no record", "No record: the files it was imported from do not have it."],
  ]);
  const state = (reason) => STATES.get(reason) ?? `Not scored: ${reason}.`;

  /** How an explainer and simulator are called on the page. */
  function byWhom(set) {
    const drawn = set.sample ? `, sample ${set.sample}` : "";
    return `${set.explainer}${set.simulator ? `, simulated by ${set.simulator}` : ""}${drawn}`;
  }

  cratelm.text = { sign, visible, marked, legible, chip, digits, exact, points, percent, count, state, byWhom };
})();
