// Drawings of the trees that episodes make where they branch from each other.
"use strict";

// Success and its absence differ in shape as well as in colour.
function outcome(success, x, y) {
  return success
    ? vector("circle", { cx: x, cy: y, r: 5.5, class: "outcome success" })
    : vector("path", { d: `M${x - 5} ${y - 5}l10 10m0 -10l-10 10`, class: "outcome failure" });
}

function key(shape, text) {
  const entry = element("span", undefined, "key"), icon = vector("svg", { width: 18, height: 16, "aria-hidden": "true" });
  icon.append(shape);
  entry.append(icon, text);
  return entry;
}

// The trees of one initial state: a row per episode, from its split (or its start) to its end, with its return there.
class Forest {
  static ROW = 26;
  static TOP = 26;
  static LEFT = 12;

  constructor(open) {
    this.open = open;
    this.figure = element("figure", undefined, "forest");
    this.title = element("h4");
    this.note = element("p", undefined, "note");
    this.holder = element("div", undefined, "trees");
    this.said = element("p", undefined, "said");
    const keys = element("figcaption", undefined, "keys");
    keys.append(
      key(outcome(true, 8, 8), "success"), key(outcome(false, 8, 8), "no success"),
      key(vector("circle", { cx: 8, cy: 8, r: 4, class: "point" }), "branch point"),
      key(vector("path", { d: "M0 8H16M8 3V13", class: "line" }), "end of a turn"),
      element("span", "At the end of a line: the episode’s return, and its number if it can be opened below."),
    );
    this.figure.append(this.title, this.note, this.holder, this.said, keys);
    this.holder.addEventListener("keydown", (event) => this.move(event));
    this.holder.addEventListener("mouseleave", () => this.tell());
    this.holder.addEventListener("focusout", () => this.tell());
    new ResizeObserver(() => {
      if (this.holder.clientWidth && this.holder.clientWidth !== this.width) this.draw();
    }).observe(this.holder);
  }

  show(forest, row, letter) {
    const changed = forest !== this.forest;
    Object.assign(this, { forest, row, letter });
    if (changed) this.draw();
    else this.mark();
  }

  draw() {
    const { forest } = this;
    const rows = forest.id.length, roots = forest.parent.filter((parent) => parent === null).length;
    this.title.textContent = `Branches of state ${this.letter}: ${plural(rows, "episode")} from ${plural(roots, "root")}`;
    this.note.hidden = !forest.strays;
    this.note.textContent = `${plural(forest.strays, "episode")} drawn as a root: the parent named is missing here or has other tokens.`;
    this.width = this.holder.clientWidth;
    const opened = forest.episode.filter((place) => place !== null);
    this.labels = forest.return.map((value, number) => {
      const place = forest.episode[number];
      return shown(value) + (place === null ? "" : `  #${opened.filter((other) => other <= place).length}`);
    });
    const margin = 26 + 8 * Math.max(...this.labels.map((label) => label.length));
    const most = Math.max(...forest.length, 1);
    this.scale = Math.max(this.width - Forest.LEFT - margin, 40) / most;
    const height = Forest.TOP + rows * Forest.ROW;
    this.svg = vector("svg", { width: this.width, height, role: "group", "aria-label": this.title.textContent });
    this.svg.append(...this.axis(most, height), ...forest.id.map((_, number) => this.line(number)));
    this.path = vector("path", { class: "chosen" });
    this.svg.append(this.path);
    this.items = [...this.points(), ...forest.id.map((_, number) => this.leaf(number))];
    this.svg.append(...this.items);
    this.holder.replaceChildren(this.svg);
    this.mark();
    this.tell();
  }

  x(token) {
    return Forest.LEFT + token * this.scale;
  }

  y(row) {
    return Forest.TOP + (row + 0.5) * Forest.ROW;
  }

