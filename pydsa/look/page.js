"use strict";
const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
const N = D.texts.length, NONE = -1, LEVELS = 63, STEPS = 65535;
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { group: 0, layer: NONE, measure: D.weighed ? "weights" : "times", before: 1, focus: null, pinned: null };
const element = (name, text, className) => Object.assign(document.createElement(name), text === undefined ? {} : { textContent: text }, className ? { className } : {});
const words = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const percent = (v) => v === 0 ? "0 %" : v < 0.0001 ? "< 0.01 %" : `${(100 * v).toFixed(v < 0.01 ? 2 : v < 0.1 ? 1 : 0)} %`;

// ---- Stored arrays ----

async function bytes(text) {
  const binary = atob(text), raw = new Uint8Array(binary.length);
  for (let i = 0; i < raw.length; i++) raw[i] = binary.charCodeAt(i);
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function integers(planes) {
  const parts = await Promise.all(planes.map(bytes)), values = new Uint32Array(parts[0].length);
  parts.forEach((part, i) => { for (let j = 0; j < part.length; j++) values[j] |= part[j] << (8 * i); });
  return values;
}

async function sums(stored) {
  return Float32Array.from(await integers(stored.planes), (v) => stored.scale * (v / STEPS) ** 2);
}

// ---- Colours: one hue from light to dark (dark to light on a dark page), so that they can be told apart without seeing hues ----

const RAMPS = { light: [[0, 255, 255, 255], [.12, 255, 243, 208], [.4, 255, 199, 82], [.66, 236, 122, 18], [.86, 178, 56, 10], [1, 100, 20, 4]],
  dark: [[0, 23, 24, 27], [.12, 52, 40, 24], [.4, 122, 74, 14], [.66, 208, 126, 14], [.86, 255, 186, 62], [1, 255, 236, 178]] };
let colours, letters;

function mixColours() {
  const stops = RAMPS[dark.matches ? "dark" : "light"];
  colours = Array.from({ length: 256 }, (_, i) => {
    const t = i / 255, k = Math.max(1, stops.findIndex(([at]) => at >= t)), [a, b] = [stops[k - 1], stops[k]], part = (t - a[0]) / (b[0] - a[0]);
    return [1, 2, 3].map((c) => Math.round(a[c] + part * (b[c] - a[c])));
  });
  // The page's own ink where its contrast is 4.5 or more, else black or white, of which one always has that.
  letters = colours.map(luminance).map((light) => (dark.matches ? light < .13 : light > .24) ? "" : light > .179 ? "#000" : "#fff");
  const context = $("ramp").getContext("2d");
  for (let x = 0; x < 144; x++) {
    context.fillStyle = css(colours[Math.round(255 * x / 143)]);
    context.fillRect(x, 0, 1, 12);
  }
}
const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const css = (rgb) => `rgb(${rgb.join()})`;
const step = (v, most) => most > 0 ? Math.min(255, Math.ceil(255 * Math.sqrt(v / most))) : 0;      // small values can be seen

function shade(node, v, most) {
  const i = step(v, most);
  node.style.backgroundColor = i ? css(colours[i]) : "";
  node.style.color = i ? letters[i] : "";
}

// ---- What was looked at ----

let tallies = [], choices = null, rowOf = new Map();

async function decode() {
  tallies = await Promise.all(D.groups.map(async (group) => {
    const found = {};
    for (const name of ["times", "weights"]) {
      if (group[name]) found[name] = { layers: await sums(group[name].layers), all: group[name].all ? await sums(group[name].all) : null };
    }
    return found;
  }));
}

async function decodeChoices() {
  choices = { steps: await integers(D.choices.planes), shares: D.choices.shares ? await bytes(D.choices.shares) : null };
  let row = 0;
  for (const [first, last] of D.choices.positions) for (let p = first; p <= last; p++) rowOf.set(p, row++);
  document.body.dataset.choices = "";
  update();
}

const far = D.far;         // the end of the tokens that are not new
const layersShown = () => state.layer === NONE ? D.chosen_layers.map((_, i) => i) : [state.layer];
const within = (spans, p) => spans.some(([first, last]) => first <= p && p <= last);

/** Values of all positions for a group: its mean token, in the chosen layers. */
function ofGroup() {
  const found = tallies[state.group]?.[state.measure], values = new Float32Array(N), group = D.groups[state.group], shown = layersShown();
  const scale = 1 / Math.max(1, group.rows * shown.length);
  if (found?.all && state.layer === NONE) found.all.forEach((v, p) => { values[p] = v * scale; });
  else if (found) {
    const bins = found.layers.length / D.chosen_layers.length;
    for (const l of shown) for (let p = 0; p < N; p++) values[p] += found.layers[l * bins + Math.floor(p / D.bin)] * scale / D.bin;
  }
  return { values, chosen: null, rows: group.rows };
}

/** Calls use(layer, position, share) for each key that the token at a position chose. */
function eachChoice(position, shown, use) {
  const row = rowOf.get(position), k = D.choices.k, L = D.chosen_layers.length;
  for (const l of shown) {
    const start = (row * L + l) * k;
    let at = -1, total = 0, end = start;
    for (; end < start + k && choices.steps[end]; end++) total += choices.shares ? choices.shares[end] ** 2 : 1;
    for (let i = start; i < end; i++) use(l, at += choices.steps[i], choices.shares ? choices.shares[i] ** 2 / (total || 1) : 1 / (end - start));
  }
}

/** Values of all positions for the token at one, or a sentence why there are none. */
function ofToken(token) {
  const position = token - state.before, shown = layersShown();
  if (position < 0) return { why: "No step wrote the first token." };
  if (within(D.all_keys, position)) return { why: `It looked at ${position ? `all ${words(position + 1, "token")} up to itself` : "itself alone"}: no choice was made.` };
  if (D.choices && !choices) return { why: "Its choices are being read." };
  if (!rowOf.has(position)) return { why: "Its choices are not in this page." };
  const values = new Float32Array(N), chosen = new Uint8Array(N);
  eachChoice(position, shown, (l, p, share) => {
    chosen[p] = 1;
    values[p] += (state.measure === "times" ? 1 : share) / shown.length;
  });
  return { values, chosen, rows: 1 };
}

// ---- The text ----

const pane = $("text"), visible = new Set(), control = new Set(D.control);
const shown = (i) => D.texts[i].trim() || !D.texts[i].includes("\n") ? D.texts[i] : D.texts[i].replaceAll("\n", "↵\n");
const quoted = (i) => `“${D.texts[i].replaceAll("\n", "↵")}”`;
let looked = { values: new Float32Array(N), chosen: null, rows: 1 }, most = 0, tops = [];
const parts = [];

function cutText() {
  for (let start = 0; start < N;) {
    let end = Math.min(N, start + 160);
    while (end < N && end < start + 320 && !D.texts[end - 1].endsWith("\n")) end++;
    parts.push({ start, end, node: null, tokens: null });
    start = end;
  }
  for (const part of parts) {
    part.node = element("span");
    part.node.holds = part;
    plain(part);
    pane.append(part.node);
  }
}

function plain(part) {
  part.tokens = null;
  let text = "";
  for (let i = part.start; i < part.end; i++) text += shown(i);
  part.node.textContent = text;
}

function tokenNode(i, name = "span") {
  const node = element(name, shown(i), `t${control.has(i) ? " control" : ""}${D.n_prompt !== null && i >= D.n_prompt && name === "span" ? " answer" : ""}`);
  node.token = i;
  return node;
}

function spell(part) {
  part.tokens = Array.from({ length: part.end - part.start }, (_, j) => tokenNode(part.start + j));
  part.node.replaceChildren(...part.tokens);
  paint(part);
}

function paint(part) {
  part.tokens.forEach((node, j) => mark(node, part.start + j));
}

function mark(node, i, shaded = true) {
  shade(node, shaded ? looked.values[i] : 0, most);
  node.classList.toggle("chosen", Boolean(looked.chosen?.[i]));
  node.classList.toggle("here", state.focus === i);
  if (node.localName === "button") node.setAttribute("aria-pressed", String(state.pinned === i));
}

const partOf = (i) => parts.find((part) => i < part.end);
const nodeOf = (i) => { const part = partOf(i); if (!part.tokens) spell(part); return part.tokens[i - part.start]; };

function goTo(i, flash = true) {
  const part = partOf(i), node = nodeOf(i);
  visible.add(part);
  pane.scrollTop += node.getBoundingClientRect().top - pane.getBoundingClientRect().top - pane.clientHeight * .4;
  if (!flash) return;
  node.classList.add("seen");
  setTimeout(() => node.classList.remove("seen"), 1500);
}

function watchText() {
  const observer = new IntersectionObserver((entries) => {
    for (const { target: { holds: part }, isIntersecting } of entries) {
      if (isIntersecting) { visible.add(part); if (!part.tokens) spell(part); else paint(part); }
      else if (visible.delete(part)) plain(part);
    }
  }, { root: pane, rootMargin: "600px" });
  for (const { node } of parts) observer.observe(node);
}

// ---- The strip beside the text: all of it, from top to bottom ----

function measureText() {
  tops = [...parts.map((part) => part.node.offsetTop), pane.scrollHeight];
}

function drawStrip() {
  const canvas = $("map"), height = canvas.clientHeight, width = canvas.clientWidth;
  if (!height) return;
  if (tops.at(-1) !== pane.scrollHeight) measureText();
  Object.assign(canvas, { width, height });
  const rows = new Float32Array(height), scale = height / pane.scrollHeight;
  parts.forEach((part, c) => {
    for (let i = part.start; i < part.end; i++) {
      const y = tops[c] + (tops[c + 1] - tops[c]) * (i - part.start) / (part.end - part.start), row = Math.min(height - 1, Math.floor(y * scale));
      rows[row] = Math.max(rows[row], looked.values[i]);
    }
  });
  const context = canvas.getContext("2d");
  rows.forEach((v, y) => { if (v > 0) { context.fillStyle = css(colours[step(v, most)]); context.fillRect(0, y - 1, width, 3); } });
  context.strokeStyle = getComputedStyle(document.body).color;
  context.strokeRect(.5, pane.scrollTop * scale + .5, width - 1, Math.max(4, pane.clientHeight * scale) - 1);
}

// ---- Heat maps ----

/** A heat map with a cursor: values [rows, columns] -> drawn, with a sentence about the cell under the pointer. */
class HeatMap {
  constructor(section, tell, go) {
    Object.assign(this, { section, tell, go, canvas: section.querySelector("canvas"), under: section.querySelector(".under"), at: null });
    const move = (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.point(Math.floor((event.clientY - box.top) / box.height * this.rows), Math.floor((event.clientX - box.left) / box.width * this.columns));
    };
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => { move(event); if (this.at && go) go(...this.at); });
    this.canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (by) { this.point((this.at?.[0] ?? 0) + by[0], (this.at?.[1] ?? 0) + by[1]); event.preventDefault(); }
      if (event.key === "Enter" && this.at && go) go(...this.at);
    });
  }
  point(row, column) {
    this.at = row === null ? null : [Math.max(0, Math.min(this.rows - 1, row)), Math.max(0, Math.min(this.columns - 1, column))];
    this.under.textContent = this.at ? this.tell(...this.at) : "";
    this.draw();
  }
  /** values: NaN where there is none. axis: texts under the map. */
  show(values, rows, columns, top, axis) {
    Object.assign(this, { values, rows, columns, top });
    this.section.querySelector(".axis").replaceChildren(...axis.map((text) => element("span", text)));
    this.draw();
  }
  draw() {
    const { canvas, rows, columns, values, top, at } = this, scale = Math.max(3, Math.min(22, Math.floor(420 / rows)));
    if (!rows) return;
    Object.assign(canvas, { width: columns, height: rows * scale });
    canvas.style.height = `${rows * scale}px`;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows * scale);
    for (let y = 0; y < rows * scale; y++) {
      const edge = scale > 5 && (y + 1) % scale === 0;
      for (let x = 0; x < columns; x++) {
        const v = values[Math.floor(y / scale) * columns + x], rgb = edge || !(v >= 0) ? null : colours[step(v, top)];
        if (rgb) image.data.set([...rgb, 255], 4 * (y * columns + x));
      }
    }
    context.putImageData(image, 0, 0);
    if (at) {
      context.fillStyle = getComputedStyle(document.body).color;
      context.fillRect(at[1], at[0] * scale, Math.max(1, columns / 800), scale);
    }
  }
}

