// Where one rater's answers are kept: in the browser at once, then in a file to save, or with the server.

const RETRY = 2000; // ms until a server that did not answer is asked again

class Keeping {
  // tell: called with a text and a CSS class whenever the state changes.
  constructor({ id, pairs, server }, tell) {
    Object.assign(this, { id, pairs, server, tell, rater: "", rows: {}, refusal: "", sending: false });
    this.keeps = true; // some browsers refuse storage to a local file
    this.unsaved = 0; // answers since the last file
    this.unsent = new Set(); // names of the pairs that the server does not have yet
  }

  stored(what) {
    try {
      return localStorage.getItem(`prfl-labels/${this.id}/${what}`);
    } catch (error) {
      this.keeps = false;
      return null;
    }
  }

  store(what, value) {
    try {
      localStorage.setItem(`prfl-labels/${this.id}/${what}`, value);
    } catch (error) {
      this.keeps = false;
    }
  }

  // Takes up what this rater answered before.  Throws where the server does not give it.
  async begin(name) {
    const rows = restored(this.stored(`rows/${name}`), this.pairs);
    const names = new Set((this.stored(`unsent/${name}`) || "").split("\n").filter((pair) => rows[pair]));
    if (this.server) {
      const reply = await fetch(`answers?rater=${encodeURIComponent(name)}`);
      if (!reply.ok) throw new Error(await reply.text());
      this.rows = rowsOf(await reply.json(), this.pairs);
      for (const pair of names) this.rows[pair] = rows[pair];
    } else {
      this.rows = rows;
    }
    this.rater = name;
    this.refusal = "";
    this.unsaved = Number(this.stored(`unsaved/${name}`)) || 0;
    this.unsent = this.server ? names : new Set();
    this.store("rater", name);
    this.send();
  }

  put(pair, dimension, choice) {
    this.rows = withChoice(this.rows, pair, dimension, choice);
    this.unsaved += 1;
    if (this.server) this.unsent.add(nameOf(pair));
    this.remember();
    this.send();
  }

  remember() {
    this.store(`rows/${this.rater}`, JSON.stringify(Object.values(this.rows)));
    this.store(`unsent/${this.rater}`, [...this.unsent].join("\n"));
    this.store(`unsaved/${this.rater}`, this.unsaved);
    this.tell(...this.state());
  }

  // Sends pair after pair until the server has them all, and tries again where it does not take one.
  async send() {
    this.tell(...this.state());
    if (this.sending) return;
    this.sending = true;
    while (this.unsent.size > 0) {
      const { rater, rows, unsent } = this; // another person may begin meanwhile
      const [name] = unsent;
      try {
        const body = JSON.stringify(signed(rows[name], rater));
        const reply = await fetch("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body });
        this.refusal = reply.ok ? "" : (await reply.text()).slice(0, 200);
      } catch (error) {
        this.refusal = "the server does not answer";
      }
      const anew = rater === this.rater && rows[name] !== this.rows[name];
      if (this.refusal !== "" || !anew) unsent.delete(name);
      if (this.refusal !== "") unsent.add(name); // at the end: others go before it
      this.store(`unsent/${rater}`, [...unsent].join("\n"));
      this.tell(...this.state());
      if (this.refusal !== "") await new Promise((wake) => setTimeout(wake, RETRY));
    }
    this.sending = false;
  }

  state() {
    const pairs = (count) => `${count} ${count === 1 ? "pair" : "pairs"}`;
    if (this.server) {
      if (this.refusal !== "") return [`${pairs(this.unsent.size)} not saved: ${this.refusal}. Trying again.`, "lost"];
      return this.unsent.size > 0 ? ["Saving ...", ""] : ["Every answer is saved", "safe"];
    }
    if (this.unsaved === 0) return Object.keys(this.rows).length > 0 ? ["Saved in a file", "safe"] : ["", ""];
    if (!this.keeps) return ["Not saved: save the file before you leave", "lost"];
    return ["Kept in this browser, not in a file yet", ""];
  }

  // Writes the file, where answers are not sent anyway.
  save() {
    const text = manifest(this.rows, this.pairs, this.rater);
    if (this.server) return;
    if (text === "") return this.tell("Nothing is answered yet", "lost");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = fileName(this.rater);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    this.unsaved = 0;
    this.remember();
    this.tell(`Saved: ${link.download}`, "safe");
  }

  // Whether closing the page loses an answer.
  get loses() {
    return this.server ? this.unsent.size > 0 : this.unsaved > 0 && !this.keeps;
  }
}
