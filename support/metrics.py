"""Metrics and logging: the figures of a question, of a step, log.jsonl, samples.jsonl, the console.

The keys of log.jsonl are stable; scripts rely on them. They are explained where they are made:
`question_figures`, `step_figures`, `time_figures`, evaluate.py. Log-probs in nats, times in
seconds. Means are over traces or questions of the step.
"""

import json
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from data import Example, Trace
from reward import RATIO_RANGE, Scores, log_ratio
from support.errors import TrainingError, read_json, refusing, write_text
from support.tokenizer import Tokenizer


# ---- figures
@dataclass
class Outcome:
    """What training made of one question and its K traces; the log shows it."""

    example: Example
    traces: list[Trace]
    scores: Scores
    null_logp: Tensor  # [T] as the reward used it
    reward: Tensor  # [K]
    advantage: Tensor  # [K]
    losses: Tensor | None = None  # [3] trace, answer and marker term; None if it only was scored
    score_seconds: float = 0.0  # up to the advantages


def question_figures(outcome: Outcome) -> dict:
    """One question's part of the log. Names that begin with _ are parts of the figures below, lists
    of them have one entry per trace. All others are logged as their means.
    """
    scores, traces = outcome.scores, outcome.traces
    log_ratios = log_ratio(scores, traces)[scores.trace_mask]  # [N], the sampled tokens
    low, high = RATIO_RANGE
    outside = (log_ratios.exp() < low) | (log_ratios.exp() > high)
    return {
        "zero_std_frac": not outcome.advantage.any().item(),  # equal rewards, or filtered
        "gold_logp_null": scores.null_logp.sum().item(),  # under the current policy
        "_reward": outcome.reward.tolist(),
        "_gold_logp_think": scores.answer_logp.detach().sum(dim=1).tolist(),
        "_answer_len": scores.answer_logp.shape[1],
        "_trace_len": [len(trace.ids) for trace in traces],
        "_finished": [trace.finished for trace in traces],
        "_cut": [trace.cut_id is not None for trace in traces],
        "_limit": [bool(t.ids) and not t.finished and t.cut_id is None for t in traces],
        "_actions": scores.trace_mask.sum().item(),  # sampled tokens, cut ones included
        "_entropy_sum": scores.entropy.sum().item(),
        "_distinct": len({tuple(trace.ids) for trace in traces}) / len(traces),
        "_rep": [repeated_4grams(trace.ids) for trace in traces],
        "_ratio_max": log_ratios.max().exp().item() if len(log_ratios) else 1.0,
        "_clipped": outside.sum().item(),
        "_sampler_gap": log_ratios.abs().max().item() if len(log_ratios) else 0.0,
        "_losses": outcome.losses.tolist(),
    }