const layerName = (l) => `layer ${l}${D.shared[l] === undefined ? "" : ` (with the choice of layer ${D.shared[l]})`}`;
const span = (first, last) => first === last ? `position ${first}` : `positions ${first} to ${last}`;
let heat, changes, experts, heatColumns = 1;
const firstOf = (column) => Math.floor(column * N / heatColumns), endOf = (column) => Math.max(firstOf(column) + 1, Math.floor((column + 1) * N / heatColumns));
const bestOf = (column) => { let best = firstOf(column); for (let p = best; p < endOf(column); p++) if (looked.values[p] > looked.values[best]) best = p; return best; };

function drawHeat() {
  const L = D.chosen_layers.length, cells = new Float32Array(L * heatColumns);
  const put = (l, p, v) => { const i = l * heatColumns + Math.min(heatColumns - 1, Math.floor((p + .5) * heatColumns / N)); cells[i] = Math.max(cells[i], v); };
  if (looked.chosen) eachChoice(state.focus - state.before, D.chosen_layers.keys(), (l, p, share) => put(l, p, state.measure === "times" ? 1 : share));
  else {
    const found = tallies[state.group][state.measure].layers, bins = found.length / L, rows = Math.max(1, looked.rows) * D.bin;
    for (let l = 0; l < L; l++) for (let b = 0; b < bins; b++) if (found[l * bins + b]) put(l, b * D.bin, found[l * bins + b] / rows);
  }
  const old = looked.chosen ? cells : cells.filter((_, i) => firstOf(i % heatColumns) < far);
  const top = old.reduce((a, b) => Math.max(a, b), 0) || cells.reduce((a, b) => Math.max(a, b), 0);
  heat.show(cells, L, heatColumns, top, [`position 0; ${layerName(D.chosen_layers[0])} on top`, D.n_prompt === null ? "" : `answer from ${D.n_prompt}`, `${N - 1}`]);
}

