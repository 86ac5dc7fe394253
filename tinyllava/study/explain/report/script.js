"use strict";
// Draws the maps and answers the selectors. Texts from the model go through textContent only.
window.addEventListener("error", (event) => {
  const box = document.getElementById("errors");
  box.hidden = false;
  box.textContent += `${event.message} (line ${event.lineno}) `;
});

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const ramp = bytes(data.ramp); // 256 colours: red, green, blue
const maps = data.maps;
const values = bytes(maps.values); // (tokens, layers, heads, n), 255 standing for each map's own peak
const peaks = new Float32Array(bytes(maps.peaks).buffer); // (tokens, layers, heads)
const shares = bytes(maps.shares); // (tokens, layers, heads, segments), 255 standing for all attention
const panels = data.panels.map((p) => ({ ...p, tokens: new Int16Array(bytes(p.tokens).buffer) }));
const nLayers = maps.layers.length;
const nHeads = maps.heads.length;
const state = { token: 0, layer: 0, head: 0, scale: "own" };

const percent = (x) => {
  const p = 100 * x;
  if (p === 0) return "0 %";
  if (p < 0.001) return "< 0.001 %";
  return `${p.toFixed(p >= 9.95 ? 0 : p >= 0.995 ? 1 : p >= 0.0995 ? 2 : 3)} %`;
};

// ---- maps

const at = (token, layer, head) => (token * nLayers + layer) * nHeads + head;

function weightsOf(token, layer, head) {
  const i = at(token, layer, head);
  const peak = peaks[i];
  const row = values.subarray(i * maps.n, (i + 1) * maps.n);
  return (place) => (row[place] / 255) * peak;
}

function strongest(token, layer, head) {
  const weight = weightsOf(token, layer, head);
  let best = { value: -1, panel: 0, cell: 0 };
  panels.forEach((panel, p) => panel.tokens.forEach((place, cell) => {
    if (place >= 0 && weight(place) > best.value) best = { value: weight(place), panel: p, cell };
  }));
  return best;
}

// The view for small maps: the tiles of the picture that got the strongest attention.
function mainPanel(token) {
  const { picture } = panels[strongest(token, 0, 0).panel];
  return panels.filter((panel) => panel.picture === picture).pop();
}

