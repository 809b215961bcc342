"use strict";
/* What a server answers beyond the site's data. Loaded only in a page that a server gave. */

(() => {
  const { Trouble } = cratelm;
  const token = document.querySelector('meta[name="cratelm-token"]').content;

  /** Ask, and say in words what was refused and when to come again. */
  async function ask(address, options = {}) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The server does not answer.", "Is cratelm serve still running? Start it again, then reload this page.");
    }
    if (answer.ok) return answer;
    const said = await answer.json().then((value) => String(value.error)).catch(() => `The server answered ${answer.status}.`);
    const wait = answer.headers.get("retry-after");
    const sentence = said.charAt(0).toUpperCase() + said.slice(1);
    throw new Trouble(/[.!?]$/.test(sentence) ? sentence : `${sentence}.`, wait ? `Try again in ${wait} s.` : "");
  }

  const get = async (address) => (await ask(address)).json();

  const writing = (value, signal) => ({
    method: "POST", signal, headers: { "content-type": "application/json", "x-cratelm-token": token }, body: JSON.stringify(value),
  });

  /** @param {string} name @param {any} value @returns {Promise<any>} */
  const post = async (name, value, signal) => (await ask(`api/${name}`, writing(value, signal))).json();

  /** Call `each` with every line of an answer as it comes. */
  async function lines(name, value, each, signal) {
    const answer = await ask(`api/${name}`, writing(value, signal));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Trouble("The server stopped in the middle of the text.", "Is cratelm serve still running?");
      }
      const all = (rest + (part.value ?? "")).split("\n");
      rest = all.pop();
      for (const line of all.filter(Boolean)) each(JSON.parse(line));
      if (part.done) return;
    }
  }

  /** All votes, some with each answer. */
  async function votes() {
    const found = [];
    for (let after = 0; after !== null;) {
      const page = await get(`api/votes?after=${after}`);
      found.push(...page.votes);
      after = page.next;
    }
    return found;
  }

  // Votes go to the server, so that all who use it vote together.
  cratelm.votes = {
    shared: true,
    all: votes,
    add: async (vote) => { await post("votes", vote); },
    clear: null,
  };

  cratelm.api = { get, post, lines };
})();