async function startMaps() {
  heatColumns = Math.max(1, Math.min(N, 1100));
  heat = new HeatMap($("heat"), (l, x) => {
    const best = bestOf(x), around = D.texts.slice(Math.max(0, best - 4), best + 5).join("").replaceAll("\n", "↵");
    return `${layerName(D.chosen_layers[l])}, ${span(firstOf(x), endOf(x) - 1)}: ${percent(heat.values[l * heatColumns + x])} — “${around}”`;
  }, (l, x) => goTo(bestOf(x)));
  $("heat").hidden = !D.chosen_layers.length;
  $("changes").hidden = !D.overlap;
  if (D.overlap) {
    const stored = await bytes(D.overlap.cells), { columns, first, last } = D.overlap, values = Float32Array.from(stored, (v) => v === 255 ? NaN : (v / 254));
    const at = (x) => first + Math.floor(x * (last - first + 1) / columns);
    changes = new HeatMap($("changes"), (l, x) => `${layerName(D.chosen_layers[l])}, ${span(at(x), Math.max(at(x), at(x + 1) - 1))}: ` +
      (values[l * columns + x] >= 0 ? `${percent(values[l * columns + x])} of the keys were chosen before too` : "no two choices beside each other"), (l, x) => goTo(at(x)));
    // squares: drawn as squares of the values are, so that the colour tells the value itself
    changes.show(values.map((v) => v * v), D.chosen_layers.length, columns, 1, [`position ${first}; colours from 0 to 100 %`, `${last}`]);
  }
  $("experts").hidden = !D.experts;
  if (D.experts) experts = new HeatMap($("experts"), (l, e) => `layer ${D.experts.layers[l]}, expert ${e}: ${percent(experts.values[l * D.experts.n + e])} of the tokens`);
}

