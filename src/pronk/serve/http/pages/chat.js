"use strict";

const $ = (id) => document.getElementById(id);
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed"];
let messages = [];
let running = null; // the AbortController of the answer under way

function keep() {
  localStorage.setItem("pronk", JSON.stringify(Object.fromEntries(KEPT.map((id) => [id, $(id).value]))));
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem("pronk")) || {};
    for (const id of KEPT) if (kept[id] !== undefined) $(id).value = kept[id];
  } catch { /* nothing kept */ }
  const theme = localStorage.getItem("pronk-theme");
  if (theme) document.documentElement.dataset.theme = theme;
}

// Fenced code stands out; everything else is shown as it is. Text is never read as HTML.
function show(node, text) {
  node.replaceChildren();
  text.split(/^```[^\n]*\n?/m).forEach((part, index) => {
    if (index % 2 === 0) { node.append(part); return; }
    const pre = document.createElement("pre");
    pre.textContent = part.replace(/\n$/, "");
    node.append(pre);
  });
}

function addTurn(role) {
  document.querySelector(".empty")?.remove();
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  for (const name of ["who", "said", "figures"]) {
    const part = document.createElement("div");
    part.className = name;
    turn.append(part);
  }
  turn.children[0].textContent = role === "user" ? "You" : $("model").value;
  $("talk").append(turn);
  return turn;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `HTTP ${response.status}`; }
}

function figures(start, first, last, tokens) {
  const parts = [`first token ${(first - start).toFixed(0)} ms`];
  // Pieces that came all at once tell no rate of their own: then from the question on.
  const [counted, since] = last - first < 50 ? [tokens, start] : [tokens - 1, first];
  if (tokens > 1) parts.push(`${(counted / (last - since) * 1000).toFixed(1)} tokens/s`);
  parts.push(`${tokens} tokens`);
  return parts.join(" · ");
}

// Draws once a frame, however often it is asked to: tokens may come by the thousand a second.
function frames(draw) {
  let due = 0;
  const now = () => { cancelAnimationFrame(due); due = 0; draw(); };
  return { soon: () => { due ||= requestAnimationFrame(now); }, now, cancel: () => cancelAnimationFrame(due) };
}

async function answer() {
  const turn = addTurn("assistant");
  const [, said, note] = turn.children;
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: number("temperature"), top_p: number("top_p"),
    max_tokens: number("max_tokens"), seed: number("seed"),
    stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  running = new AbortController();
  busy(true);
  const start = performance.now();
  let text = "", first = 0, last = 0, tokens = 0, end = "";
  const drawing = frames(() => {
    show(said, text);
    note.textContent = figures(start, first, last, tokens) + end;
    follow();
  });
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: { "content-type": "application/json" },
      body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) { tokens = event.usage.completion_tokens; }
      const choice = event.choices?.[0];
      if (choice) {
        last = performance.now();
        first ||= last;
        text += choice.delta.content || "";
        if (choice.finish_reason === "length") end = " · cut off at the limit";
      }
      drawing.soon();
    }
    drawing.now();
    messages.push({ role: "assistant", content: text });
  } catch (error) {
    if (error.name === "AbortError") {
      if (first) drawing.now();
      messages.push({ role: "assistant", content: text });
      note.textContent = `${first ? figures(start, first, last, tokens) + " · " : ""}stopped`;
    } else {
      drawing.cancel();
      messages.pop();
      turn.classList.add("failed");
      said.textContent = error.message;
    }
  } finally {
    running = null;
    busy(false);
  }
}

function follow() {
  const talk = $("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  if (!on) $("prompt").focus();
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  messages.push({ role: "user", content: text });
  show(addTurn("user").children[1], text);
  $("talk").scrollTop = $("talk").scrollHeight;
  answer();
}

function settings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

$("ask").addEventListener("submit", send);
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  const empty = document.createElement("p");
  empty.className = "empty";
  empty.textContent = "Ask something. It stays on this server.";
  $("talk").replaceChildren(empty);
});
$("open-settings").addEventListener("click", () => settings($("settings").hidden));
$("close-settings").addEventListener("click", () => settings(false));
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement;
  root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  localStorage.setItem("pronk-theme", root.dataset.theme);
});
for (const id of KEPT) $(id).addEventListener("change", keep);
recall();
fetch("/v1/models").then((response) => response.json()).then(({ data }) => {
  $("model").replaceChildren(...data.map((model) => new Option(model.id, model.id)));
}).catch(() => { $("model").replaceChildren(new Option("no model", "")); });
