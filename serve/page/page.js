"use strict";
// Two conversations side by side over the endpoint's own API. No library, no build step, nothing from elsewhere.

const at = (id) => document.getElementById(id);
const NONE = "";  // the second pane may be off
let key = sessionStorage.getItem("ftray-key") || "";
let running = null;  // AbortController of the answers in the making

const panes = [1, 2].map((n) => ({
  model: at(`model-${n}`),
  log: at(`log-${n}`),
  speed: at(`speed-${n}`),
  title: at(`title-${n}`),
  turns: [],
}));

// ------------------------------------------------------------------------------------------------------- the endpoint

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // what refused was not the endpoint: its status says all there is
  }
  const wait = response.headers.get("retry-after");
  return new Refused(response.status, wait ? `${message} (in ${wait} s)` : message);
}

async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data.map((model) => model.id);
}

// Yields the messages of a streamed answer. Throws when it breaks off: its end is [DONE] and nothing else.
async function* stream(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      yield message;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ a pane

function line(pane, kind, text) {
  const atEnd = pane.log.scrollHeight - pane.log.scrollTop - pane.log.clientHeight < 40;
  const p = document.createElement("p");
  p.className = kind;
  p.textContent = text;
  pane.log.append(p);
  if (atEnd) pane.log.scrollTop = pane.log.scrollHeight;
  return p;
}

function append(pane, p, text) {
  const atEnd = pane.log.scrollHeight - pane.log.scrollTop - pane.log.clientHeight < 40;
  p.append(text);
  if (atEnd) pane.log.scrollTop = pane.log.scrollHeight;
}

function showSpeed(pane, facts) {
  pane.speed.replaceChildren(
    ...Object.entries(facts).map(([name, value]) => {
      const pair = document.createElement("div");
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      pair.append(dt, dd);
      return pair;
    }),
  );
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

// Clock of one answer. The first token's time is the wait; the others' is the speed.
function clock(pane) {
  const began = performance.now();
  let first = null, last = began, tokens = 0;
  const facts = () => ({
    "first token": first === null ? "…" : seconds(first - began),
    "tokens/s": tokens > 1 && last > first ? ((tokens - firstTokens) / ((last - first) / 1000)).toFixed(1) : "…",
    tokens: String(tokens),
  });
  let firstTokens = 0;
  showSpeed(pane, facts());
  return {
    tick(count) {
      last = performance.now();
      if (first === null && count > 0) {
        first = last;
        firstTokens = count;
      }
      tokens = count;
      showSpeed(pane, facts());
    },
    facts,
  };
}

async function answer(pane, question, signal) {
  const settings = {
    model: pane.model.value,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("most").value),
  };
  if (at("seed").value !== "") settings.seed = Number(at("seed").value);
  const system = at("system").value.trim();
  const turns = [...pane.turns, { role: "user", content: question }];
  settings.messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];

  line(pane, "asked", question);
  const p = line(pane, "said", "");
  p.setAttribute("aria-busy", "true");
  const time = clock(pane);
  let text = "";
  let how = "finished";
  try {
    for await (const message of stream(settings, signal)) {
      const delta = message.choices[0]?.delta?.content || "";
      text += delta;
      if (delta) append(pane, p, delta);
      if (message.usage && message.choices.length) time.tick(message.usage.completion_tokens);
    }
    pane.turns = [...turns, { role: "assistant", content: text }];
  } catch (error) {
    if (signal.aborted) {
      p.classList.add("cut");
      how = "stopped";
    } else {
      line(pane, "wrong", error.message);
      how = `failed: ${error.message}`;
      if (error.status === 401) askForKey(error.message);
    }
    if (text) pane.turns = [...turns, { role: "assistant", content: text }];
  } finally {
    p.setAttribute("aria-busy", "false");
  }
  const facts = time.facts();
  return `${pane.model.value} ${how}. ${text} ${facts["tokens/s"]} tokens per second, first after ${facts["first token"]}.`;
}

// ---------------------------------------------------------------------------------------------------------- the page

function active() {
  return panes.filter((pane) => pane.model.value !== NONE);
}

async function ask(question) {
  running = new AbortController();
  setBusy(true);
  say("Asked.");
  const told = await Promise.all(active().map((pane) => answer(pane, question, running.signal)));
  running = null;
  setBusy(false);
  say(told.join(" "));
}

function setBusy(busy) {
  at("send").disabled = busy;
  at("stop").disabled = !busy;
  at("new").disabled = busy;
  for (const pane of panes) pane.model.disabled = busy;
}

function say(text) {
  at("told").textContent = text;
}

function connection(text) {
  at("connection").textContent = text;
}

function askForKey(message) {
  at("keys").hidden = false;
  connection(message);
}

function fill(names) {
  panes.forEach((pane, i) => {
    const before = pane.model.value;
    const own = i === 0 ? names : [NONE, ...names];
    pane.model.replaceChildren(...own.map((name) => new Option(name === NONE ? "none" : name, name)));
    const preferred = i === 0 ? names[0] : names[1] || NONE;
    pane.model.value = own.includes(before) && before !== NONE ? before : preferred;
  });
  layout();
}

function layout() {
  at("panes").classList.toggle("single", panes[1].model.value === NONE);
}

function forget() {
  for (const pane of panes) {
    pane.turns = [];
    pane.log.replaceChildren();
    pane.speed.replaceChildren();
  }
}

async function connect() {
  try {
    const ready = await (await fetch("readyz")).json();
    at("base").textContent = `One base (${ready.base}), every adapter.`;
    if (ready.keys && !key) {
      askForKey("This endpoint wants a key.");
      return;
    }
    const names = await models();
    fill(names);
    at("keys").hidden = true;
    connection(names.length === 1 ? "1 model" : `${names.length} models`);
    at("prompt").focus();
  } catch (error) {
    if (error.status === 401) {
      key = "";
      sessionStorage.removeItem("ftray-key");
      askForKey(error.message);
    } else {
      connection(`Not connected: ${error.message}`);
      setTimeout(connect, 3000);
    }
  }
}

at("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  sessionStorage.setItem("ftray-key", key);
  at("key").value = "";
  connect();
});

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("prompt").value.trim();
  if (!question || running || !active().length) return;
  at("prompt").value = "";
  ask(question);
});

at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

at("stop").addEventListener("click", () => running && running.abort());
at("new").addEventListener("click", () => {
  forget();
  at("prompt").focus();
  say("A new conversation.");
});
panes.forEach((pane) => pane.model.addEventListener("change", () => {
  pane.turns = [];
  pane.log.replaceChildren();
  pane.speed.replaceChildren();
  layout();
}));

setBusy(false);
connect();
