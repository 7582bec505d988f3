"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const P = data.parameters;
  const summary = data.summary;

  // --- small helpers -------------------------------------------------------------------------------------------------

  /** An element with attributes and children; text is set as text, never as markup. */
  function el(name, attributes = {}, ...children) {
    const svg = ["svg", "rect", "text", "line", "g", "title"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((c) => c !== null));
    return node;
  }
  const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
  function bytes(n) {
    let k = 0;
    while (Math.abs(n) >= 999.5 && k < UNITS.length - 1) { n /= 1000; k += 1; }
    return `${k === 0 ? n.toFixed(0) : n.toFixed(n >= 99.95 ? 0 : n >= 9.995 ? 1 : 2)} ${UNITS[k]}`;
  }
  const whole = (n) => n.toLocaleString("en-US");
  function count(n) {
    for (const [limit, word] of [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]])
      if (n >= limit) return `${(n / limit).toFixed(2)} ${word}`;
    return whole(n);
  }
  const percent = (part, all) => `${(100 * part / (all || 1)).toFixed(1)}%`;
  const shape = (s) => (s.length ? s.join(" × ") : "scalar");
  const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
  const PALETTE = ["#3b6fd4", "#d9662b", "#2c8f5a", "#9a55c7", "#c23b5e", "#178c9c", "#8a7420", "#6b6f7a", "#b0489a", "#4f7a1f"];
  /** A colour for one of n ranks: distinct ones for few, a walk round the colour wheel for many. */
  function colour(k, n) {
    if (n <= PALETTE.length) return PALETTE[k];
    return `hsl(${Math.round(360 * k / n)} 52% ${k % 2 ? 40 : 54}%)`;
  }

  /** A dotted name that may be broken after its dots. */
  const breakable = (text) => text.split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]);

  const tip = $("tip");
  /** Text beside the pointer, or beside the element that has the focus. */
  function hover(node, text) {
    const show = (x, y) => {
      tip.textContent = typeof text === "function" ? text() : text;
      tip.hidden = false;
      tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
    };
    node.addEventListener("pointermove", (e) => show(e.clientX, e.clientY));
    node.addEventListener("pointerleave", () => { tip.hidden = true; });
    node.addEventListener("focus", () => { const r = node.getBoundingClientRect(); show(r.left, r.bottom); });
    node.addEventListener("blur", () => { tip.hidden = true; });
    return node;
  }
  function tiles(into, pairs) {
    for (const [name, value, more] of pairs)
      into.append(el("div", {}, el("dt", {}, name), el("dd", {}, String(value), more ? el("small", {}, more) : null)));
  }

  // --- header and findings -------------------------------------------------------------------------------------------

  const verdict = data.verdict;
  const faults = verdict.findings.filter((f) => f.fault);
  const name = verdict.path.split("/").filter(Boolean);
  $("title").textContent = name.slice(-2).join(" / ");
  document.title = `${name.slice(-2).join("/")} – checkpoint report`;
  $("path").textContent = verdict.path;
  $("status").textContent = verdict.whole ? "whole" : `damaged: ${plural(faults.length, "fault")}`;
  $("status").className = `status ${verdict.whole ? "good" : "bad"}`;
  $("footer").textContent = `Made ${data.made_at} by ${data.made_by}.`;
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const checked = verdict.checked;
  const said = [];
  if (checked.tensors !== undefined) said.push(`${plural(checked.tensors, "tensor")}: every element held exactly once`);
  if (checked.digested) said.push(`${bytes(checked.digested)} compared with digests`);
  if (checked.digested_by_zip) said.push(`${bytes(checked.digested_by_zip)} compared with checksums in torch's files`);
  if (checked.compared) said.push(`${bytes(checked.compared)} of copies compared with each other`);
  if (checked.finite) said.push(`${bytes(checked.finite)} looked through for infinities and NaN`);
  $("checked").textContent = said.length ? `${said.join("; ")}.` : "The checkpoint could not be opened.";
  for (const f of verdict.findings)
    $("finding-list").append(el("li", { class: f.fault ? "fault" : "note" },
      el("b", {}, f.fault ? f.kind : "note"), f.text, f.subject ? el("code", {}, f.subject) : null));
  if (!verdict.findings.length) $("finding-list").append(el("li", {}, "Nothing to remark."));

  if (!summary) {
    for (const id of ["sizes", "cuts", "balance"]) $(id).hidden = true;
    tiles($("tiles"), [["Format", verdict.format]]);
    return;
  }
  const L = summary.layout;
  const layout = [`dp=${L.dp}`, ...["tp", "pp", "ep"].filter((k) => L[k] !== 1).map((k) => `${k}=${L[k]}`), `zero=${L.zero}`];
  tiles($("tiles"), [
    ["Step", summary.step === null ? "unknown" : whole(summary.step)],
    ["Layout", layout.join(" "), plural(L.dp * L.tp * L.pp, "rank")],
    ["Format", summary.format, summary.writer],
    ["Parameters", whole(P.name.length), `${count(summary.elements)} elements`],
    ["Tensors", bytes(summary.bytes), Object.keys(summary.states).join(", ")],
    ["Files", whole(summary.files), `${bytes(summary.file_bytes)}, ${summary.digested_files ? `${summary.digested_files} with digests` : "no digests"}`],
    ["Fragments", whole(summary.fragments), `held by ${summary.holders.length}`],
  ]);

  // --- treemap -------------------------------------------------------------------------------------------------------

  /** The tree of modules; a leaf has the parameter's index. */
  const root = { name: "model", bytes: 0, elements: 0, leaves: 0, children: new Map(), parent: null };
  P.name.forEach((full, index) => {
    let node = root;
    const parts = full.split(".");
    const path = [node];
    parts.forEach((part, k) => {
      const key = k === parts.length - 1 ? `${part}\0` : part;
      if (!node.children.has(key)) node.children.set(key, { name: part, bytes: 0, elements: 0, leaves: 0, children: new Map(), parent: node });
      node = node.children.get(key);
      path.push(node);
    });
    node.index = index;
    for (const one of path) { one.bytes += P.bytes[index]; one.elements += P.elements[index]; one.leaves += 1; }
  });
  /** Modules with a single child show as one with it. */
  function below(node) {
    while (node.children.size === 1 && [...node.children.values()][0].index === undefined) node = [...node.children.values()][0];
    return node;
  }
  /** Rectangles near to squares for these sizes (squarified treemap). */
  function squarify(sizes, x, y, w, h) {
    const out = [];
    const total = sizes.reduce((a, b) => a + b, 0) || 1;
    let areas = sizes.map((s) => s / total * w * h);
    let from = 0;
    while (from < areas.length) {
      const side = Math.min(w, h) || 1e-9;
      let sum = 0, best = Infinity, to = from, biggest = 0, smallest = Infinity;
      while (to < areas.length) {
        const s = sum + areas[to], big = Math.max(biggest, areas[to]), small = Math.min(smallest, areas[to]);
        const worst = Math.max(side * side * big / (s * s || 1), s * s / (side * side * small || 1e-9));
        if (worst > best) break;
        best = worst; sum = s; biggest = big; smallest = small; to += 1;
      }
      const thick = sum / side;
      let at = 0;
      for (let k = from; k < to; k += 1) {
        const long = areas[k] / (thick || 1e-9);
        out.push(w >= h ? [x, y + at, thick, long] : [x + at, y, long, thick]);
        at += long;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      from = to;
    }
    return out;
  }
  const MOST = 160, GROUPS = 64;
  const hue = new Map();
  /** Modules of the same role (the same name but for numbers) have the same colour everywhere. */
  function tint(node) {
    if (node.role) return tint(node.role);
    const role = node.name.replace(/\d+/g, "#");
    const place = role === "weight" || role === "bias" ? node.parent.name.replace(/\d+/g, "#") : role;
    if (!hue.has(place)) hue.set(place, hue.size);
    return `hsl(${(215 + hue.get(place) * 137.5) % 360} 42% 40%)`;
  }
  const described = (item) =>
    `${item.index === undefined ? item.name : P.name[item.index]}\n${bytes(item.bytes)}, ${percent(item.bytes, root.bytes)} of the checkpoint` +
    `\n${plural(item.leaves, "parameter")}${item.elements ? `, ${count(item.elements)} elements` : ""}`;
  /** What is in a module; of very many, neighbours together, to be looked into in turn. */
  function grouped(node) {
    const all = [...node.children.values()];
    if (all.length <= MOST) return all;
    const size = Math.ceil(all.length / GROUPS), out = [];
    for (let k = 0; k < all.length; k += size) {
      const some = all.slice(k, k + size);
      const sum = (what) => some.reduce((total, one) => total + one[what], 0);
      const group = { name: `${some[0].name} to ${some[some.length - 1].name}`, parent: node, role: some[0], children: new Map(), bytes: sum("bytes"), leaves: sum("leaves"), elements: sum("elements") };
      some.forEach((one, at) => group.children.set(at, one));
      out.push(group);
    }
    return out;
  }
  /** Draws what is in a module into a rectangle, in pixels; modules with room for it show what is in them. */
  function fill(box, node, x, y, w, h, depth) {
    const items = grouped(node).sort((a, b) => b.bytes - a.bytes);
    const places = squarify(items.map((i) => i.bytes), x, y, w, h);
    items.forEach((item, k) => {
      const [left, top, width, height] = places[k];
      if (width < 0.5 || height < 0.5) return;
      const inner = item.index === undefined ? below(item) : item;
      const frame = item.index === undefined && depth < 3 && width > 70 && height > 56;
      const label = item.index !== undefined ? [`${item.name}  ${shape(P.shape[item.index])}`, `${bytes(item.bytes)} · ${percent(item.bytes, root.bytes)}`]
        : frame ? [`${item.name}  ${bytes(item.bytes)} · ${percent(item.bytes, root.bytes)}`] : [item.name, `${bytes(item.bytes)} · ${percent(item.bytes, root.bytes)}`];
      const button = el("button", {
        // The keyboard stops at the modules of this level; Enter looks into one, whose own are stops then.
        type: "button", class: frame ? "frame" : null, tabindex: depth ? -1 : null,
        style: `left:${left}px;top:${top}px;width:${width}px;height:${height}px;${frame ? "" : `background:${tint(inner)}`}`,
        "aria-label": `${item.name}, ${bytes(item.bytes)}`, "data-index": item.index === undefined ? null : item.index,
        onclick: () => { if (item.index !== undefined) select(item.index, true); else treemap(item, true); },
      }, ...(width > 34 && height > 16 ? label.slice(0, height > 34 || frame ? 2 : 1).map((text) => el("span", {}, text)) : []));
      box.append(hover(button, described(item)));
      if (frame) fill(box, inner, left + 3, top + 20, width - 6, height - 23, depth + 1);
    });
  }
  function treemap(node, focus) {
    node = below(node);
    const box = $("treemap");
    box.replaceChildren();
    fill(box, node, 0, 0, box.clientWidth, box.clientHeight, 0);
    const crumbs = [];
    for (let up = node; up; up = up.parent) crumbs.unshift(up);
    $("crumbs").replaceChildren(...crumbs.flatMap((c, k) => [
      k ? "›" : "",
      el("button", { type: "button", onclick: () => treemap(c, true), "aria-current": c === node ? "location" : null }, c === root ? "whole model" : c.name),
    ]));
    here = node;
    if (focus && box.firstChild) box.firstChild.focus({ preventScroll: true });
    tip.hidden = true;
  }
  let here = root;

  // --- parameters and their fragments --------------------------------------------------------------------------------

  const holderNames = summary.holders.map((h) => h.name);
  const fragments = P.states.map((s) => P.state_sets[s].reduce((sum, one) => sum + one[2], 0));
  const lower = P.name.map((n) => n.toLowerCase());
  let order = { by: null, down: true }, limit = 200, chosen = null;
  function rows() {
    const wanted = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let found = P.name.map((_, k) => k).filter((k) => wanted.every((w) => lower[k].includes(w)));
    if (order.by) {
      const value = { name: (k) => P.name[k], bytes: (k) => P.bytes[k], fragments: (k) => fragments[k] }[order.by];
      const sign = order.down ? -1 : 1;
      found.sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    }
    const shown = found.slice(0, limit);
    $("params").replaceChildren(...shown.map((k) => el("tr", { "data-index": k, "aria-selected": k === chosen, onclick: () => select(k, false) },
      el("td", {}, el("button", { type: "button" }, ...breakable(P.name[k]))), el("td", {}, shape(P.shape[k])),
      el("td", { class: "num" }, bytes(P.bytes[k])), el("td", { class: "num" }, whole(fragments[k])))));
    $("count").replaceChildren(`${whole(found.length)} of ${plural(P.name.length, "parameter")}`);
    if (found.length > shown.length)
      $("count").append(`, ${whole(shown.length)} shown `, el("button", { type: "button", onclick: () => { limit += 1000; rows(); } }, "show more"));
  }
  for (const button of document.querySelectorAll("[data-sort]"))
    button.addEventListener("click", () => {
      order = { by: button.dataset.sort, down: order.by === button.dataset.sort ? !order.down : button.dataset.sort !== "name" };
      rows();
    });
  $("search").addEventListener("input", () => { limit = 200; rows(); });

  /** The rectangles of a map: one object each. */
  function boxes(map) {
    const out = [];
    for (let k = 0; k < map.boxes.length; k += 7) {
      const [row, height, column, width, first, last, n] = map.boxes.slice(k, k + 7);
      out.push({ row, height, column, width, first, last, n });
    }
    return out;
  }
  const span = (from, n) => (n === 1 ? `${whole(from)}` : `${whole(from)} to ${whole(from + n - 1)}`);
  const holding = (b) => (b.first === b.last ? holderNames[b.first] : `${holderNames[b.first]} to ${holderNames[b.last]}`);

  function select(k, scroll) {
    chosen = k;
    for (const row of $("params").children) row.setAttribute("aria-selected", Number(row.dataset.index) === k);
    const map = P.maps[P.map[k]], list = boxes(map), dims = P.shape[k];
    const detail = $("detail");
    const states = P.state_sets[P.states[k]].map(([state, type, n]) => `${state} ${type}, ${plural(n, "fragment")}`);
    const facts = [["Shape", shape(dims)], ["Kind", P.kind[k]], ["Size", `${bytes(P.bytes[k])}, ${count(P.elements[k])} elements`], ["Cut", P.cut[k]]];
    if (P.aliases[P.name[k]]) facts.push(["Also named", P.aliases[P.name[k]].join(", ")]);
    facts.push(["States", states.join("; ")]);
    detail.replaceChildren(el("h3", {}, ...breakable(P.name[k])),
      el("dl", {}, ...facts.flatMap(([a, b]) => [el("dt", {}, a), el("dd", {}, b)])));
    if (!list.length) { detail.append(el("p", {}, "It has no elements.")); return; }
    const height = map.rows === 1 ? 44 : Math.max(90, Math.min(340, 560 * map.rows / Math.max(map.columns, 1)));
    const drawing = el("svg", { class: "map", viewBox: `0 0 1000 ${height}`, height, preserveAspectRatio: "none", role: "img", "aria-label": `${P.name[k]} in ${plural(map.fragments, "fragment")}` });
    const table = el("tbody");
    list.forEach((b, at) => {
      const where = [];
      if (dims.length > 1) where.push(`rows ${span(b.row, b.height)}`);
      where.push(`${dims.length > 1 ? "columns" : "elements"} ${span(b.column, b.width)}`);
      const text = `${holding(b)}\n${where.join(", ")}\n${b.n > 1 ? `${plural(b.n, "fragment")}, drawn together` : plural(b.height * b.width, "element")}`;
      const rect = el("rect", {
        x: 1000 * b.column / map.columns, y: height * b.row / map.rows,
        width: 1000 * b.width / map.columns, height: height * b.height / map.rows,
        fill: colour(Math.round((b.first + b.last) / 2), holderNames.length),
      });
      if (list.length > 100) rect.setAttribute("stroke", "none");
      drawing.append(hover(rect, text));
      if (at < 64) {
        const line = el("tr", {}, el("td", {}, holding(b)), el("td", {}, where.join(", ")), el("td", { class: "num" }, b.n > 1 ? plural(b.n, "fragment") : whole(b.height * b.width)));
        line.addEventListener("pointerenter", () => rect.classList.add("on"));
        line.addEventListener("pointerleave", () => rect.classList.remove("on"));
        table.append(line);
      }
    });
    detail.append(drawing, el("div", { class: "axes" },
      el("span", {}, dims.length > 2 ? `rows: ${dims.slice(0, -1).join(" × ")}, downward` : dims.length === 2 ? `rows: ${whole(map.rows)}, downward` : ""),
      el("span", {}, dims.length > 1 ? `columns: ${whole(map.columns)}` : plural(map.columns, "element"))));
    const held = [...new Set(list.flatMap((b) => (b.first === b.last ? [b.first] : [])))].sort((a, b) => a - b);
    if (held.length && held.length <= 16)
      detail.append(el("ul", { class: "legend" }, ...held.map((h) => el("li", {}, el("i", { style: `background:${colour(h, holderNames.length)}` }), holderNames[h]))));
    detail.append(el("div", { class: "fragments", tabindex: 0 }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, "Held by"), el("th", {}, "Where"), el("th", { class: "num" }, "Elements"))), table)));
    if (list.length > 64 || list.some((b) => b.n > 1))
      detail.append(el("p", { class: "count" }, `${plural(map.fragments, "fragment")} in all; ucp inspect --param lists each.`));
    if (scroll) { detail.scrollIntoView({ block: "nearest" }); detail.focus({ preventScroll: true }); }
  }

  // --- charts --------------------------------------------------------------------------------------------------------

  /** Bars of values; more than fit are drawn as the largest of each group. */
  function bars(into, values, labels, what) {
    const MANY = 160, W = into.clientWidth || 1000, H = 190, left = 64, bottom = 22;
    const n = Math.min(values.length, MANY);
    const groups = Array.from({ length: n }, (_, k) => [Math.floor(k * values.length / n), Math.floor((k + 1) * values.length / n)]);
    const top = Math.max(...values, 1);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const svg = el("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${what}: ${bytes(Math.min(...values))} to ${bytes(top)}, mean ${bytes(mean)}` });
    for (const part of [0, 0.5, 1]) {
      const y = 8 + (H - bottom - 8) * (1 - part);
      svg.append(el("line", { class: "grid", x1: left, x2: W, y1: y, y2: y }), el("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, bytes(top * part)));
    }
    const step = (W - left) / n, gap = Math.min(step * 0.2, 4);
    groups.forEach(([a, b], k) => {
      const value = Math.max(...values.slice(a, b));
      const h = (H - bottom - 8) * value / top;
      const label = b - a > 1 ? `${labels[a]} to ${labels[b - 1]}: at most ` : `${labels[a]}: `;
      svg.append(hover(el("rect", { class: "bar", x: left + k * step + gap / 2, y: H - bottom - h, width: Math.min(step - gap, 90), height: h }), `${label}${bytes(value)}`));
    });
    const y = 8 + (H - bottom - 8) * (1 - mean / top);
    svg.append(el("line", { class: "mean", x1: left, x2: W, y1: y, y2: y }));
    svg.append(el("text", { x: left, y: H - 6 }, labels[0]), el("text", { x: W, y: H - 6, "text-anchor": "end" }, values.length > 1 ? `${labels[values.length - 1]}  (dashed: mean)` : ""));
    into.append(svg);
  }

  const held = summary.holders.map((h) => h.bytes);
  const mean = held.reduce((a, b) => a + b, 0) / (held.length || 1);
  $("balance-lead").textContent = `${plural(held.length, "rank or file").replace("rank or files", "ranks or files")} hold ${bytes(held.reduce((a, b) => a + b, 0))}: ${bytes(Math.min(...held))} to ${bytes(Math.max(...held))}, ${bytes(mean)} on average; the largest is ${(Math.max(...held) / (mean || 1)).toFixed(2)} times that.`;
  if (held.length) bars($("balance-chart"), held, holderNames, "bytes held");

  if (data.plan) {
    const plan = data.plan;
    $("plan").hidden = false;
    $("plan-h").textContent = `A resume on ${plan.layout}`;
    tiles($("plan-tiles"), [
      ["Ranks", whole(plan.ranks)], ["Read in all", bytes(plan.bytes), `${percent(plan.bytes, plan.stored)} of the tensors' bytes`],
      ["Largest rank", bytes(Math.max(...plan.rank_bytes)), `rank ${plan.largest}`],
      ["Files", whole(plan.files), `${Math.min(...plan.rank_files)} to ${Math.max(...plan.rank_files)} by a rank`],
      ...(plan.stages ? [["Stages begin at layers", plan.stages.slice(0, -1).join(", "), `of ${plan.stages[plan.stages.length - 1]}`]] : []),
    ]);
    const rowsN = plan.rows.length, columnsN = plan.columns.length, cell = Math.min(40, 480 / Math.max(columnsN, 1), 300 / Math.max(rowsN, 1));
    const top = Math.max(1, ...plan.matrix.flat());
    const tall = Math.max(cell, 4), W = 110 + columnsN * tall, H = rowsN * tall + 22;
    const svg = el("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, style: `max-width:${Math.max(W, 260)}px`, role: "img", "aria-label": "bytes from each source to each rank" });
    plan.matrix.forEach((row, r) => {
      if (rowsN <= 12 || r === 0 || r === rowsN - 1) svg.append(el("text", { x: 102, y: Math.max(r * tall + tall / 2 + 4, 10), "text-anchor": "end" }, plan.rows[r].length > 16 ? `${plan.rows[r].slice(0, 15)}…` : plan.rows[r]));
      row.forEach((value, c) => svg.append(hover(el("rect", { x: 110 + c * tall, y: r * tall, width: tall - (tall > 8 ? 1 : 0), height: tall - (tall > 8 ? 1 : 0), style: `fill:rgba(var(--heat), ${value ? 0.12 + 0.88 * value / top : 0.03})` }),
        `${plan.rows[r]} → ${plan.columns[c]}\n${bytes(value)}`)));
    });
    svg.append(el("text", { x: 110, y: H - 4 }, plan.columns[0]), columnsN > 3 ? el("text", { x: W, y: H - 4, "text-anchor": "end" }, plan.columns[columnsN - 1]) : null);
    $("matrix").className = "matrix";
    $("matrix").append(svg);
    bars($("plan-chart"), plan.rank_bytes, plan.rank_bytes.map((_, k) => `rank ${k}`), "bytes read");
  }

  if (data.timings.length) {
    $("timings").hidden = false;
    for (const what of ["save", "load"]) {
      const records = data.timings.filter((t) => t.what === what).sort((a, b) => a.rank - b.rank);
      if (!records.length) continue;
      // Waiting for others comes last, in grey: the rank that the others wait for has the longest coloured bar.
      const stages = [...new Set(records.flatMap((r) => Object.keys(r.seconds)))].sort((a, b) => (a === "wait") - (b === "wait"));
      const fill = (stage, s) => (stage === "wait" ? "var(--line)" : PALETTE[s % PALETTE.length]);
      const all = (r) => Object.values(r.seconds).reduce((a, b) => a + b, 0);
      const total = (r) => all(r) - (r.seconds.wait || 0);
      const longest = Math.max(...records.map(all)) || 1;
      const shown = records.length > 64 ? [...records].sort((a, b) => total(b) - total(a)).slice(0, 64) : records;
      const within = (r) => Object.entries(r.overlapping || {}).map(([stage, s]) => `, of which ${stage} ${s.toFixed(3)} s (threads together)`).join("");
      const row = 18, W = 1000, H = shown.length * row + 6;
      const svg = el("svg", { class: "chart stages", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${what}: seconds by rank and stage` });
      shown.forEach((r, k) => {
        svg.append(el("text", { x: 64, y: k * row + 13, "text-anchor": "end" }, `rank ${r.rank}`));
        let x = 72;
        stages.forEach((stage, s) => {
          const w = (W - 240) * (r.seconds[stage] || 0) / longest;
          svg.append(hover(el("rect", { x, y: k * row + 2, width: w, height: row - 4, style: `fill:${fill(stage, s)}` }), `rank ${r.rank}, ${stage}: ${(r.seconds[stage] || 0).toFixed(3)} s${stage === "read" ? within(r) : ""}`));
          x += w;
        });
        svg.append(el("text", { x: x + 6, y: k * row + 13 }, `${total(r).toFixed(2)} s${r.wall === undefined ? "" : ` of work in ${r.wall.toFixed(2)} s`}`));
      });
      $("timings-chart").append(el("h3", {}, `Last ${what}${shown.length < records.length ? `: the slowest ${shown.length} of ${records.length} ranks` : ""}`),
        el("ul", { class: "legend" }, ...stages.map((s, k) => el("li", {}, el("i", { style: `background:${fill(s, k)}` }), s === "wait" ? "wait, for other ranks (not in the sums)" : s))), svg);
    }
  }

  if (data.timeline.length > 1) {
    $("timeline").hidden = false;
    const lanes = [...new Set(data.timeline.map((t) => t.what))];
    const first = data.timeline[0].time, last = data.timeline[data.timeline.length - 1].time;
    const row = 22, W = 1000, H = lanes.length * row + 24;
    const at = (t) => 110 + (W - 130) * (t - first) / (last - first || 1);
    const svg = el("svg", { class: "chart stages", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "what happened to the run, over time" });
    lanes.forEach((lane, k) => svg.append(el("text", { x: 100, y: k * row + 15, "text-anchor": "end" }, lane)));
    let world = null;
    for (const t of data.timeline) {
      const k = lanes.indexOf(t.what), x = at(t.time);
      const text = `${t.what} ${t.step}: ${new Date(t.time * 1000).toISOString().slice(0, 19)}, ${t.world} ranks, ${Number(t.seconds).toFixed(2)} s`;
      svg.append(hover(el("rect", { x: x - 2, y: k * row + 4, width: 4, height: row - 8, style: `fill:${PALETTE[k % PALETTE.length]}` }), text));
      if (t.world !== world) svg.append(el("text", { x, y: H - 6 }, `${t.world} ranks`));
      world = t.world;
    }
    $("timeline-chart").append(svg);
  }

  // --- begin ---------------------------------------------------------------------------------------------------------

  rows();
  treemap(root, false);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; treemap(here, false); } });
  addEventListener("beforeprint", () => treemap(here, false));
  /** The parameter that the address asks for (report.html#its.name), else one that is cut the most. */
  const asked = () => P.name.indexOf(decodeURIComponent(location.hash.slice(1)));
  const most = P.name.reduce((best, _, k) => (fragments[k] > fragments[best] ? k : best), 0);
  if (P.name.length) select(asked() < 0 ? most : asked(), false);
  addEventListener("hashchange", () => { if (asked() >= 0) select(asked(), true); });
})();
