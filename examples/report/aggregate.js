// Rewards, answer weights and advantages, as aggregate.py computes them (tests/test_report.py
// compares the two). Log-probs in nats. c_i: probability of answer token i after a trace;
// n_i: the same after the empty trace; T: answer tokens; K: traces of the question.

const MAX_EXPONENT = 80; // cap of -log n_i
const ROUNDING = 1e-6; // nats, the error of an fp32 log-prob

const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => sum(values) / values.length;
const std = (values, correction) => {
  const center = mean(values);
  return Math.sqrt(sum(values.map((x) => (x - center) ** 2)) / (values.length - correction));
};
const logMeanExp = (values) => {
  const top = Math.max(...values);
  return top + Math.log(mean(values.map((x) => Math.exp(x - top))));
};

// A method is f(logp [T], null_logp [T]) -> [reward, weight [T]] of one trace.
const ofTrace = (f) => (logp, nullLogp) => {
  const rows = logp.map((row) => f(row, nullLogp));
  return { reward: rows.map((row) => row[0]), weight: rows.map((row) => row[1]) };
};
const logProb = (c) => [sum(c), c.map(() => 1)];
const prob = (c) => [Math.exp(sum(c)), c.map(() => Math.exp(sum(c)))];
const geometricMean = (c) => [Math.exp(mean(c)), c.map(() => Math.exp(mean(c)) / c.length)];
const infoGain = (c, n) => [mean(c.map((x, i) => x - n[i])), c.map(() => 1 / c.length)];

// f = 1/T sum_i c_i s_i, with s_i made of n_i: each term divided by T is its own derivative.
const weightedSum = (scale) => (c, n) => {
  const terms = c.map((x, i) => (Math.exp(x) * scale(n[i])) / c.length);
  return [sum(terms), terms];
};

// Two methods compare the K traces of a group: f(logp [K][T]) -> {reward [K], weight [K][T]}.
function r3(logp) {
  const column = (i) => logp.map((row) => row[i]);
  const spread = logp[0].map((_, i) => std(column(i), 0));
  const total = sum(spread);
  const share = spread.map((x) => (total === 0 ? 1 / spread.length : x / total));
  return {
    reward: logp.map((row) => sum(row.map((x, i) => x * share[i]))),
    weight: logp.map(() => share),
  };
}

function jlbMulti(logp) {
  const totals = logp.map(sum);
  const bound = logMeanExp(totals);
  const without = (k) => logMeanExp(totals.filter((_, i) => i !== k));
  return {
    reward: totals.map((x, k) => (totals.length === 1 ? x : bound - without(k))),
    weight: totals.map((x, k) => logp[k].map(() => Math.exp(x - bound) / totals.length)),
  };
}

const AGGREGATORS = {
  weighted_sum_log_prob: { formula: "1/T Σ −c log n", f: ofTrace(weightedSum((n) => -n)) },
  weighted_sum_inverse_prob: {
    formula: "1/T Σ c / n",
    f: ofTrace(weightedSum((n) => Math.exp(Math.min(-n, MAX_EXPONENT)))),
  },
  r3: { formula: "Σ v log c,  v ∝ std of log c over the traces", f: r3 },
  arithmetic_mean: { formula: "1/T Σ c", f: ofTrace(weightedSum(() => 1)) },
  geometric_mean: { formula: "(Π c)^(1/T)", f: ofTrace(geometricMean) },
  prob: { formula: "Π c", f: ofTrace(prob) },
  log_prob: { formula: "Σ log c", f: ofTrace(logProb) },
  info_gain: { formula: "1/T Σ (log c − log n)", f: ofTrace(infoGain) },
  jlb_multi: { formula: "log 1/K Σ Π c, minus the same without this trace", f: jlbMulti },
};

// logp [K][T], null_logp [T] -> {reward [K], weight [K][T]}, weight = d objective / d logp.
function aggregate(name, logp, nullLogp) {
  return AGGREGATORS[name].f(logp, nullLogp);
}

// reward [K], weight [K][T] -> advantage [K]; rewards that differ only by rounding get 0.
function advantages(reward, weight, center = "mean", scale = "std") {
  if (center === "none" && scale === "none") return reward;
  const floor = ROUNDING * Math.max(...weight.map((row) => sum(row.map(Math.abs))));
  const spread = std(reward, 1);
  if (spread <= floor) return reward.map(() => 0);
  const baseline = center === "mean" ? mean(reward) : 0;
  const divisor = { std: spread, mean: mean(reward), none: 1 }[scale];
  return reward.map((x) => (x - baseline) / divisor);
}