def repeated_4grams(ids: list[int]) -> float:
    """Share of a trace's 4-grams that occurred in it before; towards 1 for a loop."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def step_figures(questions: list[dict], norms: list[float]) -> dict[str, float]:
    """One step's log line, from its questions' figures in the order they were trained on.

    norms: the gradient norm of each update.
    """

    def of_questions(name: str) -> list:
        return [question[name] for question in questions]

    def of_traces(name: str) -> list[float]:
        return [value for values in of_questions(name) for value in values]

    updates = len(norms)
    rewards, lengths = of_traces("_reward"), of_traces("_trace_len")
    actions = max(1, sum(of_questions("_actions")))
    think = of_traces("_gold_logp_think")
    answer_tokens = sum(q["_answer_len"] * len(q["_reward"]) for q in questions)
    losses = [sum(values) / updates for values in zip(*of_questions("_losses"), strict=True)]
    first_update = questions[: len(questions) // updates]
    means = {name: mean(of_questions(name)) for name in questions[0] if name[0] != "_"}
    return means | {
        "reward_mean": mean(rewards),
        "reward_std": mean([std(values) for values in of_questions("_reward")]),  # of a question's
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "gold_logp_think": mean(think),  # log-prob of the gold answer after a trace
        "gain": mean(think) - means["gold_logp_null"],  # how much thinking helps
        "gold_ce": -sum(think) / answer_tokens,  # per gold token, after a trace
        "trace_len_mean": mean(lengths),
        "trace_len_min": min(lengths),
        "trace_len_max": max(lengths),
        # How traces end: with a sampled marker, with another special token, at --max-trace.
        "finished_frac": mean(of_traces("_finished")),
        "cut_frac": mean(of_traces("_cut")),
        "limit_frac": mean(of_traces("_limit")),
        "entropy": sum(of_questions("_entropy_sum")) / actions,  # of the sampling distribution
        "dup_frac": 1 - mean(of_questions("_distinct")),  # 1 - distinct traces / K
        "rep_frac": mean(of_traces("_rep")),
        "ratio_max": max(of_questions("_ratio_max")),  # of pi / pi_sampler
        "clip_frac": sum(of_questions("_clipped")) / actions,  # tokens outside RATIO_RANGE
        # largest |log pi - log pi_sampler| before the first update: rounding, or a bug
        "sampler_gap": max(question["_sampler_gap"] for question in first_update),
        **dict(zip(("trace_loss", "answer_loss", "marker_loss"), losses, strict=True)),
        "loss": sum(losses),
        "grad_norm": mean(norms),  # before clipping
        "bad_updates": sum(not math.isfinite(norm) for norm in norms),  # not finite: not applied
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    """Of the population; NaN where a value is not finite (statistics raises other errors then)."""
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan


def time_figures(
    questions: list[dict], sample: float, score: float, update: float
) -> dict[str, float]:
    """From the seconds of a step's parts. tokens_per_s: trace tokens of all ranks, sampled, scored
    and trained on, per second.
    """
    trace_tokens = sum(sum(question["_trace_len"]) for question in questions)
    return {
        "tokens_per_s": trace_tokens / (sample + score + update),
        "sec_sample": sample,
        "sec_score": score,
        "sec_update": update,
        "mem_gb": peak_memory() / 1e9,
    }


def now() -> float:
    """Seconds, once a GPU has computed all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    "cut_frac": "cut {:.0%}",
    "limit_frac": "at limit {:.0%}",
    "entropy": "entropy {:.2f}",
    "grad_norm": "grad_norm {:.2g}",
    "eval_accuracy": "| eval_accuracy {:.3f}",
    "eval_accuracy_null": "without thinking {:.3f}",
    "eval_gain": "eval_gain {:+.2f}",
}
ENDS = ("finished_frac", "cut_frac", "limit_frac")  # shown where not 0; plain SFT has no traces


