// Draws what crates/sail-train/src/report/mod.rs wrote. Texts of data sets and models become text nodes, never markup.

/** What the page is about, and what follows from it; `show` sets them. */
let report, several, stages, marks;

/** What the reader has chosen, by figure, so that it stays as it is when a page that is served is drawn anew. */
const choices = new Map();

function remembered(name, usual) {
  if (!choices.has(name)) choices.set(name, usual);
  return choices.get(name);
}

// ---- Elements ----

/** An element with attributes, or with listeners for names that begin with `on`, and children. */
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for a drawing. */
function drawn(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null) element.setAttribute(key, value);
  }
  // One by one: a call takes some ten thousand arguments at most.
  for (const child of children.flat()) element.append(child);
  return element;
}

/** A table: names of columns, and rows of cells, of which numbers stand at the right. The first column heads its row. */
function table(caption, columns, rows) {
  const head = el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)));
  const cell = (value) => el("td", typeof value === "number" ? { class: "number" } : {}, shown(value));
  const row = ([first, ...others]) => el("tr", {}, el("th", { scope: "row" }, shown(first)), others.map(cell));
  const body = el("tbody", {}, rows.map(row));
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, head), body));
}

/** Puts children, however many, in place of those that an element has. */
function put(element, children) {
  element.replaceChildren(fill(new DocumentFragment(), {}, children));
}

// ---- Numbers ----

function shown(value) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  return value.toFixed(size >= 100 ? 1 : 4);
}

function seconds(value) {
  return value >= 60 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : `${value.toFixed(1)} s`;
}

