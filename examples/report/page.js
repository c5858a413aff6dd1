// The page: a table of the runs, their curves, and the traces of one question. Text of a run is
// only ever set as text, never as HTML. What is chosen stands in the address, after the #.

// A null in a list is a figure that was NaN or infinite.
const NULLS = (key, value) => (value === null && /^\d+$/.test(key) ? NaN : value);
const { runs, differ } = JSON.parse(document.getElementById("data").textContent, NULLS);
const GLYPHS = "●■▲◆✚★";
const DASHES = ["none", "6 3", "2 3", "9 3 2 3", "12 4", "4 2"];

// ---- small helpers
const byId = (id) => document.getElementById(id);

// html("p.note", {title: "a"}, "text", node): an object has attributes, all else is a child.
function make(space, spec, ...parts) {
  const [tag, style] = spec.split(".");
  const node = document.createElementNS(`http://www.w3.org/${space}`, tag);
  if (style) node.setAttribute("class", style);
  for (const part of parts) {
    if (part instanceof Node || typeof part === "string") node.append(part);
    else Object.entries(part).forEach(([name, value]) => node.setAttribute(name, value));
  }
  return node;
}
const html = (...parts) => make("1999/xhtml", ...parts);
const svg = (...parts) => make("2000/svg", ...parts);

const minus = (text) => text.replace("-", "−");
const number = (x, digits = 2) =>
  isFinite(x) ? minus((+x.toFixed(digits) + 0).toFixed(digits)) : "–";
const signed = (x, digits = 2) => (+x.toFixed(digits) > 0 ? "+" : "") + number(x, digits);
const short = (x) => (isFinite(x) ? minus(String(+x.toPrecision(3))) : "–");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const color = (i) => `var(--run${i % 6})`;
const glyph = (i) => html("span.glyph", { style: `color: ${color(i)}` }, GLYPHS[i % 6]);

// Control characters (terminal escapes, say) as the signs that Unicode has for them.
const sign = (c) => String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0));
const visible = (text) => text.replace(/[\0-\x08\x0b-\x1f\x7f]/g, sign);
const visibleToken = (text) => visible(text.replace(/\n/g, "⏎").replace(/\t/g, "⇥")) || " ";

// ---- the runs
function drawRuns() {
  const last = (run, name) => run.curves[name]?.at(-1)?.[1] ?? NaN;
  const figures = {
    "accuracy, held out": (run) => number(last(run, "eval_accuracy")),
    "gain, nats": (run) => signed(last(run, "eval_gain")),
    "gain, another's trace": (run) => signed(last(run, "eval_gain_shuffled")),
    "trace tokens": (run) => number(last(run, "trace_len_mean"), 1),
  };
  const named = [...new Set(["aggregator", ...differ])];
  const settings = named.map((name) => html("th.text", name));
  const titles = Object.keys(figures).map((title) => html("th", title));
  byId("runs").append(html("tr", html("th", "run"), ...settings, ...titles));
  runs.forEach((run, i) => {
    const sft = run.settings.traces === 0;
    const values = named.map((name) =>
      html("td.text", sft && name === "aggregator" ? "– (plain SFT)" : String(run.settings[name])),
    );
    const shown = Object.values(figures).map((value) => html("td", value(run)));
    byId("runs").append(html("tr", html("td", glyph(i), run.name), ...values, ...shown));
  });
}

// ---- curves
const GAIN_NOTE = "held out; faint: with another question's trace";
const OWN_NOTE = "of different aggregators not comparable: each run on its own scale";
const CURVES = [
  { names: ["eval_accuracy"], title: "Accuracy", note: "held-out questions", low: 0 },
  { names: ["eval_gain", "eval_gain_shuffled"], title: "Gain, nats", note: GAIN_NOTE },
  { names: ["trace_len_mean"], title: "Trace length", note: "tokens", low: 0 },
  { names: ["reward_mean"], title: "Reward", note: OWN_NOTE, own: true },
  { names: ["entropy"], title: "Entropy", note: "nats per trace token", low: 0 },
  { names: ["dup_frac"], title: "Duplicates", note: "share of equal traces of a question", low: 0 },
];
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 170, 34, 282, 8, 150];
const steps = runs.flatMap((run) => Object.values(run.curves).map((c) => c.at(-1)?.[0] ?? 0));
const lastStep = Math.max(1, ...steps);
const xOf = (step) => LEFT + ((RIGHT - LEFT) * step) / lastStep;

function range(points, low = NaN) {
  const values = points.flatMap((point) => point.slice(2)).concat(isNaN(low) ? [] : [low]);
  const top = largest(values);
  const bottom = -largest(values.map((x) => -x));
  return top > bottom ? [bottom, top] : [bottom - 0.5, bottom + 0.5];
}