const expertCounts = [];
async function drawExperts() {
  if (!D.experts) return;
  const { groups, layers, n } = D.experts, g = state.group;
  expertCounts[g] ??= await integers(groups[g].planes);
  const values = Float32Array.from(expertCounts[g], (v) => v / Math.max(1, groups[g].tokens));
  experts.show(values, layers.length, n, values.reduce((a, b) => Math.max(a, b), 0), [`expert 0; layer ${layers[0]} on top`, `${words(groups[g].tokens, "token")} of ${D.groups[g].name}`, `${n - 1}`]);
}

// ---- Tables and lists ----

function drawTable() {
  const columns = D.table.columns.filter(({ key }) => D.table.rows.some((row) => row[key] !== null)), section = $("layers");
  section.hidden = !columns.length;
  if (!columns.length) return;
  section.querySelector("p").textContent = columns.filter(({ tells }) => tells).map(({ tells }) => tells).join(" ");
  const table = element("table"), top = table.createTHead().insertRow(), body = table.createTBody();
  top.append(...["layer", ...columns.map(({ head }) => head)].map((head) => Object.assign(element("th", head), { scope: "col" })));
  for (const row of D.table.rows) {
    const line = body.insertRow();
    line.append(Object.assign(element("th", `${row.layer}${D.shared[row.layer] === undefined ? "" : ` ← ${D.shared[row.layer]}`}`), { scope: "row" }));
    for (const { key, share, most: end } of columns) {
      const v = row[key], cell = element("td", v === null ? "" : share ? percent(v) : Number.isInteger(v) ? v.toLocaleString("en") : v.toFixed(2));
      if (v !== null && end) cell.style.backgroundSize = `${100 * Math.min(1, v / end)}% 100%`;
      line.append(cell);
    }
  }
  section.querySelector("div").append(table);
}