const canvas = document.createElement("canvas");
function paint(panel, token, layer, head, top) {
  const weight = weightsOf(token, layer, head);
  canvas.width = panel.columns;
  canvas.height = panel.rows;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(panel.columns, panel.rows);
  panel.tokens.forEach((place, cell) => {
    if (place < 0) return; // padding that the model never reads stays empty
    const level = top > 0 ? Math.min(255, Math.round((255 * weight(place)) / top)) : 0;
    image.data.set(ramp.subarray(3 * level, 3 * level + 3), 4 * cell);
    image.data[4 * cell + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function topOfScale() {
  if (state.scale === "own") return strongest(state.token, state.layer, state.head).value;
  return Math.max(...data.tokens.map((_, token) => strongest(token, state.layer, state.head).value));
}

function drawMaps() {
  const { token, layer, head } = state;
  const top = topOfScale();
  const peak = strongest(token, layer, head);
  panels.forEach((panel, p) => {
    byId(`heat-${p}`).setAttribute("href", paint(panel, token, layer, head, top));
    document.querySelectorAll(`#panel-${p} .peak`).forEach((box) => {
      box.setAttribute("visibility", p === peak.panel ? "visible" : "hidden");
      box.setAttribute("x", peak.cell % panel.columns);
      box.setAttribute("y", Math.floor(peak.cell / panel.columns));
    });
    byId(`panel-${p}`).setAttribute("aria-label", `${panel.title}: ${describe(token, layer, head, peak)}`);
  });
  byId("tick-half").textContent = percent(top / 2);
  byId("tick-top").textContent = percent(top);
  byId("readout").textContent = describe(token, layer, head, peak);
}

function describe(token, layer, head, peak) {
  const panel = panels[peak.panel];
  const where = `row ${1 + Math.floor(peak.cell / panel.columns)}, column ${1 + (peak.cell % panel.columns)}`;
  const name = panel.title.charAt(0).toLowerCase() + panel.title.slice(1);
  const view = panels.length > 1 ? ` of ${name}` : "";
  const onPicture = shares[at(token, layer, head) * maps.segments.length + maps.pictureSegment] / 255;
  const who = `${layerName(layer)}, ${headName(head)}`;
  return `Choosing “${data.tokens[token].text}” (${who}): ${percent(onPicture)} of the attention is on ${maps.segments[maps.pictureSegment]}, ` +
    `most on the patch in ${where}${view} (${percent(peak.value)}).`;
}

const layerName = (layer) => (layer === 0 ? "mean of all layers" : maps.layers[layer]);
const headName = (head) => (head === 0 ? "mean of all heads" : maps.heads[head]);

// ---- bars

function bar(name, value, chosen) {
  const row = document.createElement("div");
  row.className = chosen ? "bar on" : "bar";
  const label = document.createElement("span");
  label.className = "name";
  label.textContent = name;
  label.title = name;
  const track = document.createElement("span");
  track.className = "track";
  const fill = document.createElement("i");
  fill.style.width = `${100 * value}%`;
  track.append(fill);
  const number = document.createElement("span");
  number.className = "value";
  number.textContent = percent(value);
  row.append(label, track, number);
  return row;
}

function drawBars() {
  const token = data.tokens[state.token];
  const others = token.best.map(([text, p]) => [text, p, false]);
  const all = [...others, [token.text, token.probability, true]].sort((a, b) => b[1] - a[1]);
  byId("bars").replaceChildren(...all.map(([text, p, chosen]) => bar(text, p, chosen)));
  const n = maps.segments.length;
  const start = at(state.token, state.layer, state.head) * n;
  byId("shares").replaceChildren(...maps.segments.map((name, i) =>
    bar(name, shares[start + i] / 255, i === maps.pictureSegment)));
}

// ---- every layer and head at once

const GRID_LIMIT = 200;
function drawGrid() {
  const card = byId("grid-card");
  card.hidden = nLayers * nHeads > GRID_LIMIT || nLayers * nHeads < 2;
  if (card.hidden) return;
  const panel = mainPanel(state.token);
  const grid = byId("grid");
  grid.style.gridTemplateColumns = `max-content repeat(${nHeads}, minmax(40px, 124px))`;
  const text = (words, name) => {
    const span = document.createElement("span");
    span.textContent = words;
    span.className = name;
    return span;
  };
  const cells = [text("", ""), ...maps.heads.map((name, head) => text(head === 0 ? "mean" : name, ""))];
  for (let layer = 0; layer < nLayers; layer++) {
    cells.push(text(layer === 0 ? "mean" : maps.layers[layer], "row"));
    for (let head = 0; head < nHeads; head++) cells.push(gridButton(panel, layer, head));
  }
  const focused = document.activeElement?.dataset?.cell;
  grid.replaceChildren(...cells);
  if (focused) grid.querySelector(`[data-cell="${focused}"]`)?.focus();
}

function gridButton(panel, layer, head) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.cell = `${layer},${head}`;
  button.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
  const image = document.createElement("img");
  image.src = paint(panel, state.token, layer, head, strongest(state.token, layer, head).value);
  image.alt = `${layerName(layer)}, ${headName(head)}`;
  button.append(image);
  button.addEventListener("click", () => {
    byId("layer").value = String(layer);
    byId("head").value = String(head);
    update({ layer, head });
  });
  return button;
}

// ---- a patch under the pointer, or under the arrow keys

function watchPatches(panel, p) {
  const svg = byId(`panel-${p}`);
  const cursor = svg.querySelector(".cursor");
  let cell = -1;
  const show = (next) => {
    cell = next;
    const [row, column] = [Math.floor(cell / panel.columns), cell % panel.columns];
    cursor.setAttribute("x", column);
    cursor.setAttribute("y", row);
    cursor.setAttribute("visibility", "visible");
    const place = panel.tokens[cell];
    const weight = weightsOf(state.token, state.layer, state.head);
    const what = place < 0 ? "padding that the model never reads" : percent(weight(place));
    byId("readout").textContent = `Row ${row + 1}, column ${column + 1}: ${what}.`;
  };
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    byId("readout").textContent = describe(state.token, state.layer, state.head,
      strongest(state.token, state.layer, state.head));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.querySelector(".cut").getBoundingClientRect();
    const column = Math.floor((panel.columns * (event.clientX - box.left)) / box.width);
    const row = Math.floor((panel.rows * (event.clientY - box.top)) / box.height);
    const inside = row >= 0 && column >= 0 && row < panel.rows && column < panel.columns;
    if (inside && row * panel.columns + column !== cell) show(row * panel.columns + column);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const start = cell < 0 ? strongest(state.token, state.layer, state.head).cell : cell;
    const row = Math.min(panel.rows - 1, Math.max(0, Math.floor(start / panel.columns) + step[0]));
    const column = Math.min(panel.columns - 1, Math.max(0, (start % panel.columns) + step[1]));
    show(row * panel.columns + column);
  });
}

// ---- selectors

function drawFilm() {
  const { layer, head } = state;
  document.querySelectorAll("#film .mini").forEach((image, token) => {
    image.src = paint(mainPanel(token), token, layer, head, strongest(token, layer, head).value);
  });
}

function update(change) {
  Object.assign(state, change);
  drawMaps();
  drawBars();
  drawGrid();
  if ("layer" in change || "head" in change) drawFilm();
  document.querySelectorAll("table.lens [data-token]").forEach((cell) =>
    cell.classList.toggle("on", Number(cell.dataset.token) === state.token && cell.dataset.last === "1"));
  document.body.dataset.shown = `${state.token},${state.layer},${state.head},${state.scale}`;
}

function pick(token) {
  const radio = document.querySelector(`#film input[value="${token}"]`);
  radio.checked = true;
  const [film, label] = [byId("film"), radio.parentElement];
  const hidden = label.offsetLeft < film.scrollLeft || label.offsetLeft + label.offsetWidth > film.scrollLeft + film.clientWidth;
  if (hidden) film.scrollLeft = label.offsetLeft - (film.clientWidth - label.offsetWidth) / 2;
  update({ token });
}

byId("film").addEventListener("change", (event) => update({ token: Number(event.target.value) }));
byId("layer").addEventListener("change", (event) => update({ layer: Number(event.target.value) }));
byId("head").addEventListener("change", (event) => update({ head: Number(event.target.value) }));
byId("scale").addEventListener("change", (event) => update({ scale: event.target.value }));
byId("blend").addEventListener("input", (event) =>
  document.querySelectorAll(".heat").forEach((heat) => heat.setAttribute("opacity", event.target.value / 100)));
document.querySelector("table.lens")?.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-token]");
  if (cell) pick(Number(cell.dataset.token));
});
panels.forEach(watchPatches);
document.querySelectorAll(".heat").forEach((heat) => heat.setAttribute("opacity", byId("blend").value / 100));
state.layer = Number(byId("layer").value); // browsers keep what was selected before a reload
state.head = Number(byId("head").value);
state.scale = byId("scale").value;
const start = document.querySelector("#film input:checked") || document.querySelector("#film input");
drawFilm();
pick(Number(start.value));
