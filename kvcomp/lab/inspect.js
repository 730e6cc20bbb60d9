"use strict";
// Draws the prompt once per strategy and colours it anew when a slider moves. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";
const STATES = ["kept", "merged", "evicted"];
const EVICTED = -1;
const data = JSON.parse(document.getElementById("data").textContent);
const layerSlider = document.getElementById("layer");
const headSlider = document.getElementById("head");
const linesSwitch = document.getElementById("lines");

function make(tag, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

function draw(tag, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Int32Array.from({ length: bytes.length / 4 }, (_, place) => view.getInt32(4 * place, true));
}

function stateOf(token, home) {
  return home === EVICTED ? "evicted" : home === token ? "kept" : "merged";
}

function visible(token) {
  return token.trim() === "" ? token.replace(/\n/g, "\u23ce").replace(/[ \t]/g, "\u00b7") || "\u2205" : token;
}

/** Where each token of an image stands: [image, row, column]. */
const places = new Map();
data.pictures.forEach((picture, image) =>
  picture.positions.forEach((token, number) =>
    places.set(token, [image, Math.floor(number / picture.columns), number % picture.columns])));
const evidence = new Set(data.evidence);

function nameOf(token) {
  const place = places.get(token);
  if (place) return `patch ${place[1] + 1}, ${place[2] + 1} of image ${place[0] + 1} (token ${token})`;
  return `\u201c${visible(data.tokens[token])}\u201d (token ${token})`;
}

class Panel {
  constructor(section, fate) {
    this.section = section;
    this.fate = fate;
    this.layers = fate.layers.map((layer) => ({ ...layer, homes: decode(layer.homes) }));
    this.prompt = section.querySelector(".prompt");
    this.marks = [];
    this.shown = null;
    this.current = 0;
    this.layout();
    this.overlay = this.prompt.appendChild(draw("svg", { class: "wires", "aria-hidden": "true" }));
    this.listen();
    this.chart();
  }

  /** Puts text tokens and images in the order of the prompt, one button for each token. */
  layout() {
    const done = new Set();
    data.tokens.forEach((text, token) => {
      const place = places.get(token);
      if (!place) {
        const mark = make("button", { type: "button", class: "token", dir: "auto", tabindex: "-1" }, visible(text));
        this.add(token, mark, this.prompt);
      } else if (!done.has(place[0])) {
        done.add(place[0]);
        this.prompt.append(this.picture(place[0]));
      }
    });
    this.marks[0].tabIndex = 0;
  }

  add(token, mark, parent) {
    mark.dataset.token = token;
    if (evidence.has(token)) mark.classList.add("evidence");
    this.marks[token] = mark;
    parent.append(mark);
  }

  picture(number) {
    const { source, width, height, positions, columns, rows, exact } = data.pictures[number];
    const figure = make("figure", { class: "picture" });
    figure.style.width = `${Math.max(5, Math.min(24, 2.6 * columns))}rem`;
    const frame = make("div", { class: "frame" });
    frame.style.aspectRatio = `${width} / ${height}`;
    frame.append(make("img", { src: source, alt: `image ${number + 1}` }));
    const grid = make("div", { class: "patches" });
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    for (const token of positions) this.add(token, make("button", { type: "button", class: "patch", tabindex: "-1" }), grid);
    frame.append(grid);
    const note = exact ? "" : ", patches where its tokens suggest";
    figure.append(frame, make("figcaption", {}, `image ${number + 1}${note}`));
    return figure;
  }

  listen() {
    const at = (event) => event.target.closest("[data-token]");
    this.prompt.addEventListener("pointerover", (event) => at(event) && this.point(Number(at(event).dataset.token)));
    this.prompt.addEventListener("focusin", (event) => at(event) && this.point(Number(at(event).dataset.token)));
    this.prompt.addEventListener("pointerleave", () => this.point(this.focused()));
    this.prompt.addEventListener("focusout", () => this.point(null));
    this.prompt.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.wire()).observe(this.prompt);
  }

  focused() {
    const mark = document.activeElement;
    return mark && this.prompt.contains(mark) && mark.dataset.token ? Number(mark.dataset.token) : null;
  }

  key(event) {
    const place = places.get(this.current);
    const row = place ? data.pictures[place[0]].columns : 1;
    const last = data.tokens.length - 1;
    const steps = {
      ArrowRight: this.current + 1, ArrowLeft: this.current - 1, ArrowDown: this.current + row,
      ArrowUp: this.current - row, Home: 0, End: last,
    };
    if (event.key === "Escape") document.activeElement.blur();
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.marks[Math.min(last, Math.max(0, steps[event.key]))].focus();
  }

  get homes() {
    const layer = this.layers[layerSlider.value];
    const tokens = data.tokens.length;
    return layer.homes.subarray(headSlider.value * tokens, (Number(headSlider.value) + 1) * tokens);
  }

  /** Colours every token for the layer and head of the sliders. */
  colour() {
    const homes = this.homes;
    this.marks.forEach((mark, token) => {
      const state = stateOf(token, homes[token]);
      mark.classList.remove(...STATES);
      mark.classList.add(state);
      mark.setAttribute("aria-label", `${nameOf(token)}: ${this.story(token, homes)}`);
    });
    const layer = this.layers[layerSlider.value];
    const [kept, merged, evicted] = layer.counts[headSlider.value];
    const total = data.tokens.length;
    const share = (count) => `${count} (${Math.round(100 * count / total)} %)`;
    const whole = evidence.size ? `; of ${evidence.size} tokens of evidence ${[...evidence].filter((token) => homes[token] === token).length} kept` : "";
    const flow = layer.rho === null ? "" : `; rho ${layer.rho.toFixed(3)}` +
      (this.fate.threshold === null ? "" : layer.rho > this.fate.threshold ? ", above the threshold: merges across modalities" : ", not above the threshold: merges inside a modality");
    this.section.querySelector(".state").textContent =
      `Layer ${layer.number}, KV head ${headSlider.value}: kept ${share(kept)}, merged ${share(merged)}, evicted ${share(evicted)}${whole}${flow}.`;
    for (const bar of this.section.querySelectorAll(".column")) bar.classList.toggle("now", bar.dataset.place === layerSlider.value);
    this.point(this.shown);
  }

  story(token, homes) {
    const home = homes[token];
    if (home === EVICTED) return "evicted";
    if (home !== token) return `merged into ${nameOf(home)}`;
    const guests = homes.reduce((count, place) => count + (place === token), -1);
    return guests ? `kept, with ${guests} other token${guests > 1 ? "s" : ""} merged into it` : "kept";
  }

  point(token) {
    this.shown = token;
    const homes = this.homes;
    for (const mark of this.prompt.querySelectorAll(".target, .guest")) mark.classList.remove("target", "guest");
    const readout = this.section.querySelector(".readout");
    readout.textContent = token === null ? "\u00a0" : `${nameOf(token)}: ${this.story(token, homes)}.`;
    if (token !== null) {
      this.marks[this.current].tabIndex = -1;
      this.current = token;
      this.marks[token].tabIndex = 0;
      const home = homes[token];
      if (home !== EVICTED) {
        this.marks[home].classList.add("target");
        homes.forEach((place, guest) => place === home && guest !== home && this.marks[guest].classList.add("guest"));
      }
    }
    this.wire();
  }

  /** Draws a curve from each merged token to its home: of the pointed one, or of all. */
  wire() {
    const homes = this.homes;
    const home = this.shown === null ? EVICTED : homes[this.shown];
    const chosen = [];
    homes.forEach((place, token) => {
      if (place !== token && place !== EVICTED && (linesSwitch.checked || place === home)) chosen.push([token, place]);
    });
    this.overlay.replaceChildren();
    if (!chosen.length) return;
    const box = this.prompt.getBoundingClientRect();
    const centre = (token) => {
      const mark = this.marks[token].getBoundingClientRect();
      return [mark.left + mark.width / 2 - box.left, mark.top + mark.height / 2 - box.top];
    };
    const curve = ([from, to]) => {
      const [x, y] = centre(from), [u, v] = centre(to);
      const bend = Math.min(60, Math.hypot(u - x, v - y) / 3);
      return `M${x.toFixed(1)} ${y.toFixed(1)}Q${((x + u) / 2).toFixed(1)} ${((y + v) / 2 - bend).toFixed(1)} ${u.toFixed(1)} ${v.toFixed(1)}`;
    };
    this.overlay.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
    const all = chosen.filter(([, to]) => to !== home), own = chosen.filter(([, to]) => to === home);
    if (all.length) this.overlay.append(draw("path", { class: "wire", d: all.map(curve).join("") }));
    if (own.length) this.overlay.append(draw("path", { class: "wire own", d: own.map(curve).join("") }));
  }

  /** Draws rho of each layer with the threshold, and below what each layer kept, merged and evicted on average. */
  chart() {
    const layers = this.layers, measured = layers.some((layer) => layer.rho !== null);
    const left = 38, width = left + layers.length * Math.max(24, Math.min(72, 520 / layers.length)), high = measured ? 96 : 0, low = 40, gap = 26;
    const step = (width - left) / layers.length, bar = Math.min(46, step * 0.72);
    const height = high + gap + low + 20;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "layers" });
    svg.style.width = `${width}px`;
    const most = Math.max(this.fate.threshold || 0, ...layers.map((layer) => layer.rho || 0), 0.05) * 1.15;
    const scale = (value) => 14 + (high - 14) * (1 - value / most);
    if (measured) svg.append(draw("text", { x: 0, y: 10 }, "rho"));
    svg.append(draw("text", { x: 0, y: high + gap - 6 }, "tokens"));
    layers.forEach((layer, place) => {
      const x = left + place * step + (step - bar) / 2;
      const group = draw("g", { class: "column", "data-place": place });
      group.append(draw("rect", { class: "hit", x: left + place * step, y: 0, width: step, height }));
      if (layer.rho !== null) {
        const across = this.fate.threshold !== null && layer.rho > this.fate.threshold;
        group.append(draw("rect", { class: across ? "rho across" : "rho", x, y: scale(layer.rho), width: bar, height: high - scale(layer.rho) }));
        if (bar > 24) group.append(draw("text", { class: "value", x: x + bar / 2, y: scale(layer.rho) - 3 }, layer.rho.toFixed(2)));
      }
      const sums = [0, 1, 2].map((state) => layer.counts.reduce((sum, counts) => sum + counts[state], 0));
      const total = sums.reduce((sum, count) => sum + count, 0);
      let y = high + gap;
      sums.forEach((count, state) => {
        const part = low * count / total;
        group.append(draw("rect", { class: STATES[state], x, y, width: bar, height: part }));
        y += part;
      });
      group.append(draw("text", { class: "value", x: x + bar / 2, y: height - 4 }, String(layer.number)));
      const text = `layer ${layer.number}` + (layer.rho === null ? "" : `, rho ${layer.rho.toFixed(3)}`) +
        `: kept ${sums[0]}, merged ${sums[1]}, evicted ${sums[2]} of ${total} tokens of all heads`;
      group.append(draw("title", {}, text));
      group.addEventListener("click", () => { layerSlider.value = place; show(); });
      svg.append(group);
    });
    if (measured && this.fate.threshold !== null) {
      const y = scale(this.fate.threshold);
      svg.append(draw("line", { class: "threshold", x1: left, x2: width, y1: y, y2: y }));
    }
    this.section.querySelector(".chart").append(svg);
  }
}

const panels = data.fates.map((fate, number) => new Panel(document.querySelector(`[data-fate="${number}"]`), fate));

function show() {
  const numbers = data.fates[0].layers.map((layer) => layer.number);
  document.getElementById("layer-shown").textContent = `${numbers[layerSlider.value]} of ${numbers[0]} to ${numbers.at(-1)}`;
  document.getElementById("head-shown").textContent = `${headSlider.value} of 0 to ${headSlider.max}`;
  for (const panel of panels) panel.colour();
}

document.getElementById("controls").addEventListener("input", show);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
show();