/** The places with the most, apart from each other: [[position, sum of the places around]]. */
function places(count) {
  const near = 7, sum = new Float64Array(N + 1), found = [], free = new Uint8Array(N).fill(1);
  for (let i = 0; i < N; i++) sum[i + 1] = sum[i] + looked.values[i];
  const around = (i) => sum[Math.min(N, i + near + 1)] - sum[Math.max(0, i - near)];
  const order = Array.from({ length: N }, (_, i) => i).filter((i) => looked.values[i] > 0).sort((a, b) => looked.values[b] - looked.values[a]);
  for (const i of order) {
    if (found.length === count) break;
    if (!free[i]) continue;
    found.push([i, around(i)]);
    free.fill(0, Math.max(0, i - 2 * near), i + 2 * near + 1);
  }
  return found.sort((a, b) => b[1] - a[1]);
}

function drawTop() {
  $("top").replaceChildren(...places(8).map(([i, sum]) => {
    const item = element("li"), button = element("button"), text = element("i");
    for (let j = Math.max(0, i - 7); j < Math.min(N, i + 8); j++) {
      const node = element("span", D.texts[j].replaceAll("\n", "↵"), control.has(j) ? "t control" : "t");
      shade(node, looked.values[j], most);
      text.append(node);
    }
    button.append(element("b", percent(sum)), text);
    button.title = `position ${i}`;
    button.addEventListener("click", () => goTo(i));
    item.append(button);
    return item;
  }));
}

function drawReadout() {
  const { focus } = state, group = D.groups[state.group];
  $("what").textContent = focus === null ? `What ${group.name} looked at` : `What ${quoted(focus)} looked at`;
  if (focus === null) {
    $("readout").textContent = group.rows ? `The mean of ${words(group.rows, "token")}${state.layer === NONE && D.chosen_layers.length > 1 ? ` and ${D.chosen_layers.length} layers` : ""}.`
      : "None of its tokens made a choice.";
    return;
  }
  const where = `${quoted(focus)} at position ${focus}${control.has(focus) ? ", a control token" : ""}`, how = state.before ? "To write" : "As a query,";
  if (looked.why) { $("readout").textContent = `${where}. ${looked.why}`; return; }
  const best = Array.from(looked.values.keys()).filter((p) => looked.values[p] > 0).sort((a, b) => looked.values[b] - looked.values[a]).slice(0, 5);
  const n = looked.chosen.reduce((a, b) => a + b, 0);
  $("readout").textContent = `${how} ${where}: ${words(n, "token")} looked at, most ${best.map((p) => `${quoted(p)} ${p} (${percent(looked.values[p])})`).join(", ")}.`;
}

// ---- All of it ----

let pending = false;
function update() {
  if (!pending) requestAnimationFrame(() => { pending = false; render(); });
  pending = true;
}

