"use strict";
// The table: a click on a heading sorts by it.
(() => {
  const table = document.getElementById("figures");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const text = row.cells[column].dataset.value;
      const number = Number(text);
      return text !== "" && !Number.isNaN(number) ? number : text;
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what was not measured comes last
      const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -sign : sign;
    };
    [...body.rows].sort(order).forEach((row) => body.append(row));
  }));
})();

// The viewer: what each head holds of an image, token by token.
(() => {
  const source = document.getElementById("traces");
  if (!source) return;
  const traces = JSON.parse(source.textContent);
  const STAYS = 65535;
  const CACHED = ["anchor", "recent", "kept", "newest"];
  const byId = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const decoded = new WeakMap();
  const decode = (item) => {
    if (!decoded.has(item)) {
      decoded.set(item, {
        gone: new Uint16Array(bytes(item.gone).buffer),
        places: new Uint16Array(bytes(item.places).buffer),
        scores: new Float32Array(bytes(item.scores).buffer),
      });
    }
    return decoded.get(item);
  };
  const state = { layer: 0, head: 0, item: 0, moment: 0, timer: 0 };
  const options = (select, texts, chosen) => {
    select.replaceChildren(...texts.map((text, index) => new Option(text, index, false, index === chosen)));
  };

  class Panel {
    constructor(root, chosen) {
      this.root = root;
      this.choice = root.querySelector(".policy");
      this.grid = root.querySelector(".grid");
      this.picture = root.querySelector(".picture");
      this.cursor = -1;
      options(this.choice, traces.map((t) => `${t.label}, ${t.budget}`), chosen);
      this.choice.addEventListener("change", () => { this.build(); refreshChoices(); draw(); });
      this.grid.addEventListener("pointerover", (event) => this.point(event.target.dataset.place));
      this.grid.addEventListener("click", (event) => this.point(event.target.dataset.place));
      this.grid.addEventListener("keydown", (event) => this.key(event));
      this.grid.addEventListener("focus", () => { if (this.cursor < 0) this.point(0); });
      this.build();
    }
    get trace() { return traces[Number(this.choice.value)]; }
    get layer() { return this.trace.layers[Math.min(state.layer, this.trace.layers.length - 1)]; }
    get head() { return Math.min(state.head, this.layer.heads - 1); }
    get item() { return this.layer.items[Math.min(state.item, this.layer.items.length - 1)]; }
    get line() { return this.trace.cols + this.trace.line_break; }
    // How many tokens of the image have come: those of a group come together.
    get moment() { return this.groupAt(state.moment).end; }
    // The group that ends the first so many tokens; one token, where they come one by one.
    groupAt(moment) {
      const { groups } = this.trace;
      if (!groups || moment < 1) return { number: -1, start: Math.max(moment - 1, 0), end: moment };
      let start = 0;
      let number = 0;
      while (start + groups[number] < moment) { start += groups[number]; number += 1; }
      return { number, start, end: Math.min(start + groups[number], this.tokens) };
    }
    // The moment that lies by so many tokens, or groups, from this one.
    step(by) {
      const { groups } = this.trace;
      if (!groups) return state.moment + by;
      const { number, start, end } = this.groupAt(state.moment);
      return by < 0 ? start : Math.min(end + groups[number + 1], this.tokens) || this.tokens;
    }
    get tokens() { return Math.min(this.trace.rows * this.line, this.trace.seen - this.trace.prefix); }
    build() {
      const { rows, prefix, line_break, cols, order } = this.trace;
      // Of each place of the grid, which token of the image it is as they come.
      this.arrivals = Array.from({ length: rows * this.line }, (_, place) => place);
      if (order) order.forEach((place, came) => { this.arrivals[place] = came; });
      this.grid.style.gridTemplateColumns = `repeat(${cols}, 1fr)${line_break ? " .4fr" : ""}`;
      this.cells = Array.from({ length: rows * this.line }, (_, place) => {
        const cell = document.createElement("i");
        cell.dataset.place = place;
        cell.dataset.position = this.arrivals[place] + prefix;
        if (place % this.line >= cols) cell.className = "break";
        return cell;
      });
      this.grid.replaceChildren(...this.cells);
      this.cursor = -1;
    }
    // What the token of a place is at the moment when `moment` tokens of the image have come.
    stateOf(place) {
      const { moment } = this;
      const came = this.arrivals[place];
      const seen = this.trace.prefix + moment;
      const position = came + this.trace.prefix;
      if (came >= moment) {
        const pass = this.passOf(seen - 1);
        if (!pass || position >= pass.seen + pass.staged) return "future";
        return this.asks(pass) ? "asked" : "rejected";
      }
      const newest = this.groupAt(moment);
      const gone = decode(this.item).gone[this.head * this.trace.seen + position];
      if (gone !== STAYS && gone <= seen) {
        const lately = this.trace.groups ? gone > this.trace.prefix + newest.start : seen - gone < this.line;
        return lately ? "new-gone" : "gone";
      }
      if (this.trace.groups && came >= newest.start) return "newest";
      const roles = this.trace.roles;
      if (came < roles.anchors) return "anchor";
      if (roles.by_recency) return "recent";
      const current = Math.floor(Math.max(moment - 1, 0) / this.line);
      const lines = Math.max(roles.recent_lines, 0);
      if (roles.recent_lines >= 0 && Math.floor(came / this.line) >= current - lines) return "recent";
      if (moment - came <= roles.recent_tokens) return "recent";
      return "kept";
    }
    // Whether what a pass did not keep were queries for the next group, and not tokens that it rejected.
    asks({ seen, staged, accepted }) {
      const { groups, prefix } = this.trace;
      if (!groups) return false;
      const kept = this.groupAt(seen + accepted - prefix);
      return kept.end === seen + accepted - prefix && groups[kept.number + 1] === staged - accepted;
    }
    // The commit that kept the token at a position; null where tokens came one by one.
    passOf(position) {
      const number = this.trace.passes.findIndex(([seen, , kept]) => seen <= position && position < seen + kept);
      if (number < 0) return null;
      const [seen, staged, accepted] = this.trace.passes[number];
      return { number, seen, staged, accepted };
    }
    scoreOf(place) {
      const item = this.item;
      const { places, scores } = decode(item);
      const seen = this.trace.prefix + this.moment;
      let newest = -1;
      item.decided.forEach((moment, index) => { if (moment <= seen) newest = index; });
      if (newest < 0) return null;
      const heads = this.layer.heads;
      const size = item.sizes[newest];
      const before = item.sizes.slice(0, newest).reduce((sum, n) => sum + n, 0) * heads;
      const first = before + this.head * size;
      for (let n = first; n < first + size; n += 1) {
        if (places[n] === this.arrivals[place] + this.trace.prefix) return { score: scores[n], decided: item.decided[newest] };
      }
      return null;
    }
    draw() {
      let held = 0;
      this.cells.forEach((cell, place) => {
        const now = this.stateOf(place);
        if (cell.dataset.state !== now) cell.dataset.state = now;
        if (CACHED.includes(now)) held += 1;
      });
      const { prefix } = this.trace;
      this.root.querySelector(".count").textContent =
        `layer ${this.layer.layer}, head ${this.head}: ${held} of ${this.moment} tokens cached`
        + (prefix ? `, and ${prefix} pinned` : "") + this.told(prefix + this.moment - 1);
      this.drawPicture();
      this.tell();
    }
    told(position) {
      const pass = this.passOf(position);
      if (!pass) return "";
      if (this.asks(pass)) {
        return `; pass ${pass.number + 1} of ${this.trace.passes.length} asked for ${pass.staged - pass.accepted} more`;
      }
      return `; pass ${pass.number + 1} of ${this.trace.passes.length} accepted ${pass.accepted} of ${pass.staged} staged`;
    }
    drawPicture() {
      const { rows, cols, images } = this.trace;
      this.picture.parentElement.hidden = !images;
      if (!images) return;
      const { scale, channels } = this.trace;
      const [width, height] = [cols * scale, rows * scale];
      this.picture.width = width;
      this.picture.height = height;
      const values = bytes(images[Math.min(state.item, images.length - 1)]);
      const context = this.picture.getContext("2d");
      const picture = context.createImageData(width, height);
      for (let y = 0; y < height; y += 1) {
        for (let x = 0; x < width; x += 1) {
          const place = Math.floor(y / scale) * this.line + Math.floor(x / scale);
          const pixel = y * width + x;
          if (this.arrivals[place] >= this.moment) continue; // a new picture is transparent
          for (let n = 0; n < 3; n += 1) picture.data[4 * pixel + n] = values[pixel * channels + n % channels];
          picture.data[4 * pixel + 3] = 255;
        }
      }
      context.putImageData(picture, 0, 0);
    }
    point(place) {
      if (place === undefined) return;
      if (this.cursor >= 0) this.cells[this.cursor].classList.remove("cursor");
      this.cursor = Number(place);
      this.cells[this.cursor].classList.add("cursor");
      this.tell();
    }
    tell() {
      const about = this.root.querySelector(".about");
      if (this.cursor < 0) { about.textContent = ""; return; }
      const place = this.cursor;
      const came = this.arrivals[place];
      const position = came + this.trace.prefix;
      const words = {
        anchor: "anchor or sink", recent: "recent", kept: "kept by its score", newest: "of the newest group",
        "new-gone": this.trace.groups ? "evicted for the newest group" : "evicted within the last line",
        gone: "evicted", future: "not drawn yet", rejected: "staged, and rejected", asked: "asked for, and not cached",
      };
      const parts = [`position ${position}`, `row ${Math.floor(place / this.line)}`, `column ${place % this.line}`];
      if (came < this.moment) parts.push(`age ${this.moment - came}`);
      const pass = came < this.moment && this.passOf(position);
      if (pass) parts.push(`${this.trace.groups ? "cached" : "accepted"} in pass ${pass.number + 1}`);
      const found = this.scoreOf(place);
      if (found && Number.isFinite(found.score)) {
        parts.push(`score ${found.score.toPrecision(3)} at the decision before token ${found.decided}`);
      }
      const gone = decode(this.item).gone[this.head * this.trace.seen + position];
      const now = this.stateOf(place);
      if (now === "gone" || now === "new-gone") parts.push(`gone with token ${gone - 1}`);
      about.textContent = `${words[now]}: ${parts.join(", ")}`;
    }
    key(event) {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.line, ArrowDown: this.line }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      const to = this.cursor + move;
      if (to >= 0 && to < this.cells.length) this.point(to);
    }
  }

  const slider = byId("moment");
  const panels = [];
  const draw = () => {
    slider.value = state.moment;
    const { line, moment, trace } = panels[0];
    byId("moment-text").textContent = `${moment} tokens, ` + (trace.groups
      ? `group ${panels[0].groupAt(moment).number + 1} of ${trace.groups.length}`
      : `line ${Math.floor(Math.max(moment - 1, 0) / line)}`);
    panels.forEach((panel) => panel.draw());
  };
  const refreshChoices = () => {
    const layers = Math.max(...panels.map((p) => p.trace.layers.length));
    const longest = panels.find((p) => p.trace.layers.length === layers);
    options(byId("layer"), longest.trace.layers.map((l) => String(l.layer)), Math.min(state.layer, layers - 1));
    const heads = Math.max(...panels.map((p) => p.layer.heads));
    options(byId("head"), Array.from({ length: heads }, (_, n) => String(n)), Math.min(state.head, heads - 1));
    const items = Math.max(...panels.map((p) => p.layer.items.length));
    const prompts = panels[0].trace.prompts || [];
    const named = (n) => (prompts[n] === undefined ? String(n + 1) : `${n + 1}: ${prompts[n]}`);
    options(byId("item"), Array.from({ length: items }, (_, n) => named(n)), Math.min(state.item, items - 1));
    byId("item-label").hidden = items < 2;
    slider.max = Math.max(...panels.map((p) => p.tokens));
    state.moment = Math.min(state.moment, Number(slider.max));
  };
  // Two policies that differ, where there are two: the second and third, as the first is mostly full.
  const first = traces.length > 2 ? 1 : 0;
  const second = traces.findIndex((t, n) => n > first && t.budget === traces[first].budget);
  panels.push(new Panel(byId("left"), first));
  if (traces.length > 1) panels.push(new Panel(byId("right"), second > 0 ? second : (first + 1) % traces.length));
  else {
    byId("right").remove();
    document.querySelector(".panels").style.gridTemplateColumns = "minmax(0, 720px)";
  }
  refreshChoices();
  state.moment = Math.round(Number(slider.max) * 0.6);

  const stop = () => { clearInterval(state.timer); state.timer = 0; byId("play").textContent = "▶"; byId("play").setAttribute("aria-label", "play"); };
  const play = () => {
    if (state.timer) { stop(); return; }
    if (state.moment >= Number(slider.max)) state.moment = 0;
    byId("play").textContent = "❚❚";
    byId("play").setAttribute("aria-label", "pause");
    state.timer = setInterval(() => {
      go(1);
      if (state.moment >= Number(slider.max)) stop();
    }, panels[0].trace.groups ? 250 : 33);
  };
  const go = (by) => { state.moment = Math.min(Math.max(panels[0].step(by), 0), Number(slider.max)); draw(); };
  slider.addEventListener("input", () => { state.moment = Number(slider.value); draw(); });
  slider.addEventListener("keydown", (event) => {
    const by = { ArrowUp: panels[0].line, ArrowDown: -panels[0].line }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    go(by);
  });
  byId("play").addEventListener("click", play);
  ["layer", "head", "item"].forEach((name) => byId(name).addEventListener("change", (event) => {
    state[name] = Number(event.target.value);
    refreshChoices();
    draw();
  }));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, button, a, summary, .scroll, .chart") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by !== undefined) { event.preventDefault(); go(by); }
    if (event.key === " ") { event.preventDefault(); play(); }
  });
  draw();
})();