/** The least and the greatest of some numbers, however many. */
function span(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** About `count` round numbers between two. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

// ---- Charts ----

const HIGH = 240, LEFT = 58, RIGHT = 10, TOP = 8, BOTTOM = 28;

/**
 * A figure with one line for each of `series`, `{ name, x, y, low?, high? }`. Dragging zooms, and so do + and - around the
 * point that the arrow keys move; Escape or a double click shows all again.
 */
function chart({ title, unit, series, marks = [] }) {
  // `view` null is all of it, however far that reaches.
  const kept = remembered(title, { view: null, off: new Set() });
  series = series.map((line, index) => ({ ...line, colour: `var(--c${index % 8})`, on: !kept.off.has(line.name) }));
  const all = span(series.flatMap((s) => s.x));
  if (all[0] === all[1]) all[1] += 1;
  let view = (kept.view ?? all).slice(), at = null, dragged = null, wide = 600;
  const picture = drawn("svg", { id: `figure-${slug(title)}`, tabindex: "0", role: "img" });
  const readout = el("output", { "aria-live": "polite" });
  const toX = (x) => LEFT + ((x - view[0]) / (view[1] - view[0])) * (wide - LEFT - RIGHT);
  const fromX = (pixel) => view[0] + ((pixel - LEFT) / (wide - LEFT - RIGHT)) * (view[1] - view[0]);
  const place = (event) => {
    const box = picture.getBoundingClientRect();
    return Math.min(wide - RIGHT, Math.max(LEFT, event.clientX - box.left));
  };

  function within(line) {
    const kept = [];
    line.x.forEach((x, i) => { if (x >= view[0] && x <= view[1] && line.y[i] !== null) kept.push(i); });
    return kept;
  }

  function draw() {
    const lines = series.filter((line) => line.on);
    const values = lines.flatMap((line) => within(line).flatMap((i) => [line.y[i], line.low?.[i] ?? line.y[i], line.high?.[i] ?? line.y[i]]));
    let [low, high] = values.length ? span(values) : [0, 1];
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
    const toY = (y) => HIGH - BOTTOM - ((y - low) / (high - low)) * (HIGH - TOP - BOTTOM);
    const parts = [];
    for (const y of ticks(low, high, 5)) {
      parts.push(drawn("line", { x1: LEFT, x2: wide - RIGHT, y1: toY(y), y2: toY(y), stroke: "var(--grid)" }),
        drawn("text", { class: "axis", x: LEFT - 6, y: toY(y) + 4, "text-anchor": "end" }, short(y)));
    }
    for (const x of ticks(view[0], view[1], 6).filter(Number.isInteger)) {
      parts.push(drawn("text", { class: "axis", x: toX(x), y: HIGH - 10, "text-anchor": "middle" }, short(x)));
    }
    for (const mark of marks.filter((mark) => mark.x >= view[0] && mark.x <= view[1])) {
      parts.push(drawn("line", { x1: toX(mark.x), x2: toX(mark.x), y1: TOP, y2: HIGH - BOTTOM, stroke: "var(--line)", "stroke-dasharray": "4 4" },
        drawn("title", {}, mark.name)));
    }
    for (const line of lines) {
      const kept = within(line);
      const path = (of) => kept.map((i) => `${toX(line.x[i]).toFixed(1)},${toY(of[i] ?? line.y[i]).toFixed(1)}`);
      if (line.low) {
        const around = [...path(line.low), ...path(line.high).reverse()].join(" ");
        parts.push(drawn("polygon", { points: around, fill: line.colour, opacity: "0.15" }));
      }
      parts.push(drawn("polyline", { points: path(line.y).join(" "), fill: "none", stroke: line.colour, "stroke-width": "2", "vector-effect": "non-scaling-stroke" }));
      if (kept.length < 40) kept.forEach((i) => parts.push(drawn("circle", { cx: toX(line.x[i]), cy: toY(line.y[i]), r: 3, fill: line.colour })));
    }
    if (at !== null) parts.push(drawn("line", { x1: toX(at), x2: toX(at), y1: TOP, y2: HIGH - BOTTOM, stroke: "var(--quiet)" }));
    if (dragged && Math.abs(dragged[1] - dragged[0]) > 3) {
      const [a, b] = dragged.slice().sort((p, q) => p - q);
      parts.push(drawn("rect", { x: a, y: TOP, width: b - a, height: HIGH - TOP - BOTTOM, fill: "var(--accent)", opacity: "0.15" }));
    }
    picture.setAttribute("viewBox", `0 0 ${wide} ${HIGH}`);
    put(picture, parts);
    picture.setAttribute("aria-label", `${title}: ${series.map(spoken).join("; ")}. Arrow keys read values, plus and minus zoom, Escape shows all.`);
    whole.hidden = view[0] === all[0] && view[1] === all[1];
  }

  function spoken(line) {
    const known = line.y.filter((y) => y !== null);
    return known.length ? `${line.name} from ${shown(known[0])} to ${shown(known[known.length - 1])}` : `${line.name} unknown`;
  }

  /** The step that a line has nearest to `x`. */
  function nearest(line, x) {
    return within(line).reduce((best, i) => (best === null || Math.abs(line.x[i] - x) < Math.abs(line.x[best] - x) ? i : best), null);
  }

  function look(x) {
    const found = series.filter((line) => line.on).map((line) => [line, nearest(line, x)]).filter(([, i]) => i !== null);
    if (!found.length) return;
    const distance = ([line, i]) => Math.abs(line.x[i] - x);
    const [line, i] = found.reduce((best, other) => (distance(other) < distance(best) ? other : best));
    at = line.x[i];
    const here = found.filter(([other, j]) => other.x[j] === at);
    readout.value = `step ${shown(at)}: ${here.map(([other, j]) => `${other.name} ${shown(other.y[j])}`).join(", ")}${unit ? ` (${unit})` : ""}`;
    draw();
  }

  function zoom(to) {
    const [a, b] = [Math.max(all[0], to[0]), Math.min(all[1], to[1])];
    if (b - a >= (all[1] - all[0]) * 1e-3) view = [a, b];
    kept.view = view[0] === all[0] && view[1] === all[1] ? null : view;
    draw();
  }

  function move(by) {
    const steps = [...new Set(series.filter((line) => line.on).flatMap((line) => within(line).map((i) => line.x[i])))].sort((a, b) => a - b);
    if (!steps.length) return;
    const now = at === null ? -1 : steps.findIndex((step) => step >= at);
    look(steps[Math.min(steps.length - 1, Math.max(0, now + by))]);
  }

  function key(event) {
    const middle = at ?? (view[0] + view[1]) / 2, half = (view[1] - view[0]) / 2;
    const actions = {
      ArrowLeft: () => move(-1), ArrowRight: () => move(1), Escape: () => zoom(all),
      "+": () => zoom([middle - half / 2, middle + half / 2]), "-": () => zoom([middle - half * 2, middle + half * 2]),
    };
    if (actions[event.key]) { actions[event.key](); event.preventDefault(); }
  }

  const whole = el("button", { type: "button", onclick: () => zoom(all) }, "Show all");
  const names = series.map((line) => el("button", {
    type: "button", "aria-pressed": String(line.on),
    onclick(event) {
      line.on = !line.on;
      kept.off[line.on ? "delete" : "add"](line.name);
      event.currentTarget.setAttribute("aria-pressed", String(line.on));
      draw();
    },
  }, el("span", { class: "swatch", style: `background:${line.colour}` }), line.name));
  picture.addEventListener("keydown", key);
  picture.addEventListener("pointerdown", (event) => { dragged = [place(event), place(event)]; busy = true; });
  picture.addEventListener("pointermove", (event) => {
    if (dragged) dragged[1] = place(event);
    look(fromX(place(event)));
  });
  picture.addEventListener("pointerleave", () => { at = null; dragged = null; busy = false; readout.value = ""; draw(); });
  picture.addEventListener("pointerup", () => {
    const drag = dragged;
    dragged = null;
    busy = false;
    if (drag && Math.abs(drag[1] - drag[0]) > 3) zoom(drag.map(fromX).sort((a, b) => a - b));
    else draw();
  });
  picture.addEventListener("dblclick", () => zoom(all));
  new ResizeObserver(([{ contentRect }]) => { wide = Math.max(200, contentRect.width); draw(); }).observe(picture);
  draw();
  return el("figure", {}, el("div", { class: "top" }, el("h3", {}, unit ? `${title}, ${unit}` : title), whole), picture, readout,
    el("div", { class: "legend" }, names));
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return size > 0 && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(6));
}

