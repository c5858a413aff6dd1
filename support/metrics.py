"""Metrics and logging: the figures of a question, of a step, log.jsonl, samples.jsonl, the console.

The keys of log.jsonl are stable; scripts rely on them. Log-probs in nats, lengths in tokens, times
in seconds. Means are over traces or questions of the step.

    reward_mean, reward_min, reward_max     of the K traces of every question
    reward_std        std of the K rewards of a question (of the population)
    zero_std_frac     share of questions whose rewards were all equal: no trace term
    gold_logp_think   log-prob of the gold answer after a trace
    gold_logp_null    the same after the empty trace, under the current policy
    gain              gold_logp_think - gold_logp_null: how much thinking helps
    gold_ce           cross-entropy per gold token after a trace
    null_capped       answer tokens whose 1 / n_i was capped (aggregate.MAX_EXPONENT)
    trace_len_mean, trace_len_min, trace_len_max
    len_reward_corr   correlation of trace length and reward within a question, mean over questions
                      whose lengths and rewards both vary; below 0: shorter traces get higher reward
    finished_frac     share of traces that ended with a sampled marker
    entropy           of the sampling distribution, mean per trace token
    dup_frac          share of traces that equal an earlier trace of their question
    rep_frac          share of 4-grams that occurred before in their trace
    ratio_max         largest importance ratio pi / pi_sampler
    clip_frac         share of trace tokens whose ratio lies outside the truncation range; with one
                      update per step nothing is truncated
    sampler_gap       largest |log pi - log pi_sampler| before the first update: rounding, or a bug
    trace_loss, answer_loss, marker_loss, null_loss, loss     the terms of the loss, and their sum
    grad_norm         before clipping, mean over the step's updates
    bad_updates       updates whose gradient was not finite; they are not applied
    lr, skipped_long, tokens_per_s, sec_sample, sec_score, sec_update, mem_gb
    eval_...          see evaluate.py
    warnings          texts: signs of collapse that show for the first time (support/collapse.py)
"""

import json
import math
import resource
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from aggregate import MAX_EXPONENT
from data import Example
from support.tokenizer import Tokenizer
from reward import Scores, log_ratio
from data import Trace
from support.distributed import rank
from support.errors import TrainingError, python, read_log


# ---- figures
def question_figures(
    scores: Scores,
    traces: list[Trace],
    ratio_range: tuple[float, float],
    reward: Tensor,
    advantage: Tensor,
    null_logp: Tensor,
    losses: Tensor,
) -> dict:
    """One question's part of the log, by the keys of log.jsonl; a list has one entry per trace.

    ratio_range: outside of it a token counts as clipped. reward and advantage [K]; null_logp [T] as
    the reward used it; losses [4]: trace, answer, marker, null.
    """
    log_ratios = log_ratio(scores, traces)[scores.trace_mask]  # [N], the sampled tokens
    low, high = ratio_range
    outside = (log_ratios.exp() < low) | (log_ratios.exp() > high)
    return {
        "reward": reward.tolist(),
        "advantage": advantage.tolist(),
        "gold_logp_think": scores.answer_logp.detach().sum(dim=1).tolist(),
        "gold_logp_null": scores.null_logp.sum().item(),
        "answer_len": scores.answer_logp.shape[1],
        "null_capped": (-null_logp > MAX_EXPONENT).sum().item(),
        "trace_len": [len(trace.ids) for trace in traces],
        "finished": [trace.finished for trace in traces],
        "entropy_sum": scores.entropy.sum().item(),
        "distinct": len({tuple(trace.ids) for trace in traces}) / len(traces),
        "rep": [repeated_4grams(trace.ids) for trace in traces],
        "ratio_max": log_ratios.max().exp().item() if len(log_ratios) else 1.0,
        "clipped": outside.sum().item(),
        "sampler_gap": log_ratios.abs().max().item() if len(log_ratios) else 0.0,
        "losses": losses.tolist(),
    }


