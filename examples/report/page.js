// The page: a table of the runs, their curves, and the traces of one question. Text of a run is only
// ever set as text (never as HTML). What is chosen stands in the address, after the #.

const { runs, differ } = JSON.parse(document.getElementById("data").textContent);
const GLYPHS = "●■▲◆✚★";
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "12 4", "4 2"];
const SVG = "http://www.w3.org/2000/svg";

// ---- small helpers
const byId = (id) => document.getElementById(id);
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null)); // a string becomes a text node
  return node;
}
const html = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const number = (value, digits = 2) =>
  Number.isFinite(value) ? value.toFixed(digits).replace(/^-(?=0\.?0*$)/, "").replace("-", "−") : "–";
const signed = (value, digits = 2) => (value > 0 && number(value, digits) > 0 ? "+" : "") + number(value, digits);
const short = (value) => (Number.isFinite(value) ? String(+value.toPrecision(3)) : "–").replace("-", "−");
// Control characters (terminal escapes, say) as the signs that Unicode has for them.
const visible = (text, kept = "\n\t") =>
  text.replace(/[\0-\x1f\x7f]/g, (c) =>
    kept.includes(c) ? c : c === "\n" ? "⏎" : String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const glyph = (i) =>
  html("span", { class: "glyph", style: `color: var(--run${i % 6})`, "aria-hidden": "true" }, GLYPHS[i % 6]);
const last = (run, name) => run.curves[name]?.at(-1)?.[1];

// ---- the runs
function setting(run, name) {
  const sft = run.settings.traces === 0;
  return sft && name === "aggregator" ? "– (plain SFT)" : String(run.settings[name]);
}

function drawRuns() {
  const figures = [
    ["accuracy, held out", (run) => number(last(run, "eval_accuracy"))],
    ["gain, nats", (run) => signed(last(run, "eval_gain"))],
    ["gain, another's trace", (run) => signed(last(run, "eval_gain_shuffled"))],
    ["trace tokens", (run) => number(last(run, "trace_len_mean"), 1)],
  ];
  const head = html("tr", {}, html("th", {}, "run"),
    ...differ.map((name) => html("th", { class: "text" }, name)),
    ...figures.map(([title]) => html("th", {}, title)));
  const rows = runs.map((run, i) => html("tr", {}, html("td", {}, glyph(i), run.name),
    ...differ.map((name) => html("td", { class: "text" }, setting(run, name))),
    ...figures.map(([, value]) => html("td", {}, value(run)))));
  byId("runs").append(head, ...rows);
}

// ---- curves
const CURVES = [
  { names: ["eval_accuracy"], title: "Accuracy", note: "held-out questions", low: 0 },
  { names: ["eval_gain", "eval_gain_shuffled"], title: "Gain, nats",
    note: "held out; faint: with another question's trace" },
  { names: ["trace_len_mean"], title: "Trace length", note: "tokens", low: 0 },
  { names: ["reward_mean"], title: "Reward", note: "each run on its own scale", own: true },
  { names: ["entropy"], title: "Entropy", note: "nats per trace token", low: 0 },
  { names: ["dup_frac"], title: "Duplicates", note: "share of traces equal to another of the question",
    low: 0 },
];
const WIDTH = 340, HEIGHT = 170, LEFT = 34, RIGHT = 58, BOTTOM = 20;
const lastStep = Math.max(1, ...runs.flatMap((run) => Object.values(run.curves).map((c) => c.at(-1)?.[0] ?? 0)));
const xOf = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / lastStep;

function range(curves, low) {
  const values = curves.flat().flatMap((point) => point.slice(2));
  const bottom = Math.min(...values, low ?? Infinity), top = Math.max(...values, low ?? -Infinity);
  return top > bottom ? [bottom, top] : [bottom - 0.5, bottom + 0.5];
}

// Three to five round numbers whose first and last enclose the range.
function ticks([bottom, top]) {
  const rough = (top - bottom) / 3, unit = 10 ** Math.floor(Math.log10(rough));
  const size = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
  const first = Math.floor(bottom / size + 1e-9), count = Math.ceil(top / size - 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, i) => (first + i) * size);
}