// ---- What there is to show ----

/** Every stage with its course, and how many steps of the course come before it. */
function placed(courses) {
  return courses.flatMap((course) => {
    let before = 0;
    return course.stages.map((stage) => {
      const here = { ...stage, course: course.name, before };
      before += stage.steps;
      return here;
    });
  });
}

function named(stage) {
  return several ? `${stage.course}: ${stage.name}` : stage.name;
}

/** Lines of one figure: each stage has its own where there is one course, else all stages of a course have one. */
function lines(of, label = "") {
  const full = (name) => (label ? `${name}, ${label}` : name);
  const parts = stages.map((stage) => ({ stage, label, ...of(stage) })).filter(({ y }) => y?.some((value) => value !== null));
  const moved = parts.map(({ stage, x, ...rest }) => ({ ...rest, stage, name: full(named(stage)), x: x.map((step) => step + stage.before) }));
  if (!several) return moved;
  return report.courses.map((course) => ({ ...joined(moved.filter(({ stage }) => stage.course === course.name)), name: full(course.name) }))
    .filter(({ x }) => x.length);
}

/** Several lines as one. */
function joined(parts) {
  const all = (key) => parts.flatMap((part) => part[key]);
  const band = parts.length && parts.every(({ low }) => low) ? { low: all("low"), high: all("high") } : {};
  return { x: all("x"), y: all("y"), ...band };
}

function curve(title, unit, key, factor = 1) {
  const of = ({ curve }) => ({ x: curve.step, y: curve[key]?.map((value) => (value === null ? null : value * factor)) });
  return { title, unit, series: lines(of), marks };
}

/** One line for each name below `group`, such as the rate of each part of the model. */
function curves(title, unit, group, factor = 1) {
  const names = [...new Set(stages.flatMap((stage) => Object.keys(stage.curve[group] ?? {})))];
  const of = (name) => ({ curve }) => ({ x: curve.step, y: curve[group]?.[name]?.map((value) => (value === null ? null : value * factor)) });
  const series = names.flatMap((name) => lines(of(name), name));
  return { title, unit, series: several ? series : joinedByLabel(series), marks };
}

/** Lines with the same label, of stages one after the other, become one. */
function joinedByLabel(series) {
  const labels = [...new Set(series.map(({ label }) => label))];
  return labels.map((label) => ({ name: label, ...joined(series.filter((line) => line.label === label)) }));
}