def repeated_4grams(ids: list[int]) -> float:
    """Share of a trace's 4-grams that occurred in it before; towards 1 for a loop."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def step_figures(questions: list[dict], norms: list[float]) -> dict[str, float]:
    """One step's log line, from its questions' figures in the order they were trained on.

    norms: the gradient norm of each update. A number of your own needs no line here: under a name
    that starts with own_ (figures[-1]["own_size"] = ... in train.py) its mean is logged.
    """

    def of_traces(name: str) -> list[float]:
        return [value for question in questions for value in question[name]]

    def of_questions(name: str) -> list[float]:
        return [question[name] for question in questions]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    updates = len(norms)
    rewards, lengths = of_traces("reward"), of_traces("trace_len")
    trace_tokens = max(1, sum(lengths))
    think, null = mean(of_traces("gold_logp_think")), mean(of_questions("gold_logp_null"))
    answer_tokens = sum(question["answer_len"] * len(question["reward"]) for question in questions)
    losses = [sum(values) / updates for values in zip(*of_questions("losses"), strict=True)]
    trace_loss, answer_loss, marker_loss, null_loss = losses
    first_update = questions[: len(questions) // updates]
    own = {name: mean(of_questions(name)) for name in questions[0] if name.startswith("own_")}
    return own | {
        "reward_mean": mean(rewards),
        "reward_std": mean([std(values) for values in of_questions("reward")]),
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "zero_std_frac": mean([not any(values) for values in of_questions("advantage")]),
        "gold_logp_think": think,
        "gold_logp_null": null,
        "gain": think - null,
        "gold_ce": -sum(of_traces("gold_logp_think")) / answer_tokens,
        "null_capped": sum(of_questions("null_capped")),
        "trace_len_mean": mean(lengths),
        "trace_len_min": min(lengths),
        "trace_len_max": max(lengths),
        "len_reward_corr": mean_correlation(of_questions("trace_len"), of_questions("reward")),
        "finished_frac": mean(of_traces("finished")),
        "entropy": sum(of_questions("entropy_sum")) / trace_tokens,
        "dup_frac": 1 - mean(of_questions("distinct")),
        "rep_frac": mean(of_traces("rep")),
        "ratio_max": max(of_questions("ratio_max")),
        "clip_frac": sum(of_questions("clipped")) / trace_tokens,
        "sampler_gap": max(question["sampler_gap"] for question in first_update),
        "trace_loss": trace_loss,
        "answer_loss": answer_loss,
        "marker_loss": marker_loss,
        "null_loss": null_loss,
        "loss": trace_loss + answer_loss + marker_loss + null_loss,
        "grad_norm": mean(norms),
        "bad_updates": sum(not math.isfinite(norm) for norm in norms),
    }


def std(values: list[float]) -> float:
    """Of the population; NaN where a value is not finite (statistics raises other errors then)."""
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan


def mean_correlation(xs: list[list[float]], ys: list[list[float]]) -> float:
    """Mean of Pearson's correlation over the questions for which it exists; 0 if for none."""
    found = []
    for x, y in zip(xs, ys, strict=True):
        if len(set(x)) > 1 and len(set(y)) > 1 and all(map(math.isfinite, y)):
            found.append(statistics.correlation(x, y))
    return sum(found) / len(found) if found else 0.0


class Clock:
    """Seconds that a step spends in its parts."""

    def __init__(self) -> None:
        self.seconds = {"sample": 0.0, "score": 0.0, "update": 0.0}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to `part`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def figures(self, questions: list[dict]) -> dict[str, float]:
        """tokens_per_s: trace tokens of all ranks, sampled, scored and trained on, per second."""
        trace_tokens = sum(sum(question["trace_len"]) for question in questions)
        figures = {"tokens_per_s": trace_tokens / sum(self.seconds.values())}
        for part, seconds in self.seconds.items():
            figures[f"sec_{part}"] = seconds
        figures["mem_gb"] = peak_memory() / 1e9
        return figures


