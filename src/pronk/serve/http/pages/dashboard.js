"use strict";

const $ = (id) => document.getElementById(id);
const EVERY = 1000; // ms between readings
const KEPT = 180; // readings shown
const SVG = "http://www.w3.org/2000/svg";
const theme = localStorage.getItem("pronk-theme");
if (theme) document.documentElement.dataset.theme = theme;

const count = (value) => value.toFixed(0);
const rate = (value) => value.toFixed(1);
const share = (value) => `${(100 * value).toFixed(0)} %`;
const time = (value) => (value < 1 ? `${(1000 * value).toFixed(1)} ms` : `${value.toFixed(2)} s`);
const bytes = (value) => `${(value / 1e6).toFixed(0)} MB`;
const latency = (kind) => ["p50", "p90", "p99"].map((p) => [p, (now) => now.latency[kind]?.[p]]);

// Title, how values are written, least top of the scale, and the series: name and reader.
const PLOTS = [
  ["Requests", count, 1, [["running", (now) => now.running], ["waiting", (now) => now.waiting]]],
  ["Tokens per second", rate, 1, [
    ["generated", (now, before, s) => before && (now.generated_tokens - before.generated_tokens) / s],
    ["prompt", (now, before, s) => before && (now.prompt_tokens - before.prompt_tokens) / s]]],
  ["KV cache in use", share, 1, [["held", (now) => now.kv_usage]]],
  ["Prompt tokens found in the cache", share, 1, [
    ["hits", (now) => (now.prefix_queries ? now.prefix_hits / now.prefix_queries : 0)]]],
  ["Time to first token", time, 0.001, latency("ttft")],
  ["Between tokens", time, 0.001, latency("inter_token")],
  ["Whole requests", time, 0.001, latency("e2e")],
  ["Guard actions per second", rate, 1, ["block", "redact", "flag"].map((action) => [
    action, (now, before, s) => before && (now.guard[action] - before.guard[action]) / s])],
  ["Memory of the process", bytes, 1, [
    ["resident", (now) => now.resident], ["planned", (now) => now.planned]]],
];

const readings = new Map(); // by model: what each plot shows
let before = null;

function element(name, attributes = {}, namespace = null) {
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const views = PLOTS.map(([title, , , series]) => {
  const box = element("article", { class: "plot" });
  const head = element("h2");
  const output = element("output");
  head.append(title, output);
  const svg = element("svg", { viewBox: `0 0 ${KEPT - 1} 100`, preserveAspectRatio: "none",
    role: "img", "aria-label": title }, SVG);
  for (const y of [1, 50, 99]) svg.append(element("line", { x1: 0, x2: KEPT - 1, y1: y, y2: y }, SVG));
  const paths = series.map((_, index) => {
    const path = element("path", { class: `s${index}` }, SVG);
    svg.append(path);
    return path;
  });
  const scale = element("div", { class: "scale" });
  box.append(head, svg, scale);
  $("board").append(box);
  return { output, paths, scale };
});

function record(data) {
  const planned = Object.values(data.models).reduce((sum, model) => sum + model.planned_bytes, 0);
  for (const [name, model] of Object.entries(data.models)) {
    const now = { ...model, resident: data.resident_bytes, planned, guard: data.guard };
    const old = before?.models[name] && { ...before.models[name], guard: before.guard };
    const seconds = before ? data.time - before.time : 1;
    if (!readings.has(name)) readings.set(name, PLOTS.map(([, , , series]) => series.map(() => [])));
    PLOTS.forEach(([, , , series], plot) => series.forEach(([, read], index) => {
      const values = readings.get(name)[plot][index];
      values.push(read(now, old, seconds) ?? null);
      if (values.length > KEPT) values.shift();
    }));
  }
  before = data;
}

function draw() {
  const shown = readings.get($("model").value);
  if (!shown) return;
  PLOTS.forEach(([, write, least, series], plot) => {
    const { output, paths, scale } = views[plot];
    const top = Math.max(least, ...shown[plot].flat().map((value) => value ?? 0));
    output.replaceChildren();
    series.forEach(([name], index) => {
      const values = shown[plot][index];
      let line = "";
      values.forEach((value, at) => {
        if (value === null) return;
        const x = KEPT - values.length + at;
        const joined = at > 0 && values[at - 1] !== null;
        line += `${joined ? "L" : "M"}${x} ${(99 - 98 * value / top).toFixed(2)}`;
      });
      paths[index].setAttribute("d", line);
      const label = element("b", { class: `s${index}` });
      label.textContent = name;
      const last = values.at(-1);
      const pair = element("span");
      pair.append(label, ` ${last === null ? "–" : write(last)}`);
      output.append(index ? "  " : "", pair);
    });
    const [low, high] = [element("span"), element("span")];
    low.textContent = `last ${Math.round(KEPT * EVERY / 60000)} min`;
    high.textContent = `top ${write(top)}`;
    scale.replaceChildren(low, high);
  });
}

// What is not as it was: the server says so while it lasts.
const KINDS = { ttft: ["time to first token", time], inter_token: ["time between tokens", time],
  errors: ["share of errors", share] };
function alarm(data) {
  const lines = Object.entries(data.models).flatMap(([name, model]) => model.anomalies.map((odd) => {
    const [what, write] = KINDS[odd.series] ?? [odd.series, rate];
    const line = element("li");
    line.textContent = `${name}: ${what} is ${write(odd.now)}, usually ${write(odd.usual)}`;
    return line;
  }));
  $("alarms").replaceChildren(...lines);
  $("alarms").hidden = !lines.length;
}

async function read() {
  try {
    const response = await fetch("/stats");
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const data = await response.json();
    const names = Object.keys(data.models);
    if ($("model").options.length !== names.length) {
      $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    }
    record(data);
    draw();
    alarm(data);
    $("state").textContent = "live";
  } catch (error) {
    before = null;
    $("state").textContent = `no answer (${error.message})`;
  }
  setTimeout(read, EVERY);
}

$("model").addEventListener("change", draw);
read();