// Three to five round numbers; the first and the last enclose the range.
function ticks([bottom, top]) {
  const rough = (top - bottom) / 3;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
  const first = Math.floor(bottom / size + 1e-9);
  const count = Math.ceil(top / size - 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, i) => (first + i) * size);
}

function scale([bottom, top]) {
  return (value) => BOTTOM - ((BOTTOM - TOP) * (value - bottom)) / (top - bottom);
}

function drawCurve({ names, title, note, low, own }) {
  const all = runs.flatMap((run, i) =>
    names.map((name, n) => ({ run, i, faint: n > 0, points: run.curves[name] ?? [] })),
  );
  const drawn = all.filter((curve) => curve.points.length);
  if (!drawn.length) return "";
  own &&= drawn.length > 1;
  const points = drawn.flatMap((curve) => curve.points);
  const values = ticks(range(points, low));
  const shared = scale([values[0], values.at(-1)]);
  const ends = drawn.map((curve) => `${curve.run.name} ends at ${short(curve.points.at(-1)[1])}`);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  picture.setAttribute("aria-label", `${title}: ${ends.join(", ")}`);
  const write = (x, y, anchor, text, style = "") =>
    picture.append(svg("text", { x, y, "text-anchor": anchor, style }, text));
  for (const value of values) {
    const y = shared(value);
    picture.append(svg("line.grid", { x1: LEFT, x2: RIGHT, y1: y, y2: y }));
    if (!own) write(LEFT - 6, y + 4, "end", short(value));
  }
  write(LEFT, HEIGHT - 4, "start", "0");
  write(RIGHT, HEIGHT - 4, "end", `step ${lastStep}`);

  for (const curve of drawn) {
    const y = own ? scale(range(curve.points)) : shared;
    const path = (column, points) =>
      points.map((p) => `${xOf(p[0]).toFixed(1)},${y(p[column]).toFixed(1)}`).join("L");
    const stroke = color(curve.i);
    const line = {
      d: "M" + path(1, curve.points),
      stroke,
      "stroke-dasharray": DASHES[curve.i % 6],
    };
    picture.append(svg(curve.faint ? "path.faint" : "path.line", line));
    curve.end = y(curve.points.at(-1)[1]);
    if (curve.faint) continue;
    const band = `M${path(3, curve.points)}L${path(2, curve.points.toReversed())}Z`;
    picture.append(svg("path.band", { d: band, fill: stroke }));
    for (const [step, text] of curve.run.warnings.filter((w) => markedOn(w[1]) === names[0])) {
      const before = curve.points.findLast((p) => p[0] <= step) ?? curve.points[0];
      const [cx, cy] = [xOf(step), y(before[1])];
      picture.append(svg("circle", { cx, cy, r: 7, fill: "var(--paper)", stroke }));
      write(cx, cy + 4, "middle", "!", "font-weight: 700");
      picture.lastChild.append(svg("title", text));
    }
  }
  let free = HEIGHT; // the last values at the right, from the bottom up, without overlap
  for (const curve of drawn.filter((c) => !c.faint).sort((a, b) => b.end - a.end)) {
    const y = Math.min(curve.end, free);
    const text = `${GLYPHS[curve.i % 6]} ${short(curve.points.at(-1)[1])}`;
    write(RIGHT + 6, y + 4, "start", text, `fill: ${color(curve.i)}`);
    free = y - 13;
  }
  picture.append(svg("line.now", { y1: TOP - 4, y2: BOTTOM }));
  picture.onclick = (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    choose({ step: ((x - LEFT) / (RIGHT - LEFT)) * lastStep });
  };
  const scaleOf = ({ i, points }) => `${GLYPHS[i % 6]} ${range(points).map(short).join(" to ")}`;
  const scales = own ? html("small", drawn.map(scaleOf).join("   ")) : "";
  const small = html("small", note === OWN_NOTE && !own ? "of the sampled traces" : note);
  return html("figure", html("figcaption", title, small, scales), picture);
}

// The curve that a warning is marked on: that of its metric, "name: metric value ...".
function markedOn(warning) {
  const metric = warning.split(" ")[1];
  return CURVES.some((curve) => curve.names[0] === metric) ? metric : "trace_len_mean";
}

function drawWarnings() {
  runs.forEach((run, i) => {
    for (const [step, text] of run.warnings)
      byId("warnings").append(
        html("li", glyph(i), html("b", `! ${run.name}, step ${step} `), visible(text)),
      );
  });
}

// ---- what is chosen
const chosen = { run: 0, kind: "held", step: 0, f: "", added: true };
const samplesOf = (run, kind) => runs[run].samples.filter((s) => s.held_out === (kind === "held"));
const gainsOf = (logp, nullLogp) => logp.map((x, i) => x - nullLogp[i]);

