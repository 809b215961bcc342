"use strict";
/* Requests to `cratelm serve` beyond the site's data. Loaded only by pages that it serves. */

(() => {
  const { Trouble } = cratelm;
  const token = document.querySelector('meta[name="cratelm-token"]').content;

  /** Send a request; a refusal is thrown as `Trouble` with the reason and when to retry. */
  async function ask(address, options = {}) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The server does not answer.", "Is cratelm serve still running? Start it again, then reload this page.");
    }
    if (answer.ok) return answer;
    const reason = await answer.json().then((value) => String(value.error)).catch(() => `The server answered ${answer.status}.`);
    const wait = answer.headers.get("retry-after");
    const sentence = reason.charAt(0).toUpperCase() + reason.slice(1);
    throw new Trouble(/[.!?]$/.test(sentence) ? sentence : `${sentence}.`, wait ? `Try again in ${wait} s.` : "");
  }

  const get = async (address) => (await ask(address)).json();

  const postOptions = (value, signal) => ({
    method: "POST", signal, headers: { "content-type": "application/json", "x-cratelm-token": token }, body: JSON.stringify(value),
  });

  /** @param {string} name @param {any} value @returns {Promise<any>} */
  const post = async (name, value, signal) => (await ask(`api/${name}`, postOptions(value, signal))).json();

  /** Call `each` with every line of JSON as it arrives. */
  async function lines(name, value, each, signal) {
    const answer = await ask(`api/${name}`, postOptions(value, signal));
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

  /** All votes, read page by page. */
  async function votes() {
    const all = [];
    for (let after = 0; after !== null;) {
      const page = await get(`api/votes?after=${after}`);
      all.push(...page.votes);
      after = page.next;
    }
    return all;
  }

  // Votes are shared: all users of the server see the same votes.
  cratelm.votes = {
    shared: true,
    all: votes,
    add: async (vote) => { await post("votes", vote); },
    clear: null,
  };

  cratelm.api = { get, post, lines };
})();
