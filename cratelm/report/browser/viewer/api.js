"use strict";
/* Requests to `cratelm serve` other than for the site's data. Loaded only by served pages. */

(() => {
  const { PageError } = cratelm;
  const { ask } = cratelm.data;
  const token = document.querySelector('meta[name="cratelm-token"]').content;

  const get = async (address) => (await ask(address)).json();

  const postOptions = (value, signal) => ({
    method: "POST", signal, headers: { "content-type": "application/json", "x-cratelm-token": token }, body: JSON.stringify(value),
  });

  /** @param {string} name @param {any} value @returns {Promise<any>} */
  const post = async (name, value, signal) => (await ask(`api/${name}`, postOptions(value, signal))).json();

  /** Call `each` with the value of every line of JSON as it arrives. */
  async function lines(name, body, each, signal) {
    const answer = await ask(`api/${name}`, postOptions(body, signal));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value: part = "", done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new PageError("The server stopped while it generated the text.", "Is cratelm serve still running?");
      });
      const complete = (rest + part).split("\n");
      rest = complete.pop();
      for (const line of complete.filter(Boolean)) each(JSON.parse(line));
      if (done) return;
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

  // All users of the server share their votes.
  cratelm.votes = { shared: true, all: votes, add: (vote) => post("votes", vote), clear: null };

  cratelm.api = { get, post, lines };
})();