function drawCurve({ names, title, note, low, own }) {
  const drawn = runs.flatMap((run, i) =>
    names.map((name, n) => ({ run, i, faint: n > 0, points: run.curves[name] ?? [] })))
    .filter((curve) => curve.points.length);
  const values = ticks(range(drawn.map((curve) => curve.points), low));
  const shared = [values[0], values.at(-1)];
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": title + ": " + drawn.map((c) => `${c.run.name} ends at ${short(c.points.at(-1)[1])}`).join(", ") });
  const yOn = ([bottom, top]) => (value) => 8 + (HEIGHT - BOTTOM - 8) * (1 - (value - bottom) / (top - bottom));
  for (const value of own ? shared : values) {
    const y = yOn(shared)(value);
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    if (!own) picture.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of [0, lastStep])
    picture.append(svg("text", { x: xOf(step), y: HEIGHT - 4, "text-anchor": "middle" }, step ? `step ${step}` : "0"));
  const labels = [];
  for (const { run, i, faint, points } of drawn) {
    const y = yOn(own ? range([points]) : shared), color = `var(--run${i % 6})`;
    const path = (list) => list.map(([x, value]) => `${xOf(x).toFixed(1)},${y(value).toFixed(1)}`).join("L");
    if (points.some((point) => point[2] < point[3]) && !faint)
      picture.append(svg("path", { class: "band", fill: color, d: "M" + path(points.map((p) => [p[0], p[3]])) +
        "L" + path(points.map((p) => [p[0], p[2]]).reverse()) + "Z" }));
    picture.append(svg("path", { class: faint ? "line faint" : "line", stroke: color,
      "stroke-dasharray": DASHES[i % 6], d: "M" + path(points) }));
    if (!faint) labels.push({ y: y(points.at(-1)[1]), i, text: short(points.at(-1)[1]) });
    for (const [step, text] of faint ? [] : run.warnings.filter(([, text]) => markedOn(text) === names[0])) {
      const point = points.findLast((p) => p[0] <= step) ?? points[0];
      picture.append(svg("circle", { cx: xOf(step), cy: y(point[1]), r: 7, fill: "var(--paper)", stroke: color }),
        svg("text", { x: xOf(step), y: y(point[1]) + 4, "text-anchor": "middle", style: "font-weight: 700" },
          svg("title", {}, text), "!"));
    }
  }
  labels.sort((a, b) => a.y - b.y).forEach((label, n) => {
    label.y = Math.max(label.y, n ? labels[n - 1].y + 13 : 0);
    picture.append(svg("text", { x: WIDTH - RIGHT + 6, y: label.y + 4, style: `fill: var(--run${label.i % 6})` },
      `${GLYPHS[label.i % 6]} ${label.text}`));
  });
  picture.append(svg("line", { class: "now", y1: 4, y2: HEIGHT - BOTTOM }));
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * WIDTH;
    choose({ step: ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * lastStep });
  });
  return html("figure", {}, html("figcaption", {}, title, html("small", {}, note)), picture);
}

// The curve that a warning is marked on: that of its metric, "name: metric value ...".
function markedOn(warning) {
  const metric = warning.split(" ")[1];
  return CURVES.some((curve) => curve.names[0] === metric) ? metric : "trace_len_mean";
}

function drawCurves() {
  byId("curves").append(...CURVES.map(drawCurve));
  byId("warnings").append(...runs.flatMap((run, i) => run.warnings.map(([step, text]) =>
    html("li", {}, glyph(i), html("b", {}, `! ${run.name}, step ${step}  `), text))));
}

// ---- the traces of one question
const chosen = { run: 0, kind: "held", step: 0, f: "", added: true };
const samplesOf = (run, kind) => runs[run].samples.filter((sample) => sample.held_out === (kind === "held"));
const gains = (logp, nullLogp) => logp.map((x, i) => x - nullLogp[i]);
const helps = (sample) => sample.traces.some((trace) => Math.max(...gains(trace.logp, sample.null_logp)) > 1);