class Log:
    """log.jsonl, samples.jsonl, the console and a tracker (wandb or trackio)."""

    def __init__(self, out: Path, steps: int, last_step: int, writes: bool = True) -> None:
        """last_step: of the checkpoint that the run continues from, 0 for a new run.

        writes: False on all ranks but the first.
        """
        self.out = out
        self.steps = steps
        self.last_step = last_step
        self.writes = writes
        self.began = time.perf_counter()
        if writes:
            self.history = drop_lines_after(out / "log.jsonl", last_step)
            drop_lines_after(out / "samples.jsonl", last_step)
        config = read_json(out / "args.json")
        self.first_step = config.get("answers_first", 0) + 1  # in which traces are trained
        self.tracker = config.get("tracker", "none") if writes else "none"
        self.track("init", project="nrt", name=out.name, config=config)

    def track(self, function: str, *given: object, **named: object) -> None:
        """Calls the tracker's module. One that fails is left out; the run goes on."""
        try:
            if self.tracker != "none":
                getattr(import_module(self.tracker), function)(*given, **named)
        except Exception as error:
            self.print(f"note: {self.tracker}.{function} fails, nothing is tracked: {error}")
            self.tracker = "none"

    def print(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def write(self, record: dict) -> None:
        if not self.writes:
            return
        record = {name: finite(value) for name, value in record.items()}
        warnings = signs_of_collapse(self.history, record, self.first_step)
        if warnings:
            record["warnings"] = warnings
        self.history.append(record)
        append_line(self.out / "log.jsonl", record)
        numbers = {name: x for name, x in record.items() if isinstance(x, int | float)}
        self.track("log", numbers, step=record["step"])
        self.print("\n".join([self.console_line(record), *warnings]))

    def console_line(self, record: dict) -> str:
        step = record["step"]
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        for name, text in CONSOLE.items():
            value = record.get(name)
            if value is not None and (value or name not in ENDS):
                parts.append(text.format(value))
        if record.get("bad_updates"):
            parts.append(f"NOT APPLIED: {record['bad_updates']} update(s) not finite")
        if step > self.last_step:
            per_step = (time.perf_counter() - self.began) / (step - self.last_step)
            left = per_step * (self.steps - step)
            parts.append(f"| {left / 60:.0f} min left" if left > 120 else f"| {left:.0f} s left")
        return "  ".join(parts)

    def samples(
        self, step: int, tokenizer: Tokenizer, outcome: Outcome, held_out: bool = False
    ) -> None:
        """One question's traces as text, and the log-probs that their rewards were computed from.

        examples/report.py draws it.
        """
        if not self.writes:
            return
        example, shown = outcome.example, []
        for i, trace in enumerate(outcome.traces):
            shown.append(
                {
                    "trace": tokenizer.decode(trace.ids, special=True),
                    "trace_len": len(trace.ids),
                    "finished": trace.finished,
                    "reward": finite(outcome.reward[i].item()),
                    "advantage": finite(outcome.advantage[i].item()),
                    "logp": rounded(outcome.scores.answer_logp[i]),
                }
            )
        line = {
            "step": step,
            "held_out": held_out,
            "question": example.question,
            "gold": example.gold,
            "answer": [tokenizer.decode([token], special=True) for token in example.answer],
            "null_logp": rounded(outcome.null_logp),
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
    text = file.read_text("utf-8") if file.exists() and step else ""
    whole = text[: text.rfind("\n") + 1]  # a kill may have left half of the last line
    with refusing(file):
        lines = [json.loads(line) for line in whole.splitlines()]
        kept = [line for line in lines if line["step"] <= step]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return kept


# ---- signs of collapse: one warning per sign and run
# What to try where the reward pays for short traces: preflight.py shows which reward would keep
# this model thinking; with --clip-null none pays for stopping (EXPERIMENTS.md).
OTHER_REWARD = "another --aggregator (preflight.py compares them)"
# The sign; the figure it shows; whether it holds for a line of the log, given the first;
# what to try. Entropy is no sign: it falls when thinking is learnt as well.
SIGNS = (
    (
        "vanishing_trace",  # traces are down to a token or two; the marker alone is one
        "trace_len_mean",
        lambda line, first: line["trace_len_mean"] < 3 <= first["trace_len_mean"],
        f"--clip-null with --null policy, or {OTHER_REWARD}",
    ),
    (
        "unfinished_trace",  # few traces end with the marker; plain SFT samples none
        "finished_frac",
        lambda line, first: line["finished_frac"] < 0.2 < line["cut_frac"] + line["limit_frac"],
        "a longer --max-trace (limit_frac), or another --marker or --prompt-format (cut_frac)",
    ),
    (
        "repeated_trace",  # traces repeat themselves
        "rep_frac",
        lambda line, first: line["rep_frac"] > 0.5,
        "a lower --lr, a shorter --max-trace",
    ),
    (
        "dead_groups",  # rewards are equal, though thinking gains nothing; plain SFT samples none
        "zero_std_frac",
        lambda line, first: (
            min(line["zero_std_frac"], line["trace_len_max"]) > 0.9 and line["gain"] < 0.1
        ),
        f"more --traces, or {OTHER_REWARD}",
    ),
    (
        "trace_ignored",  # the answer is as likely after another question's trace
        "eval_gain_shuffled",
        lambda line, first: (
            line["eval_gain"] - line["eval_gain_shuffled"] < 0.02 and line["eval_trace_len"] >= 3
        ),
        OTHER_REWARD,
    ),
    (
        "null_drift",  # the null think unlearnt the answer; weights made of n_i have all grown
        "gold_logp_null",
        lambda line, first: (
            line["gold_logp_null"] < min(first["gold_logp_null"] - 5, 2 * first["gold_logp_null"])
        ),
        "--null frozen",
    ),
)
RUN = 3  # consecutive lines of the log with the sign's figures in which it must hold


def signs_of_collapse(history: list[dict], record: dict, first_step: int = 1) -> list[str]:
    """Texts of the signs that hold for the first time with `record`, the newest line of the log.

    history: the lines before it. A line keeps its warnings under the key "warnings", so that a run
    that is resumed does not repeat them. Lines before first_step do not count.
    """
    lines = [line for line in [*history, record] if line["step"] >= first_step]
    given = "\n".join(text for line in history for text in line.get("warnings", []))
    found = []
    for name, figure, holds, remedy in SIGNS:
        seen = []
        for line in lines:
            try:
                seen.append((line["step"], holds(line, lines[0])))
            except (KeyError, TypeError):  # not evaluated in this step, or a figure that was NaN
                continue
        last = seen[-RUN:]
        if name in given or len(last) < RUN or last[-1][0] != record["step"]:
            continue
        if all(held for _, held in last):
            value = f"{record[figure]:+.3g} at step {record['step']}"
            found.append(f"{name}: {figure} {value}; try {remedy}")
    return found
