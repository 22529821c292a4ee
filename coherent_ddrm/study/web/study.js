// The study's page. `known` is what the page was made with; a backend keeps the answers: the server, or this browser.
"use strict";
(() => {
  const known = JSON.parse(document.getElementById("study").textContent);
  const at = (id) => document.getElementById(id);
  const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right" };
  const PAUSE = 160; // ms that a choice stays marked; also keeps a double click from answering the next question

  // -- where answers go: { resume() -> sheet or null, begin() -> sheet, save(answer) -> answered, leave() } ------------

  const store = {
    name: `coherent-study-${known.study}`,
    get() {
      try { return JSON.parse(localStorage.getItem(this.name)); } catch { return null; }
    },
    set(value) {
      try { localStorage.setItem(this.name, JSON.stringify(value)); return true; } catch { return false; }
    },
    clear() {
      try { localStorage.removeItem(this.name); } catch { /* nothing was kept */ }
    },
  };

  const hash = (name) => new URLSearchParams(location.hash.slice(1)).get(name);

  const server = {
    token: null,
    async call(path, more = {}) {
      const headers = { "content-type": "application/json" };
      if (this.token) headers.authorization = `Bearer ${this.token}`;
      const response = await fetch(path, { ...more, headers }).catch(() => {
        throw new Error("the server cannot be reached");
      });
      const body = await response.json();
      if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
      return body;
    },
    async resume() {
      this.token = [hash("rater"), store.get()].find((token) => /^[0-9a-f]{32}$/.test(token)) ?? null;
      if (!this.token) return null;
      try {
        const sheet = await this.call("api/sheet");
        this.remember();
        return sheet;
      } catch (error) {
        if (error.status !== 401) throw error;
        this.leave(); // a token of another study, or of one made anew
        return null;
      }
    },
    async begin() {
      this.token = (await this.call("api/raters", { method: "POST", body: "{}" })).rater;
      this.remember();
      return this.call("api/sheet");
    },
    async save(answer) {
      try {
        return (await this.call("api/answers", { method: "POST", body: JSON.stringify(answer) })).answered;
      } catch (error) {
        if (error.status !== 409) throw error;
        return (await this.call("api/sheet")).answered; // answered already: sent twice, or in another window
      }
    },
    remember() {
      store.set(this.token);
      history.replaceState(null, "", `#rater=${this.token}`);
    },
    leave() {
      this.token = null;
      store.clear();
      history.replaceState(null, "", location.pathname);
    },
  };

  const browser = {
    state: null,
    sheet() {
      return { questions: known.sheets[this.state.sheet], answered: this.state.answers.length };
    },
    async resume() {
      this.state = store.get();
      return this.state ? this.sheet() : null;
    },
    async begin() {
      const random = crypto.getRandomValues(new Uint32Array(5));
      const wanted = Number(hash("sheet") ?? NaN);
      const sheet = known.sheets[wanted] ? wanted : random[4] % known.sheets.length;
      const rater = [...random.slice(0, 4)].map((word) => word.toString(16).padStart(8, "0")).join("");
      this.state = { rater, sheet, answers: [] };
      if (!store.set(this.state)) throw new Error("this browser keeps nothing for this page; allow it to store data");
      return this.sheet();
    },
    async save(answer) {
      this.state = store.get() ?? this.state; // another window may have gone on
      if (answer.position === this.state.answers.length) {
        this.state.answers.push(answer);
        if (!store.set(this.state)) throw new Error("this browser could not keep the answer");
      }
      return this.state.answers.length;
    },
    file() {
      return JSON.stringify({ version: 1, study: known.study, ...this.state }, null, 1);
    },
    leave() {
      store.clear();
      this.state = null;
    },
  };

  const backend = known.mode === "server" ? server : browser;

  // -- what is shown ---------------------------------------------------------------------------------------------------

  let questions = [];
  let position = 0;
  let shownAt = null; // null while no answer is taken: pictures still loading, or one just given

  function show(name) {
    for (const id of ["start", "ask", "end", "trouble"]) at(id).hidden = id !== name;
  }

  function trouble(error, again) {
    at("trouble-text").textContent = `That did not work: ${error.message}. Your earlier answers are kept.`;
    at("again").onclick = again;
    show("trouble");
    at("again").focus();
  }

  function open(yes) {
    shownAt = yes ? performance.now() : null;
    at("ask").setAttribute("aria-busy", String(!yes));
  }

  const source = (id) => `pictures/${id}.png`;

  function enter(sheet) {
    questions = sheet.questions;
    return ask(sheet.answered);
  }

  async function ask(next) {
    position = next;
    if (position >= questions.length) return finish();
    open(false);
    show("ask");
    at("ask").className = "loading";
    for (const side of ["left", "right"]) at(side).classList.remove("chosen");
    at("count").textContent = `Question ${position + 1} of ${questions.length}`;
    at("progress").max = questions.length;
    at("progress").value = position;
    const pictures = ["truth", "input", "left", "right"].map((part) => {
      const image = at(part === "left" || part === "right" ? `${part}-picture` : part);
      image.src = source(questions[position][part]);
      return image;
    });
    try {
      await Promise.all(pictures.map((image) => image.decode()));
    } catch {
      return trouble(new Error("a picture could not be loaded"), () => ask(position));
    }
    fit();
    at("ask").classList.remove("loading");
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done))); // until they are painted
    open(true);
    for (const part of Object.values(questions[position + 1] ?? {})) new Image().src = source(part);
  }

  // A picture pixel takes a whole number of screen pixels where there is room, so that small pictures stay sharp.
  function fit() {
    const { naturalWidth: width, naturalHeight: height } = at("left-picture");
    if (!width) return;
    const ask = at("ask");
    const whole = (scale) => {
      const dots = Math.max(scale, 64 / Math.max(width, height)) * devicePixelRatio;
      return (dots >= 1 ? Math.floor(dots) : dots) / devicePixelRatio;
    };
    const wide = (ask.clientWidth - 90) / 2 / width;
    const high = (innerHeight - 195) / 1.5 / height; // 195: all that is no picture
    const scale = whole(Math.min(wide, high));
    const small = whole(scale / 2);
    for (const [selector, factor] of [["#left-picture, #right-picture", scale], ["#truth, #input", small]]) {
      for (const image of ask.querySelectorAll(selector)) {
        image.style.setProperty("--width", `${width * factor}px`);
        image.style.setProperty("--height", `${height * factor}px`);
      }
    }
    ask.classList.toggle("pixels", scale * devicePixelRatio >= 2);
  }

  async function choose(side) {
    if (shownAt === null || at("ask").hidden) return;
    const answer = { position, choice: side, milliseconds: Math.min(86400000, Math.round(performance.now() - shownAt)) };
    open(false);
    at(side).classList.add("chosen");
    at("ask").classList.add("given");
    await keep(answer);
  }

  async function keep(answer) {
    try {
      const [answered] = await Promise.all([backend.save(answer), new Promise((done) => setTimeout(done, PAUSE))]);
      await ask(answered);
    } catch (error) {
      trouble(error, error.status === 401 ? start : () => keep(answer)); // 401: the sheet went to another rater
    }
  }

  function finish() {
    const file = backend.file?.();
    at("kept").textContent = file
      ? "All questions are answered. Please download the file with your answers and send it to whoever asked you."
      : "All questions are answered and your answers are kept. You may close this page.";
    if (file) {
      at("download").href = URL.createObjectURL(new Blob([file], { type: "application/json" }));
      at("download").download = `answers-${backend.state.rater.slice(0, 8)}.json`;
      at("download").hidden = false;
    }
    show("end");
  }

  function welcome() {
    show("start");
    at("begin").focus();
  }

  async function start() {
    try {
      const sheet = await backend.resume();
      if (sheet) await enter(sheet);
      else welcome();
    } catch (error) {
      trouble(error, start);
    }
  }

  async function begin() {
    at("begin").disabled = true;
    try {
      await enter(await backend.begin());
    } catch (error) {
      trouble(error, start);
    } finally {
      at("begin").disabled = false;
    }
  }

  document.title = known.title;
  for (const [name, text] of [["title", known.title], ["prompt", known.prompt]]) {
    for (const element of document.getElementsByClassName(name)) element.textContent = text;
  }
  at("total").textContent = known.total;
  at("resume").textContent = known.mode === "server"
    ? "open this page again, or the link that your browser will show, to go on where you were"
    : "open this page again in the same browser to go on where you were";
  at("begin").onclick = begin;
  at("another").onclick = () => { backend.leave(); welcome(); };
  for (const side of ["left", "right"]) at(side).onclick = () => choose(side);
  addEventListener("keydown", (event) => {
    const side = KEYS[event.key];
    if (!side || at("ask").hidden || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(side);
  });
  addEventListener("resize", fit);
  start();
})();