function heldOut() {
  const of = (value) => ({ evaluations }) => ({ x: evaluations.map((e) => e.step), y: evaluations.map((e) => value(e.report.total) ?? null) });
  const series = [
    ...lines(of((total) => total.images?.true_image), "true image"),
    ...lines(of((total) => total.images?.shuffled_image), "shuffled image"),
    ...lines(of((total) => total.loss), "all samples"),
  ];
  return { title: "Held-out loss", unit: "nats a token", series: several ? series : joinedByLabel(series), marks };
}

const MODULES = ["vision", "projector", "llm"];

/** What a stage does with a module, in words. */
function task(stage, module) {
  const plan = stage.plan.train?.[module];
  const later = (stage.plan.train?.unfreeze ?? []).filter((point) => point.match.some((part) => part.startsWith(module)));
  const rules = (stage.plan.train?.rules ?? []).filter((rule) => String(rule.match).startsWith(module));
  const words = [plan && plan !== "frozen" ? `trained, lr ${short(plan.lr)}` : "frozen"];
  rules.forEach((rule) => words.push(`${rule.match}: ${rule.train === "frozen" ? "frozen" : `lr ${short(rule.train.lr)}`}`));
  later.forEach((point) => words.push(`${point.match.join(", ")} from ${point.at} on, lr ${short(point.lr)}`));
  return { text: words.join("; "), trained: words.length > 1 || words[0] !== "frozen" };
}

function length({ steps, tokens }) {
  return steps === undefined ? `steps, ${shown(tokens)} tokens` : `${shown(steps)} steps`;
}

