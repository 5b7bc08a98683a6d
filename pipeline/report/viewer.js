// The trajectory viewer.
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
  const ROLES = Object.fromEntries(
    ["action", "reasoning", "think_tag", "answer_tag", "other"].map((role) => [role, colour(`--role-${role}`)]),
  );
  const TINTS = ["sky", "orange", "green", "purple", "yellow", "vermillion", "blue"].map((name) => colour(`--${name}`));
  const EMPTY = new Set(["", " ", "_", ".", "-"]);

  function between(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const first = Math.min(Math.floor(place), stops.length - 2);
    const [a, b] = [channels(stops[first]), channels(stops[first + 1])];
    return a.map((value, i) => value + (b[i] - value) * (place - first));
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