function choose(changes) {
  Object.assign(chosen, changes);
  const { run, kind, f, added } = chosen;
  const samples = samplesOf(run, kind);
  if (!(f in AGGREGATORS)) {
    const own = runs[run].settings.aggregator; // a function of the user's own is not in the page
    chosen.f = own in AGGREGATORS ? own : "weighted_sum_log_prob";
  }
  const distance = (sample) => Math.abs(sample.step - chosen.step);
  const sample = samples.reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
  byId("run").value = run;
  byId("kind").value = kind;
  byId("added").checked = added;
  byId("step").max = Math.max(0, samples.length - 1);
  byId("step").value = samples.indexOf(sample);
  byId("at").textContent = sample ? `Step ${sample.step}` : "no samples";
  byId("step").setAttribute("aria-valuetext", byId("at").textContent);
  for (const line of document.querySelectorAll(".now"))
    fill(line, { x1: xOf(sample?.step ?? 0), x2: xOf(sample?.step ?? 0) }, []);
  const { step } = Object.assign(chosen, { step: sample?.step ?? 0 });
  history.replaceState(null, "", "#" + new URLSearchParams({ run, kind, step, f: chosen.f, added }));
  drawTraces(sample);
}

// Rows of the group: the sampled traces and, if chosen, the empty one. -> reward, weight, advantage
function judge(name, sample, withEmpty) {
  const rows = sample.traces.map((trace) => trace.logp).concat(withEmpty ? [sample.null_logp] : []);
  const { center, scale, clip_null } = runs[chosen.run].settings;
  const { reward, weight } = aggregate(name, rows, sample.null_logp);
  if (clip_null) {
    const least = aggregate(name, [sample.null_logp], sample.null_logp).reward[0];
    reward.forEach((x, k) => {
      reward[k] = Math.max(0, x - least);
      if (x <= least) weight[k] = weight[k].map(() => 0);
    });
  }
  return { reward, weight, advantage: advantages(reward, weight, name === "jlb_multi" ? "none" : center, scale) };
}

function drawTraces(sample) {
  byId("readout").textContent = sample ? "Point at a token, or walk through an answer with the arrow keys." : "";
  if (!sample) {
    for (const id of ["question", "verdict", "aggregators", "traces"]) byId(id).replaceChildren();
    return;
  }
  byId("question").textContent = visible(sample.question);
  drawAggregators(sample);
  const group = judge(chosen.f, sample, chosen.added);
  const count = sample.traces.length;
  const rows = [];
  group.reward.forEach((reward, k) => {
    const trace = sample.traces[k] ?? { trace: "", trace_len: 0, logp: sample.null_logp };
    const same = rows.find((row) => k < count && row.trace.trace === trace.trace && row.reward === reward);
    if (same) same.times += 1;
    else rows.push({ k, trace, reward, times: 1, added: k === count,
      advantage: group.advantage[k], weight: group.weight[k] });
  });
  rows.sort((a, b) => b.advantage - a.advantage || b.added - a.added);
  byId("verdict").replaceChildren(...verdict(rows, group.advantage));
  const heaviest = Math.max(...group.weight.flat().map(Math.abs)) || 1;
  byId("traces").replaceChildren(...rows.map((row) => drawRow(row, sample, heaviest)));
  for (const box of document.querySelectorAll(".trace"))
    if (box.scrollHeight > box.clientHeight) box.tabIndex = 0; // so that keys can scroll it
}

function verdict(rows, advantage) {
  if (runs[chosen.run].settings.traces === 0) return ["Plain SFT: no traces are sampled, the answer is trained after the empty one."];
  const empty = rows.find((row) => row.added);
  if (!empty) return ["Rewards and advantages of the sampled traces alone."];
  const above = advantage.filter((x) => x > empty.advantage).length;
  if (!advantage.some((x) => x !== 0)) return ["All rewards are equal: no trace is preferred."];
  const rank = above === 0 ? "No trace gets more than the empty one" :
    `${above} of ${plural(advantage.length - 1, "trace")} ${above === 1 ? "gets" : "get"} more than the empty one`;
  return [html("b", {}, chosen.f), `: ${rank}.`];
}

function drawAggregators(sample) {
  const focused = document.activeElement?.name === "f";
  const choices = Object.entries(AGGREGATORS).map(([name, { formula }]) => {
    const empty = chosen.added ? signed(judge(name, sample, true).advantage.at(-1)) : "";
    const radio = html("input", { type: "radio", name: "f", value: name });
    radio.checked = name === chosen.f;
    return html("label", { class: "choice" }, radio, name, html("span", {}, empty), html("small", {}, formula));
  });
  const legend = html("legend", {}, html("span", {}, "Aggregator"),
    html("span", {}, chosen.added ? "advantage of the empty trace" : ""));
  byId("aggregators").replaceChildren(legend, ...choices);
  if (focused) byId("aggregators").querySelector(":checked").focus();
}

