"""Signs that thinking collapses, from the figures that a run logs: one warning per sign and run.

    vanishing_trace  traces are down to a token or two; the marker alone is one
    repeated_trace   traces repeat themselves
    dead_groups      the K rewards of a question are equal, though thinking gains nothing; at first
                     no fault with --clip-null: traces are worse than none
    trace_ignored    the answer is as likely after another question's trace
    null_drift       the null think has unlearnt the answer; weights made of n_i have all grown

Entropy is no sign: it falls when thinking is learnt as well. A sign must hold in RUN consecutive
lines of the log that have its figures; step 0 does not count.
"""

from support.errors import python

RUN = 3  # lines
# What to try where the reward pays for short traces. `evaluate.py --preflight` shows which reward
# would keep this model thinking; with --clip-null none pays for stopping (EXPERIMENTS.md).
OTHER_REWARD = f"another --aggregator ({python()} evaluate.py --preflight compares them)"


def vanishing_trace(line: dict, first: dict) -> float | None:
    """-> the figure to show where the sign holds, else None; KeyError where the line has none."""
    length = line["trace_len_mean"]
    return length if length < 3 and first["trace_len_mean"] >= 3 else None


def repeated_trace(line: dict, first: dict) -> float | None:
    return line["rep_frac"] if line["rep_frac"] > 0.5 else None


def dead_groups(line: dict, first: dict) -> float | None:
    dead = line["zero_std_frac"]
    samples = line["trace_len_max"] > 0  # plain SFT does not
    return dead if samples and dead > 0.9 and line["gain"] < 0.1 else None


def trace_ignored(line: dict, first: dict) -> float | None:
    specific = line["eval_gain"] - line["eval_gain_shuffled"]
    return specific if line["eval_trace_len"] >= 3 and specific < 0.02 else None


def null_drift(line: dict, first: dict) -> float | None:
    fallen = line["gold_logp_null"] - first["gold_logp_null"]
    return fallen if fallen < -5 and fallen < first["gold_logp_null"] else None


# The sign, the metric its figure is taken from, and what to try.
SIGNS = (
    (vanishing_trace, "trace_len_mean", f"--clip-null, or {OTHER_REWARD}"),
    (repeated_trace, "rep_frac", "a lower --lr, a shorter --max-trace"),
    (dead_groups, "zero_std_frac", f"more --traces, or {OTHER_REWARD}"),
    (trace_ignored, "eval_gain - eval_gain_shuffled", OTHER_REWARD),
    (null_drift, "gold_logp_null", "--null frozen or --null-loss 0.1"),
)


def warnings(history: list[dict], record: dict) -> list[str]:
    """Texts of the signs that hold for the first time with `record`, the newest line of the log.

    history: the lines before it. A line keeps its warnings under the key "warnings", so that a run
    that is resumed does not repeat them.
    """
    lines = [line for line in [*history, record] if line["step"] > 0]
    given = [text for line in history for text in line.get("warnings") or []]
    found = []
    for sign, metric, remedy in SIGNS:
        name = sign.__name__
        if any(str(text).startswith(name) for text in given):
            continue
        values = []
        for line in lines:
            try:
                values.append((line["step"], sign(line, lines[0])))
            except (KeyError, TypeError):  # not evaluated in this step, or a figure that was NaN
                continue
        last = values[-RUN:]
        newest = last and last[-1][0] == record["step"]
        if newest and len(last) == RUN and all(value is not None for _, value in last):
            value = last[-1][1]
            found.append(f"{name}: {metric} {value:+.3g} at step {record['step']}; try {remedy}")
    return found