function timeline(course) {
  const own = stages.filter((stage) => stage.course === course.name);
  const total = own.reduce((sum, stage) => sum + stage.steps, 0) || 1;
  const head = own.map((stage) => el("th", { scope: "col", style: `width:${(80 * stage.steps) / total}%` },
    stage.name, el("br"), el("span", { class: "quiet" }, `${shown(stage.steps)} of ${length(stage.plan.schedule)}${stage.finished ? "" : ", not finished"}`)));
  const rows = MODULES.map((module) => el("tr", {}, el("th", { scope: "row" }, module), own.map((stage) => {
    const { text, trained } = task(stage, module);
    return el("td", { class: trained ? "trained" : "" }, text);
  })));
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Stages of ${course.name}` },
    el("table", { class: "timeline" }, el("caption", {}, `${course.name}: what each stage trains, as wide as it has steps`),
      el("thead", {}, el("tr", {}, el("td"), head)), el("tbody", {}, rows)));
}

function freezeTable(stage) {
  if (!stage.modules) return el("p", {}, `${named(stage)} has not finished; its counts of parameters are written at its end.`);
  const rows = stage.modules.map((row) => [
    row.part, row.parameters, row.plan === "frozen" ? "frozen" : `lr ${short(row.plan.lr)}, weight decay ${short(row.plan.weight_decay)}`,
    row.from ? `after ${row.from.after}` : "from the start",
  ]);
  return table(named(stage), ["part", "parameters", "plan", "when"], rows);
}

function evaluations(stage) {
  const last = stage.evaluations[stage.evaluations.length - 1], first = stage.evaluations[0];
  const row = (name, evaluation) => (losses) => [
    `${name}, step ${evaluation.step}`, losses.samples, losses.loss, losses.images?.true_image ?? null, losses.images?.shuffled_image ?? null,
    losses.images ? losses.images.shuffled_image - losses.images.true_image : null,
  ];
  const rows = [...new Set([first, last])].flatMap((evaluation) => [
    ...Object.entries(evaluation.report.sources).map(([name, losses]) => row(name, evaluation)(losses)),
    row("all", evaluation)(evaluation.report.total),
  ]);
  return table(`${named(stage)}, nats a token`, ["source", "samples", "loss", "true image", "shuffled image", "gap"], rows);
}

function gallery() {
  const answers = stages.flatMap((stage) => stage.evaluations.flatMap(({ step, report: { generations } }) =>
    generations.map((generation) => ({ ...generation, picture: stage.pictures[generation.sample], when: `${named(stage)}, step ${step}`, source: generation.sample.split("/")[0] }))));
  if (!answers.length) return null;
  const times = [...new Set(answers.map(({ when }) => when))], sources = [...new Set(answers.map(({ source }) => source))];
  const option = (value, text = value) => el("option", { value }, text);
  const cards = el("div", { class: "cards" }), count = el("output", { "aria-live": "polite" });
  const when = el("select", { id: "gallery-when", onchange: draw }, times.map((time) => option(time)));
  const source = el("select", { id: "gallery-source", onchange: draw }, option("", "all"), sources.map((name) => option(name)));
  const text = el("input", { id: "gallery-text", type: "search", oninput: draw });
  const kept = remembered("gallery", { when: null, source: "", text: "" });
  when.value = times.includes(kept.when) ? kept.when : times[times.length - 1];
  source.value = sources.includes(kept.source) ? kept.source : "";
  text.value = kept.text;
  function draw() {
    // The newest one stays the newest one.
    kept.when = when.value === times[times.length - 1] ? null : when.value;
    [kept.source, kept.text] = [source.value, text.value];
    const wanted = text.value.toLowerCase();
    const found = answers.filter((a) => a.when === when.value && (!source.value || a.source === source.value) &&
      [a.sample, a.question, a.truth, a.answer].some((part) => part.toLowerCase().includes(wanted)));
    count.value = `${found.length} of ${answers.filter((a) => a.when === when.value).length} answers`;
    put(cards, found.map((a) => el("article", { class: "card" },
      a.picture ? el("img", { src: a.picture, alt: `What the encoder sees of ${a.sample}` }) : [],
      el("p", { class: "quiet" }, a.sample), el("p", {}, el("strong", {}, "Question "), a.question),
      el("p", {}, el("strong", {}, "Truth "), a.truth), el("p", {}, el("strong", {}, "Answer "), a.answer || "(nothing)"))));
  }
  draw();
  const label = (of, name) => el("label", { for: of.id }, `${name} `, of);
  return [el("div", { class: "controls" }, label(when, "After"), label(source, "Source"), label(text, "With the words"), count), cards];
}

function happenings(stage) {
  const rows = [
    ...stage.unlocks.map((u) => [u.step, "unlocked", `${u.parts.join(", ")}: ${shown(u.tensors)} tensors`]),
    ...stage.trials.map((t) => [t.step, "trial of a rate", `x${shown(t.trial.scale_tried)} for x${shown(t.trial.scale_before)}: ${t.trial.verdict.replace("_", " ")}, now x${shown(t.trial.scale)}`]),
    ...stage.trips.map((t) => [t.step ?? null, "not made", `${t.reason.kind.replace("_", " ")}: ${t.action}`]),
  ].sort((a, b) => a[0] - b[0]);
  return rows.length ? table(named(stage), ["after step", "what", "details"], rows) : null;
}

function figures(stage) {
  const { totals, saves } = stage;
  return [named(stage), stage.steps, totals?.samples ?? null, totals?.tokens ?? null, totals?.answer_tokens ?? null,
    stage.train_loss, seconds(stage.seconds), saves.count, saves.count ? seconds(saves.blocked_secs) : null, stage.export];
}

function lineage(stage) {
  if (!stage.lineage) return null;
  const from = Object.entries(stage.lineage.weights ?? {}).map(([module, origin]) =>
    `${module} from ${typeof origin === "string" ? origin : origin.from ?? JSON.stringify(origin)}`);
  const ancestors = (stage.lineage.stages ?? []).map((a) => `${a.run} (step ${shown(a.step)}, ${shown(a.totals.samples)} samples, plan ${a.plan_hash.slice(0, 8)})`);
  return el("li", {}, el("strong", {}, named(stage)), `: ${[from.join(", "), ...ancestors, "this stage"].join(" → ")}`);
}

// ---- The page ----

function section(title, ...content) {
  const shownParts = content.flat(2).filter(Boolean);
  if (!shownParts.length) return;
  const id = slug(title);
  document.getElementById("main").append(el("section", { "aria-labelledby": id }, el("h2", { id }, title), shownParts));
  document.getElementById("sections").append(el("a", { href: `#${id}` }, title), " ");
}

function slug(title) {
  return title.toLowerCase().replace(/[^a-z]+/g, "-");
}

function configuration(stage) {
  const kept = remembered(`plan of ${stage.dir}`, { open: false });
  const whole = el("details", { ontoggle: (event) => { kept.open = event.currentTarget.open; } },
    el("summary", {}, `${named(stage)}: ${stage.dir}/plan.yaml`), el("pre", { tabindex: "0" }, stage.plan_text));
  whole.open = kept.open;
  return whole;
}