function choose(changes) {
  Object.assign(chosen, changes);
  const { settings } = runs[chosen.run];
  // A function of the user's own is not in the page.
  for (const f of [settings.aggregator, "weighted_sum_log_prob"])
    if (!Object.hasOwn(AGGREGATORS, chosen.f)) chosen.f = f;
  const samples = samplesOf(chosen.run, chosen.kind);
  const distance = (sample) => Math.abs(sample.step - chosen.step);
  const nearest = samples.toSorted((a, b) => distance(a) - distance(b))[0];
  chosen.step = nearest?.step ?? 0;

  byId("run").value = chosen.run;
  byId("kind").value = chosen.kind;
  byId("added").checked = chosen.added;
  byId("step").max = Math.max(0, samples.length - 1);
  byId("step").value = samples.indexOf(nearest);
  byId("at").textContent = nearest ? `Step ${nearest.step}` : "No samples";
  byId("step").setAttribute("aria-valuetext", byId("at").textContent);
  for (const line of document.querySelectorAll(".now")) {
    line.setAttribute("x1", xOf(chosen.step));
    line.setAttribute("x2", xOf(chosen.step));
  }
  history.replaceState(null, "", "#" + new URLSearchParams(chosen));
  byId("lab").hidden = !nearest;
  if (nearest) drawSample(nearest, settings);
}

// ---- the traces of one question
// The group: the sampled traces and, if chosen, the empty one. -> reward, advantage [K], weight
// [K][T], with the run's settings, as train.py computes them.
function scoreGroup(name, sample, { center, scale, clip_null }) {
  const rows = sample.traces.map((trace) => trace.logp);
  if (chosen.added) rows.push(sample.null_logp);
  const { reward, weight } = aggregate(name, rows, sample.null_logp);
  if (clip_null) {
    const least = aggregate(name, [sample.null_logp], sample.null_logp).reward[0];
    reward.forEach((x, k) => {
      if (x <= least) weight[k] = weight[k].map(() => 0);
      reward[k] = Math.max(0, x - least);
    });
  }
  if (name === "jlb_multi") center = "none"; // its rewards are relative to the group already
  return { reward, weight, advantage: advantages(reward, weight, center, scale) };
}

function drawSample(sample, settings) {
  byId("question").textContent = visible(sample.question);
  byId("readout").textContent = "Point at a token, or walk through an answer with the arrow keys.";
  drawAggregators(sample, settings);
  const { reward, weight, advantage } = scoreGroup(chosen.f, sample, settings);
  byId("verdict").textContent = verdict(advantage, settings);
  const empty = { trace: "", logp: sample.null_logp, added: 1 };
  const rows = []; // equal traces share one
  [...sample.traces, ...(chosen.added ? [empty] : [])].forEach((trace, k) => {
    const figures = { k, reward: reward[k], weight: weight[k], advantage: advantage[k] };
    const equal = (row) => row.trace === trace.trace && row.reward === reward[k];
    const same = trace.added ? null : rows.find(equal);
    if (same) same.times += 1;
    else rows.push({ added: 0, ...trace, ...figures, times: 1 });
  });
  rows.sort((a, b) => b.advantage - a.advantage || b.added - a.added);
  const heaviest = largest(weight.flat().map(Math.abs)) || 1;
  byId("traces").replaceChildren(...rows.map((row) => drawRow(row, sample, heaviest)));
  for (const box of document.querySelectorAll(".trace"))
    if (box.scrollHeight > box.clientHeight) box.tabIndex = 0; // so that keys can scroll it
}

function verdict(advantage, settings) {
  if (settings.traces === 0)
    return "Plain SFT samples no traces: the answer follows the empty one.";
  if (!chosen.added) return `${chosen.f}, the sampled traces alone.`;
  if (advantage.every((x) => x === 0)) return `${chosen.f}: all rewards are equal.`;
  const above = advantage.filter((x) => x > advantage.at(-1)).length;
  if (above === 0) return `${chosen.f}: no trace gets more than the empty one.`;
  const count = plural(advantage.length - 1, "trace");
  return `${chosen.f}: ${above} of ${count} ${above === 1 ? "gets" : "get"} more than the empty one.`;
}

function drawAggregators(sample, settings) {
  const focused = document.activeElement?.name === "f";
  const title = chosen.added ? "advantage of the empty trace" : "";
  byId("aggregators").replaceChildren(
    html("legend", html("span", "Aggregator"), html("span", title)),
  );
  for (const [name, { formula }] of Object.entries(AGGREGATORS)) {
    const empty = chosen.added ? signed(scoreGroup(name, sample, settings).advantage.at(-1)) : "";
    const radio = html("input", { type: "radio", name: "f", value: name });
    radio.checked = name === chosen.f;
    const label = html("label.choice", radio, name, html("span", empty), html("small", formula));
    byId("aggregators").append(label);
    if (focused && radio.checked) radio.focus();
  }
}