function drawToken(text, gain, weight) {
  const strength = Math.min(1, Math.abs(gain) / 2) * 0.6;
  const color = `rgba(var(--${gain > 0 ? "gain" : "loss"}), ${strength.toFixed(3)})`;
  const label = html("span", { style: `background: ${color}; --thick: ${Math.round(5 * weight)}px` },
    visible(text, "") || " ");
  return html("span", { class: "token" }, label, html("small", {}, Math.abs(gain) >= 0.1 ? signed(gain, 1) : ""));
}

function drawRow({ k, trace, reward, times, added, advantage, weight }, sample, heaviest) {
  const length = Math.min(50, Math.abs(advantage) * 20);
  const size = (times > 1 ? `${times} traces of ` : "") + plural(trace.trace_len, "token") + (trace.finished ? "" : ", cut");
  const head = html("div", { class: "head" },
    html("div", { class: "advantage" }, signed(advantage)),
    html("div", { class: "meter", "aria-hidden": "true" },
      html("i", { style: `width: ${length}%; left: ${advantage < 0 ? 50 - length : 50}%` })),
    html("small", {}, `reward ${short(reward)}`), html("small", {}, added ? "empty trace, added" : size));
  const answer = html("div", { class: "answer", dir: "auto", tabindex: 0, role: "group",
    "aria-label": "gold answer, arrow keys walk through its tokens" });
  const gained = gains(trace.logp, sample.null_logp);
  const changes = [sum(gained.filter((x) => x > 0)), sum(gained.filter((x) => x < 0))];
  const changed = changes.filter((x) => Math.abs(x) >= 0.05).map((x) => signed(x, 1));
  if (changed.length) head.append(html("small", {}, changed.join(" and ") + " nats"));
  sample.answer.forEach((text, i) => {
    const token = drawToken(text, gained[i], Math.abs(weight[i]) / heaviest);
    token.onpointerenter = token.onclick = () => show(i);
    answer.append(token);
  });
  let here = -1;
  const show = (i) => {
    document.querySelector(".token.here")?.classList.remove("here");
    here = Math.max(0, Math.min(i, sample.answer.length - 1));
    answer.children[here].classList.add("here");
    byId("readout").replaceChildren(html("bdi", {}, html("b", {}, visible(sample.answer[here], ""))),
      `   probability ${short(Math.exp(trace.logp[here]))}, without thinking ` +
      `${short(Math.exp(sample.null_logp[here]))}   gain ${signed(gained[here])} nats   weight ${short(weight[here])}`);
  };
  answer.onkeydown = (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (way) show(here + way);
    if (way) event.preventDefault();
  };
  return html("div", { class: added ? "row added" : "row", "data-k": k }, head,
    html("div", {}, html("div", { class: "trace", dir: "auto" }, added ? "(no trace)" : visible(trace.trace)), answer));
}

// ---- start
function start() {
  document.title = runs.map((run) => run.name).join(", ");
  drawRuns();
  drawCurves();
  byId("key").append(html("span", {}, drawToken("lost", -1.5, 0), drawToken("gained", 1.5, 0),
    "log-prob against the empty trace, nats"),
    html("span", {}, drawToken("light", 0, 0), drawToken("heavy", 0, 1), "weight in the reward"));
  byId("run").append(...runs.map((run, i) => html("option", { value: i }, run.name)));
  byId("kind").append(html("option", { value: "held" }, "held out, the same at every step"),
    html("option", { value: "train" }, "first of each training step"));
  byId("run").onchange = () => choose({ run: +byId("run").value, f: "" });
  byId("kind").onchange = () => choose({ kind: byId("kind").value });
  byId("step").oninput = () => choose({ step: samplesOf(chosen.run, chosen.kind)[byId("step").value]?.step });
  byId("added").onchange = () => choose({ added: byId("added").checked });
  byId("aggregators").onchange = (event) => choose({ f: event.target.value });
  const address = new URLSearchParams(location.hash.slice(1));
  const kind = address.get("kind") === "train" || !samplesOf(0, "held").length ? "train" : "held";
  // At first the earliest step at which a trace helps.
  const step = +(address.get("step") ?? samplesOf(0, kind).find(helps)?.step ?? 0);
  const run = address.get("run") in runs ? +address.get("run") : 0;
  choose({ run, kind, step, f: address.get("f") ?? "", added: address.get("added") !== "false" });
}
start();