def peak_memory() -> int:
    """Bytes at the process's highest point so far: of the GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- the log
CONSOLE = {
    "reward_mean": "reward {:.3f}",
    "gain": "gain {:+.2f}",
    "gold_ce": "gold_ce {:.3f}",
    "trace_len_mean": "trace_len {:.1f}",
    "finished_frac": "finished {:.0%}",
    "entropy": "entropy {:.2f}",
    "grad_norm": "grad_norm {:.2g}",
    "eval_accuracy": "| eval_accuracy {:.3f}",
    "eval_accuracy_null": "without thinking {:.3f}",
    "eval_gain": "gain {:+.2f}",
}


class Log:
    """log.jsonl, samples.jsonl, the console, and tensorboard where it is installed.

    Only the first rank writes and prints.
    """

    def __init__(self, out: Path, steps: int, last_step: int) -> None:
        """last_step: the step of the checkpoint that the run continues from; 0 for a new run."""
        self.out = out
        self.steps = steps
        self.last_step = last_step
        self.began = time.perf_counter()
        self.tensorboard = None
        if rank():
            return
        self.history = drop_lines_after(out / "log.jsonl", last_step)
        drop_lines_after(out / "samples.jsonl", last_step)
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = str(out / "tensorboard")
            self.tensorboard = SummaryWriter(folder, purge_step=last_step + 1)

    def print(self, text: str) -> None:
        if not rank():
            print(text, flush=True)

    def write(self, record: dict) -> None:
        if rank():
            return
        record = {name: finite(value) for name, value in record.items()}
        warnings = collapse_warnings(self.history, record)
        if warnings:
            record["warnings"] = warnings
        self.history.append(record)
        append_line(self.out / "log.jsonl", record)
        if self.tensorboard:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, record["step"])
            self.tensorboard.flush()
        print("\n".join([self.console_line(record), *warnings]), flush=True)

    def console_line(self, record: dict) -> str:
        step = record["step"]
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        for name, text in CONSOLE.items():
            if record.get(name) is not None:
                parts.append(text.format(record[name]))
        if record.get("bad_updates"):
            parts.append(f"NOT APPLIED: {record['bad_updates']} update(s) not finite")
        if step > self.last_step:
            per_step = (time.perf_counter() - self.began) / (step - self.last_step)
            left = per_step * (self.steps - step)
            parts.append(f"| {left / 60:.0f} min left" if left > 120 else f"| {left:.0f} s left")
        return "  ".join(parts)

    def samples(
        self,
        step: int,
        tokenizer: Tokenizer,
        example: Example,
        traces: list[Trace],
        scores: Scores,
        null_logp: Tensor,
        reward: Tensor,
        advantage: Tensor,
        held_out: bool = False,
    ) -> None:
        """One question's traces as text, and the log-probs that their rewards were computed from.

        null_logp [T] as the reward used it; reward and advantage [K]. examples/report.py draws it.
        """
        if rank():
            return
        shown = []
        for i, trace in enumerate(traces):
            shown.append(
                {
                    "trace": tokenizer.decode(trace.ids, special=True),
                    "trace_len": len(trace.ids),
                    "finished": trace.finished,
                    "reward": finite(reward[i].item()),
                    "advantage": finite(advantage[i].item()),
                    "logp": rounded(scores.answer_logp[i]),
                }
            )
        line = {
            "step": step,
            "held_out": held_out,
            "question": example.question,
            "gold": example.gold,
            "answer": [tokenizer.decode([token], special=True) for token in example.answer],
            "null_logp": rounded(null_logp),
            "traces": shown,
        }
        append_line(self.out / "samples.jsonl", line)


def rounded(logp: Tensor) -> list[float | None]:
    """Log-probs for the log. An fp32 log-prob is not exact beyond 6 decimals."""
    return [finite(round(value, 6)) for value in logp.tolist()]


def finite(value: float) -> float | None:
    """JSON has no NaN: a figure that is not finite becomes null."""
    return value if math.isfinite(value) else None


def append_line(file: Path, record: dict) -> None:
    try:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:  # the disk is full
        raise TrainingError(f"{file}: cannot be written: {error.strerror}") from None


def drop_lines_after(file: Path, step: int) -> list[dict]:
    """Removes what an interrupted run logged after its last checkpoint -> the lines that stay."""
    kept = [line for line in read_log(file) if 0 < step and line["step"] <= step]
    temporary = file.with_name(file.name + ".tmp")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
    return kept


# ---- signs of collapse
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


def collapse_warnings(history: list[dict], record: dict) -> list[str]:
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