function drawToken(text, gain, weight) {
  const strength = Math.min(0.6, Math.abs(gain) * 0.3) || 0;
  const background = `rgba(var(--${gain > 0 ? "gain" : "loss"}), ${strength})`;
  const style = `background: ${background}; --thick: ${Math.round(5 * weight) || 0}px`;
  const shown = Math.abs(gain) >= 0.1 ? signed(gain, 1) : "";
  return html("span.token", html("span", { style }, visibleToken(text)), html("small", shown));
}

function drawRow(row, sample, heaviest) {
  const gains = gainsOf(row.logp, sample.null_logp);
  const answer = html("div.answer", { dir: "auto", tabindex: 0, role: "group" });
  answer.setAttribute("aria-label", "gold answer; arrow keys walk through its tokens");
  let here = -1;
  const show = (i) => {
    here = Math.max(0, Math.min(i, gains.length - 1));
    document.querySelector(".here")?.classList.remove("here");
    answer.children[here].classList.add("here");
    const [c, n] = [row.logp[here], sample.null_logp[here]].map((x) => short(Math.exp(x)));
    const figures = [
      `probability ${c}, without thinking ${n}`,
      `gain ${signed(gains[here])} nats`,
      `weight ${short(row.weight[here])}`,
    ];
    const token = html("b", html("bdi", visibleToken(sample.answer[here])));
    byId("readout").replaceChildren(token, ...figures.map((text) => html("span", text)));
  };
  sample.answer.forEach((text, i) => {
    const token = drawToken(text, gains[i], Math.abs(row.weight[i]) / heaviest);
    token.onpointerenter = token.onclick = () => show(i);
    answer.append(token);
  });
  answer.onkeydown = (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    show(here + way);
  };
  const trace = html("div.trace", { dir: "auto" }, row.added ? "(no trace)" : visible(row.trace));
  const advantage = html("b.advantage", signed(row.advantage));
  const head = html("div.head", html("div", advantage, html("small", " advantage")));
  head.append(drawMeter(row.advantage));
  for (const text of [`reward ${short(row.reward)}`, describe(row), changes(gains)])
    head.append(html("small", text));
  const attributes = { "data-k": row.k, "data-added": row.added };
  return html("div.row", attributes, head, html("div", trace, answer));
}

function drawMeter(advantage) {
  const length = Math.min(50, Math.abs(advantage) * 20) || 0; // percent
  const left = advantage < 0 ? 50 - length : 50;
  return html("div.meter", html("i", { style: `width: ${length}%; left: ${left}%` }));
}

function describe({ added, times, trace_len, finished }) {
  if (added) return "empty trace, added";
  const size = plural(trace_len, "token") + (finished ? "" : ", cut");
  return times > 1 ? `${times} traces of ${size}` : size;
}

function changes(gains) {
  const parts = [gains.filter((x) => x > 0), gains.filter((x) => x < 0)].map(sum);
  const shown = parts.filter((x) => Math.abs(x) >= 0.05).map((x) => signed(x, 1));
  return shown.length ? `${shown.join(" and ")} nats` : "";
}

// ---- start
function start() {
  document.title = runs.map((run) => run.name).join(", ");
  drawRuns();
  byId("curves").append(...CURVES.map(drawCurve));
  drawWarnings();
  const tokens = [drawToken("lost", -1.5, 0), drawToken("gained", 1.5, 0)];
  const lines = [drawToken("light", 0, 0), drawToken("heavy", 0, 1)];
  byId("key").append(html("span", ...tokens, "log-prob against the empty trace, nats"));
  byId("key").append(html("span", ...lines, "weight in the reward"));
  runs.forEach((run, i) =>
    byId("run").append(html("option", { value: i }, `${GLYPHS[i % 6]} ${run.name}`)),
  );
  byId("run").onchange = (event) => choose({ run: +event.target.value, f: "" });
  byId("kind").onchange = (event) => choose({ kind: event.target.value });
  byId("step").oninput = (event) =>
    choose({ step: samplesOf(chosen.run, chosen.kind)[event.target.value].step });
  byId("added").onchange = (event) => choose({ added: event.target.checked });
  byId("aggregators").onchange = (event) => choose({ f: event.target.value });

  const address = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const run = runs[+address.run] ? +address.run : 0;
  const kind = address.kind === "train" || !samplesOf(run, "held").length ? "train" : "held";
  // At first the earliest step at which a trace helps a token much.
  const helps = (sample) =>
    sample.traces.some((trace) => largest(gainsOf(trace.logp, sample.null_logp)) > 1);
  const step = +(address.step ?? samplesOf(run, kind).find(helps)?.step ?? 0);
  choose({ run, kind, step, f: address.f ?? "", added: address.added !== "false" });
}
start();
