// The trajectory viewer. Texts come from models and environments: they are only ever set as textContent.
"use strict";
(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const QUANTITIES = {
    energy: { label: "energy (nats)", ramp: "sequential" },
    weight: { label: "weight", ramp: "sequential" },
    advantage: { label: "advantage", ramp: "diverging" },
    shift: { label: "log-probability shift", ramp: "diverging" },
  };
  const NUMBERS = {
    energy: "energy", weight: "weight", advantage: "advantage", shift: "shift", logprob: "log-probability", coefficient: "c",
  };
  // cividis, and blue to orange: told apart with any colour vision, and in grey
  const SEQUENTIAL = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];
  const DIVERGING = {
    light: ["#0b5394", "#8fb8de", "#f2f2ef", "#f3b273", "#b45309"],
    dark: ["#7cc0f5", "#2f5d86", "#2b2d31", "#8a5420", "#ffb45c"],
  };
  const ROLES = {
    action: "#d55e00", reasoning: "#0072b2", think_tag: "#56b4e9", answer_tag: "#e69f00", other: "#999999",
  };
  const TINTS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2"];
  const EMPTY = new Set(["", " ", "_", ".", "-"]);

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function channels(hex) {
    return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  }

  function luminance(rgb) {
    const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function paint(target, rgb) {
    target.style.backgroundColor = `rgb(${rgb.map(Math.round).join(" ")})`;
    target.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff"; // the better of the two, at least 4.5 : 1
  }

  function between(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const first = Math.min(Math.floor(place), stops.length - 2);
    const [a, b] = [channels(stops[first]), channels(stops[first + 1])];
    return a.map((value, i) => value + (b[i] - value) * (place - first));
  }

  function shown(value) {
    return value === null || value === undefined ? "–" : String(value).replace("-", "−");
  }

  // The ends of a colour scale: 2nd and 98th percentile over an environment's episodes, around 0 for diverging ones.
  function scaleOf(environment, quantity) {
    const values = Object.values(data[environment]).flat().flatMap((episode) => episode.turns)
      .flatMap((turn) => turn.tokens[quantity]).filter((value) => value !== null).sort((a, b) => a - b);
    if (!values.length) return null;
    const at = (share) => values[Math.round(share * (values.length - 1))];
    const ramp = QUANTITIES[quantity].ramp;
    if (ramp === "diverging") {
      const end = Math.max(Math.abs(at(0.02)), Math.abs(at(0.98))) || 1;
      return { low: -end, high: end, stops: DIVERGING[dark.matches ? "dark" : "light"] };
    }
    const [low, high] = [at(0.02), at(0.98)];
    return { low: low === high ? low - 1 : low, high, stops: SEQUENTIAL };
  }

  const environment = root.querySelector("#viewer-environment");
  const colouring = root.querySelector("#viewer-colour");
  const beside = root.querySelector("#viewer-beside");
  const legend = root.querySelector(".legend");
  const numbers = root.querySelector(".numbers");
  const holder = root.querySelector(".panes");
  let tints = new Map();
  let scale = null;

  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, text]) => {
      const option = element("option", text);
      option.value = key;
      return option;
    }));
    if (options.some(([key]) => key === value)) select.value = value;
  }

  function vector(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function labelled(text, select) {
    const label = element("label", text);
    label.append(select);
    return label;
  }

  function colourToken(token) {
    const quantity = colouring.value, { role, values } = token.record;
    token.className = `token ${role === "action" ? "action" : ""}`;
    token.style.backgroundColor = token.style.color = "";
    if (token.record.sharer !== null) {
      token.classList.add("shared");
    } else if (quantity === "role") {
      if (ROLES[role]) paint(token, channels(ROLES[role]));
    } else if (values[quantity] === null || !scale) {
      token.classList.add("none");
    } else {
      paint(token, between(scale.stops, (values[quantity] - scale.low) / (scale.high - scale.low)));
    }
  }

  function showNumbers(token) {
    for (const other of root.querySelectorAll(".token.current")) other.classList.remove("current");
    token.classList.add("current");
    const { text, role, sampled, values } = token.record;
    const list = element("dl");
    const entries = [["token", JSON.stringify(text.slice(0, 200))], ["role", role.replace("_", " ") + (sampled ? "" : ", forced")]];
    for (const [key, label] of Object.entries(NUMBERS)) entries.push([label, shown(values[key])]);
    for (const [label, value] of entries) {
      const pair = element("div");
      pair.append(element("dt", label), element("dd", value));
      list.append(pair);
    }
    numbers.replaceChildren(list);
  }

  function originOf(forest, row, parent) {
    if (forest.parent[row] !== null) {
      return `Branch of ${forest.id[forest.parent[row]]} at token ${forest.split[row]}; the dotted tokens before it are shared.`;
    }
    return parent === null ? "" : `Its parent ${parent} is missing here or has other tokens: shown as a root.`;
  }

  function plural(count, noun) {
    return `${count} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
  }

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

  class Pane {
    constructor(offset) {
      this.section = element("section");
      this.section.setAttribute("aria-label", offset ? "Second episode" : "First episode");
      this.method = element("select", undefined, "method");
      this.episode = element("select", undefined, "episode");
      const controls = element("div", undefined, "controls");
      controls.append(labelled("Method", this.method), labelled("Episode", this.episode));
      this.content = element("div");
      this.section.append(controls, this.content);
      this.forest = new Forest((place) => {
        this.episode.value = String(place);
        this.draw();
      });
      this.offset = offset;
      this.method.addEventListener("change", () => this.chooseMethod(this.episode.value));
      this.episode.addEventListener("change", () => this.draw());
      this.content.addEventListener("focusin", (event) => this.reach(event.target));
      this.content.addEventListener("mouseover", (event) => {
        if (event.target.record) showNumbers(event.target);
      });
      this.content.addEventListener("click", (event) => { if (event.target.record) event.target.focus(); });
      this.content.addEventListener("keydown", (event) => this.move(event));
    }

    chooseEnvironment(method) {
      const methods = Object.keys(data[environment.value]).filter((name) => data[environment.value][name].length);
      fill(this.method, methods.map((name) => [name, name]), method ?? this.method.value);
      this.chooseMethod();
    }

    chooseMethod(kept) {
      const counts = new Map(), episodes = data[environment.value][this.method.value];
      const options = episodes.map((episode, index) => {
        const number = (counts.get(episode.letter) ?? 0) + 1;
        counts.set(episode.letter, number);
        const outcome = episode.success ? "success" : "no success";
        return [String(index), `state ${episode.letter}, episode ${number}: ${outcome}, return ${shown(episode.return)}`];
      });
      // Beside the first state's best episode its worst.
      const worst = episodes.filter((episode) => episode.letter === episodes[0].letter).length - 1;
      fill(this.episode, options, kept ?? String(this.offset * worst));
      this.draw();
    }

    draw() {
      const episodes = data[environment.value][this.method.value], place = Number(this.episode.value);
      const episode = episodes[place];
      const forest = episodes.find((other) => other.forest?.episode.includes(place))?.forest; // the first of its state has it
      const row = forest?.episode.indexOf(place);
      if (!forest) this.forest.figure.remove();
      else if (this.forest.figure.parentNode !== this.section) this.content.before(this.forest.figure);
      if (forest) this.forest.show(forest, row, episode.letter);
      const facts = element(
        "p",
        `${episode.success ? "Success" : "No success"}, return ${shown(episode.return)}, ${episode.turns.length} ` +
          `turn${episode.turns.length === 1 ? "" : "s"}, ended by: ${episode.end}. Seed ${episode.seed}, iteration ` +
          `${episode.iteration}, ${episode.id}.`,
        "quiet",
      );
      const origin = forest ? originOf(forest, row, episode.parent) : "";
      if (origin) facts.append(" ", element("strong", origin));
      const turns = episode.turns.map((turn, index) => {
        if (!forest || forest.split[row] === null) return this.turn(turn, index, 0, null);
        const start = forest.ends[row][index] - turn.tokens.text.length;
        return this.turn(turn, index, forest.split[row] - start, forest.id[forest.parent[row]]);
      });
      this.content.replaceChildren(facts, ...turns);
      this.tokens = [...this.content.querySelectorAll(".token")];
      if (this.tokens.length) this.tokens[0].tabIndex = 0;
      numbers.replaceChildren(element("p", "Point at a token, or move through them with the arrow keys, to see its numbers.", "quiet"));
      this.recolour();
    }

    // The response's tokens before its ``shared``-th are those of the episode ``sharer``; below 0, the split came before it.
    turn(turn, index, shared, sharer) {
      const card = element("section", undefined, "turn");
      const head = element("h4", `Turn ${index + 1} `);
      const why = turn.response === "cut" ? `cut by ${turn.ended}` : turn.response;
      const action = turn.valid ? `action ${turn.action}` : `no valid action (${why})`;
      head.append(element("span", `${action}, reward ${shown(turn.reward)}`));
      if (sharer !== null && shared >= turn.tokens.text.length) {
        card.classList.add("shared");
        head.append(element("span", `, shared with ${sharer}`));
      }
      const scene = element("div", undefined, "scene");
      if (turn.board) scene.append(board(turn.board));
      const observation = element("pre", turn.shown, "shown");
      observation.tabIndex = 0; // so that it can be scrolled with the keyboard
      observation.setAttribute("aria-label", `Shown in turn ${index + 1}`);
      observation.setAttribute("role", "region");
      if (sharer !== null && shared >= 0) {
        observation.classList.add("shared");
        observation.title = `shared with ${sharer}`;
      }
      const response = element("div", undefined, "tokens");
      response.setAttribute("role", "listbox");
      response.setAttribute("aria-orientation", "horizontal");
      response.setAttribute("aria-label", `Tokens of the response in turn ${index + 1}`);
      const { text, role, sampled } = turn.tokens;
      text.forEach((written, place) => {
        const visible = written === "" ? "‿" : written.replaceAll("\n", "↵\n").replaceAll("\t", "→");
        const token = element("span", visible, "token");
        const values = Object.fromEntries(Object.keys(NUMBERS).map((key) => [key, turn.tokens[key][place]]));
        const from = place < shared ? sharer : null;
        token.record = { text: written, role: role[place], sampled: sampled[place], values, turn: index, sharer: from };
        if (from !== null) token.title = `shared with ${from}`;
        token.tabIndex = -1;
        token.setAttribute("role", "option");
        token.setAttribute("aria-selected", "false");
        response.append(token);
      });
      const texts = element("div", undefined, "texts");
      texts.append(observation, response);
      scene.append(texts);
      card.append(head, scene);
      return card;
    }

    recolour() {
      for (const token of this.tokens) colourToken(token);
    }

    // One token of the pane is in the order of tabs; the others are reached from it by arrow keys.
    reach(token) {
      if (!token.record) return;
      for (const other of this.tokens) {
        other.tabIndex = -1;
        other.setAttribute("aria-selected", "false");
        other.removeAttribute("aria-label");
      }
      token.tabIndex = 0;
      token.setAttribute("aria-selected", "true");
      const { text, role, values, sharer } = token.record;
      const shares = sharer === null ? [] : [`shared with ${sharer}`];
      const said = Object.entries(NUMBERS).map(([key, label]) => `${label} ${shown(values[key])}`);
      token.setAttribute("aria-label", [text.slice(0, 200), role.replace("_", " "), ...shares, ...said].join(", "));
      showNumbers(token);
    }

    move(event) {
      const from = this.tokens.indexOf(event.target);
      if (from < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      const turn = event.target.record.turn;
      const own = this.tokens.filter((token) => token.record.turn === turn);
      const firstOf = (number) => this.tokens.find((token) => token.record.turn === number);
      const target = {
        ArrowRight: this.tokens[from + 1],
        ArrowLeft: this.tokens[from - 1],
        ArrowDown: firstOf(turn + 1),
        ArrowUp: firstOf(turn - 1),
        Home: own[0],
        End: own.at(-1),
      }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      target.focus();
    }
  }

  function board(rows) {
    const drawn = element("div", undefined, "board");
    drawn.setAttribute("role", "img");
    drawn.setAttribute("aria-label", `Board: ${rows.map((row) => row.join(" ")).join("; ")}`);
    drawn.style.gridTemplateColumns = `repeat(${rows[0].length}, auto)`;
    for (const cell of rows.flat()) {
      const square = element("span", cell);
      if (cell === "#") square.className = "wall";
      else if (EMPTY.has(cell)) square.className = "empty";
      else {
        if (!tints.has(cell)) tints.set(cell, TINTS[tints.size % TINTS.length]);
        if (/^\d$/.test(cell) || /^\[/.test(cell)) square.style.color = "";
        else paint(square, channels(tints.get(cell)));
      }
      drawn.append(square);
    }
    return drawn;
  }

  function drawLegend() {
    const quantity = colouring.value;
    const none = element("span", "no number: not trained on, or not known", "token none");
    if (quantity === "role") {
      legend.replaceChildren(...Object.entries(ROLES).map(([role, hex]) => {
        const chip = element("span", role.replace("_", " "), "chip");
        paint(chip, channels(hex));
        return chip;
      }));
    } else if (!scale) {
      legend.replaceChildren(none);
    } else {
      const ramp = element("span", undefined, "ramp");
      ramp.style.background = `linear-gradient(to right, ${scale.stops.join(", ")})`;
      const figures = (value) => shown(Number(value.toPrecision(3)));
      const together = element("span", undefined, "scale");
      together.append(`≤ ${figures(scale.low)}`, ramp, `≥ ${figures(scale.high)}`);
      legend.replaceChildren(element("span", QUANTITIES[quantity].label), together, none);
    }
    const action = element("span", "action", "token action");
    legend.append(action);
    action.append(" token");
  }

  const panes = [new Pane(0), new Pane(1)];

  function recolour() {
    scale = colouring.value === "role" ? null : scaleOf(environment.value, colouring.value);
    drawLegend();
    for (const pane of panes) if (pane.tokens) pane.recolour();
  }

  function arrange() {
    const two = beside.getAttribute("aria-pressed") === "true";
    holder.replaceChildren(...panes.slice(0, two ? 2 : 1).map((pane) => pane.section));
    holder.classList.toggle("two", two);
  }

  fill(environment, Object.keys(data).map((name) => [name, name]));
  environment.addEventListener("change", () => {
    tints = new Map();
    recolour();
    for (const pane of panes) pane.chooseEnvironment();
  });
  colouring.addEventListener("change", recolour);
  dark.addEventListener("change", recolour);
  beside.addEventListener("click", () => {
    beside.setAttribute("aria-pressed", String(beside.getAttribute("aria-pressed") !== "true"));
    arrange();
  });
  recolour();
  for (const pane of panes) pane.chooseEnvironment(root.dataset.method);
  arrange();
})();