function render() {
  const found = state.focus === null ? ofGroup() : ofToken(state.focus);
  looked = found.why ? { values: new Float32Array(N), chosen: null, rows: 1, why: found.why } : found;
  const greatest = looked.values.reduce((a, b) => Math.max(a, b), 0);
  // The newest tokens are always looked at: among all of a group's, the others decide what is dark.
  most = state.focus === null && looked.values.subarray(0, far).reduce((a, b) => Math.max(a, b), 0) || greatest;
  for (const part of visible) if (part.tokens) paint(part);
  for (const node of $("answer").children) mark(node, node.token, state.focus !== null);
  $("ticks").replaceChildren(...[0, .25, 1].map((part) => element("span", (part === 1 && most < greatest ? "≥ " : "") + percent(most * part))));
  $("unit").textContent = state.measure === "weights" ? "share of attention" : "chosen by";
  drawReadout();
  drawStrip();
  if (D.chosen_layers.length && (looked.chosen || !looked.why)) drawHeat();
  if (state.focus === null) { drawTop(); drawExperts(); }
}

function focusOn(token, pin = false) {
  if (pin) state.pinned = state.pinned === token ? null : token;
  const next = token ?? state.pinned;
  if (next === state.focus && !pin) return;
  state.focus = next;
  if (pin && state.focus !== null) update(), drawTopLater();
  update();
}
const drawTopLater = () => requestAnimationFrame(() => requestAnimationFrame(drawTop));

function listen() {
  for (const place of [pane, $("answer")]) {
    place.addEventListener("pointerover", (event) => { if (event.pointerType !== "touch") focusOn(event.target.token ?? null); });
    place.addEventListener("pointerleave", () => focusOn(null));
    place.addEventListener("click", (event) => { if (event.target.token !== undefined) focusOn(event.target.token, true); });
  }
  $("answer").addEventListener("focusin", (event) => focusOn(event.target.token ?? null));
  $("answer").addEventListener("focusout", () => focusOn(null));
  pane.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key], from = state.focus ?? (D.n_prompt ?? N - 1);
    const to = by ? Math.max(0, Math.min(N - 1, from + by)) : { Home: 0, End: N - 1 }[event.key];
    if (to !== undefined) { focusOn(to); goTo(to, false); event.preventDefault(); }
    if (event.key === "Enter" && state.focus !== null) focusOn(state.focus, true);
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") { state.pinned = null; focusOn(null); } });
  pane.addEventListener("scroll", () => requestAnimationFrame(drawStrip));
  $("map").addEventListener("click", (event) => { pane.scrollTop = event.offsetY / $("map").clientHeight * pane.scrollHeight - pane.clientHeight / 2; });
  for (const [id, name] of [["group", "group"], ["layer", "layer"], ["pointer", "before"]]) {
    $(id).addEventListener("change", (event) => { state[name] = Number(event.target.value); update(); });
  }
  $("measure").addEventListener("change", (event) => { state.measure = event.target.value; update(); });
  dark.addEventListener("change", () => { mixColours(); update(); changes?.draw(); });
  addEventListener("resize", () => { measureText(); drawStrip(); });
}

const option = (value, text) => Object.assign(element("option", text), { value });

function fill() {
  document.title = $("title").textContent = D.title;
  $("about").textContent = D.about;
  $("notes").append(...D.notes.map((note) => element("li", note)));
  $("group").append(...D.groups.map(({ name }, i) => option(i, name)));
  $("layer").append(option(NONE, "all"), ...D.chosen_layers.map((l, i) => option(i, layerName(l).replace("layer ", ""))));
  if (D.weighed) $("measure").append(option("weights", "by the share of attention"));
  $("measure").append(option("times", "by how often it was chosen"));
  $("answering").hidden = D.n_prompt === null || D.n_prompt >= N;
  if (!$("answering").hidden) for (let i = D.n_prompt; i < Math.min(N, D.n_prompt + 500); i++) $("answer").append(Object.assign(tokenNode(i, "button"), { type: "button" }));
  $("controls").hidden = !D.chosen_layers.length;
  pane.setAttribute("aria-label", "The text, shaded");
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old for this page: it has no DecompressionStream.");
  mixColours();
  fill();
  cutText();
  measureText();
  await decode();
  await startMaps();
  drawTable();
  render();
  watchText();
  const best = places(40).find(([i]) => i < far);
  if (best) goTo(best[0], false);
  listen();
  document.body.dataset.ready = "";
  if (D.choices) await decodeChoices();
}

start().catch((error) => { $("failed").textContent = error.message; $("failed").hidden = false; throw error; });