function charts(...specs) {
  const made = specs.filter(({ series }) => series.some(({ y }) => y.some((value) => value !== null))).map(chart);
  return made.length ? el("div", { class: "charts" }, made) : null;
}

function themes() {
  const button = document.getElementById("theme"), names = ["auto", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "auto";
  try { chosen = localStorage.getItem("sail-theme") ?? "auto"; } catch { /* a page from a file may have no storage */ }
  const show = () => {
    document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  button.addEventListener("click", () => {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    try { localStorage.setItem("sail-theme", chosen); } catch { /* as above */ }
    show();
  });
  dark.addEventListener("change", show);
  show();
}

/** Draws the page about `next`; the reader finds what was chosen and where the focus was as before. */
function show(next) {
  report = next;
  several = report.courses.length > 1;
  stages = placed(report.courses);
  marks = several ? [] : stages.slice(1).map((stage) => ({ x: stage.before, name: `${stage.name} begins` }));
  const focus = document.activeElement?.id, top = scrollY;
  const caret = document.activeElement?.selectionStart;
  document.getElementById("main").replaceChildren();
  document.getElementById("sections").replaceChildren();
  const title = `SAIL report: ${report.courses.map((course) => course.name).join(", ")}`;
  document.title = title;
  document.getElementById("title").textContent = title;
  const made = new Date(report.made_at * 1000).toISOString().slice(0, 19).replace("T", " ");
  document.getElementById("made").textContent = `Written by sail-train ${report.version} on ${made} UTC.`;
  section("Stages", report.courses.map(timeline));
  section("Losses", charts(
    { title: "Training loss", unit: "", series: lines(({ curve }) => ({ x: curve.step, y: curve.loss, low: curve.loss_low, high: curve.loss_high })), marks },
    heldOut(),
  ));
  section("Rates and norms", charts(curves("Learning rate", "", "lr"), curve("Gradient norm before clipping", "", "grad_norm")));
  section("Speed and memory", charts(
    curve("Throughput", "tokens a second", "tokens_per_sec"), curves("Time of a step", "seconds", "parts_secs"),
    curve("Waiting for data", "% of a step", "data_wait", 100), curve("Model FLOPs utilisation", "%", "mfu", 100),
    curve("Peak memory", "GB", "peak_memory_bytes", 1e-9),
  ));
  section("Held-out evaluations", stages.filter((stage) => stage.evaluations.length).map(evaluations));
  section("Answers", gallery());
  section("What was trained", stages.map(freezeTable));
  section("What happened on the way", stages.map(happenings));
  section("Totals", table("Of each stage", ["stage", "steps", "samples", "tokens", "answer tokens", "loss, last tenth of the steps", "time in steps", "checkpoints", "steps waited for them", "exported to"], stages.map(figures)));
  const descent = stages.map(lineage).filter(Boolean);
  section("Lineage", descent.length ? el("ul", {}, descent) : null);
  section("Configuration", stages.map(configuration));
  if (focus) {
    const element = document.getElementById(focus);
    element?.focus({ preventScroll: true });
    if (Number.isInteger(caret)) element?.setSelectionRange?.(caret, caret);
  }
  scrollTo({ top, behavior: "instant" });
}

// ---- A page that is served ----

/** While the reader drags, nothing is drawn anew under the pointer. */
let busy = false;

/** Asks for newer figures every `seconds`, and says when there is nobody who answers. */
function follow(seconds) {
  const made = document.getElementById("made");
  let known = null;
  const ask = async () => {
    if (busy) return;
    try {
      const answer = await fetch(`data.json${location.search}`, { headers: known ? { "If-None-Match": known } : {} });
      if (answer.status !== 304 && !answer.ok) throw new Error(await answer.text());
      if (answer.status === 304 || busy) return;
      known = answer.headers.get("ETag");
      show(await answer.json());
    } catch (error) {
      made.textContent = `No newer figures: ${error.message}. These were made on ${new Date(report.made_at * 1000).toLocaleString()}.`;
    }
  };
  // One question after the other, however long an answer takes.
  const again = () => setTimeout(() => ask().finally(again), seconds * 1000);
  again();
}

themes();
show(JSON.parse(document.getElementById("data").textContent));
if (report.refresh_secs) follow(report.refresh_secs);