  axis(most, height) {
    const room = most * this.scale / 60; // a label takes less than 60 pixels
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].map((unit) => unit * 10 ** Math.max(0, Math.floor(Math.log10(most)) - 2))
      .find((unit) => most / unit <= room) ?? most;
    const made = [];
    for (let token = 0; token <= most; token += step) {
      const label = vector("text", { x: this.x(token), y: 13, class: "axis", "text-anchor": "middle" });
      label.textContent = token || "token 0";
      if (!token) label.setAttribute("x", this.x(0) + 14);
      made.push(vector("path", { d: `M${this.x(token)} 19V${height}`, class: "grid" }), label);
    }
    return made;
  }

  // From the parent's row down to the own one, then to ``end``.
  trace(row, end) {
    const { parent, split } = this.forest;
    const from = this.x(split[row] ?? 0), to = Math.max(this.x(end), from), y = this.y(row);
    if (parent[row] === null) return `M${from} ${y}H${to}`;
    const bend = Math.min(7, to - from);
    return `M${from} ${this.y(parent[row])}V${y - bend}q0 ${bend} ${bend} ${bend}H${to}`;
  }

  line(row) {
    const { ends, length, split } = this.forest;
    const own = ends[row].filter((end) => end > (split[row] ?? 0));
    const ticks = own.map((end) => `M${this.x(end)} ${this.y(row) - 5}v10`);
    return vector("path", { d: [this.trace(row, length[row]), ...ticks].join(""), class: "line" });
  }

  leaf(row) {
    const { length, success, episode } = this.forest;
    const x = this.x(length[row]) + 9, y = this.y(row), openable = episode[row] !== null;
    const made = vector("g", {
      class: openable ? "leaf" : "leaf closed", role: "button", tabindex: -1, "aria-label": this.describe(row),
      "aria-disabled": String(!openable),
    });
    const area = vector("rect", {
      x: x - 9, y: y - Forest.ROW / 2, width: 24 + 8 * this.labels[row].length, height: Forest.ROW, rx: 6, class: "area",
    });
    const label = vector("text", { x: x + 11, y: y + 4.5 });
    label.textContent = this.labels[row];
    made.append(area, outcome(success[row], x, y), label);
    made.addEventListener("click", () => this.choose(row));
    return this.told(made, { row, token: length[row], leaf: true }, this.describe(row));
  }

  points() {
    const { parent, split, role, ends } = this.forest, made = new Map();
    parent.forEach((row, branch) => {
      if (row === null) return;
      const place = `${row} ${split[branch]}`;
      made.set(place, { row, token: split[branch], role: role[branch], branches: (made.get(place)?.branches ?? 0) + 1 });
    });
    return [...made.values()].map(({ row, token, role: written, branches }) => {
      const turn = ends[row].filter((end) => end <= token).length + 1;
      const at = written === null ? "at its end" : `in turn ${turn}, role ${written.replace("_", " ")}`;
      const text = `Branch point at token ${token} of ${this.forest.id[row]}, ${at}: ${plural(branches, "branch")}.`;
      const group = vector("g", { class: "fork", role: "img", tabindex: -1, "aria-label": text });
      const [cx, cy] = [this.x(token), this.y(row)];
      group.append(vector("circle", { cx, cy, r: 12, class: "area" }), vector("circle", { cx, cy, r: 4, class: "point" }));
      return this.told(group, { row, token, leaf: false }, text);
    });
  }

  told(item, place, text) {
    item.place = place;
    for (const event of ["mouseover", "focus"]) item.addEventListener(event, () => this.tell(text));
    return item;
  }

  tell(text) {
    const focused = this.items.find((item) => item === document.activeElement);
    this.said.textContent = text ?? focused?.getAttribute("aria-label") ??
      "Point at a leaf or a branch point, or move through them with the arrow keys; Enter opens an episode.";
  }

  describe(row) {
    const { id, success, length, split, parent, ends, episode } = this.forest;
    const origin = parent[row] === null ? "a root" : `branch of ${id[parent[row]]} at token ${split[row]}`;
    return `${id[row]}: ${success[row] ? "success" : "no success"}, return ${shown(this.forest.return[row])}, ` +
      `${plural(length[row], "token")}, ${plural(ends[row].length, "turn")}, ${origin}.` +
      (episode[row] === null ? " Its texts are not kept in this page." : "");
  }

  choose(row) {
    if (this.forest.episode[row] !== null) this.open(this.forest.episode[row]);
    this.focus(this.items.find(({ place }) => place.leaf && place.row === row));
  }

  // The way from the root to the chosen leaf: thicker, and its leaf is framed.
  mark() {
    const { parent, split, length } = this.forest;
    let way = "", end = length[this.row];
    for (let row = this.row; row !== null; [end, row] = [split[row], parent[row]]) way += this.trace(row, end);
    this.path.setAttribute("d", way);
    for (const item of this.items) {
      const current = item.place.leaf && item.place.row === this.row;
      item.setAttribute("tabindex", current ? 0 : -1);
      if (item.place.leaf) item.setAttribute("aria-pressed", String(current));
    }
  }

  focus(item) {
    for (const other of this.items) other.setAttribute("tabindex", other === item ? 0 : -1);
    item.focus();
  }

  move(event) {
    const from = event.target.place;
    if (!from || event.ctrlKey || event.metaKey || event.altKey) return;
    const { parent, split } = this.forest;
    const along = this.items.filter(({ place }) => place.row === from.row).sort((a, b) => a.place.token - b.place.token);
    const here = along.indexOf(event.target);
    const leaf = (row) => this.items.find(({ place }) => place.leaf && place.row === row);
    const origin = this.items.find(({ place }) =>
      !place.leaf && place.row === parent[from.row] && place.token === split[from.row]);
    const target = {
      ArrowUp: leaf(from.row - 1),
      ArrowDown: leaf(from.row + 1),
      ArrowLeft: along[here - 1] ?? origin,
      ArrowRight: along[here + 1],
      Home: leaf(0),
      End: leaf(this.forest.id.length - 1),
    }[event.key];
    if (target) this.focus(target);
    else if (from.leaf && (event.key === "Enter" || event.key === " ")) this.choose(from.row);
    else return;
    event.preventDefault();
  }
}
