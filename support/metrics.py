"""What a run says of itself: the figures of a step, log.jsonl, samples.jsonl, the console.

Names are stable, scripts rely on them; log-probs in nats, lengths in tokens, times in seconds, shares of 1.
  gain              gold_logp_think - gold_logp_null: what it is all about
  entropy           of the sampling distribution, mean per token; near 0 with dup_frac near 1 it is collapse: K equal traces
  zero_std_frac     share of questions whose traces all earned the same, so that they taught nothing
  rep_frac          share of 4-grams that occurred in their trace before: towards 1 for a loop
  sampler_gap       largest |log pi_train - log pi_sampler| of a token before the weights have moved: rounding, or a bug
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
from data import Example, Tokenizer
from reward import Scores
from sample import Trace
from support.distributed import rank


def group_figures(
    scores: Scores,
    traces: list[Trace],
    log_ratio: Tensor,
    clipped: Tensor,
    reward: Tensor,
    advantage: Tensor,
    null_logp: Tensor,
    losses: Tensor,
) -> dict:
    """What one question contributes to the log; lists have one entry per trace.

    log_ratio [K, Z] = log pi - log pi_sampler, clipped [K, Z]: whether it lies outside the range of the truncated ratio.
    """
    log_ratio, clipped = log_ratio[scores.trace_mask], clipped[scores.trace_mask]
    return {
        "reward": reward.tolist(),
        "advantage": advantage.tolist(),
        "think": scores.answer_logp.detach().sum(dim=1).tolist(),
        "null": scores.null_logp.sum().item(),
        "answer_tokens": scores.answer_logp.shape[1],
        "capped": (-null_logp > MAX_EXPONENT).sum().item(),
        "length": [len(trace.ids) for trace in traces],
        "finished": [trace.finished for trace in traces],
        "entropy": scores.entropy.sum().item(),
        "distinct": len({tuple(trace.ids) for trace in traces}) / len(traces),
        "repeats": [repeated_4grams(trace.ids) for trace in traces],
        "ratio_max": log_ratio.max().exp().item() if len(log_ratio) else 1.0,
        "clipped": clipped.sum().item(),
        "gap": log_ratio.abs().max().item() if len(log_ratio) else 0.0,
        "losses": losses.tolist(),
    }


def repeated_4grams(ids: list[int]) -> float:
    """Share of a trace's 4-grams that occurred in it before: 0 for fresh thought, towards 1 for a loop."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(figures: list[dict], norms: list[float]) -> dict[str, float]:
    """One step's log line from its questions' figures, in the order they were trained on, and the gradient norms of its updates."""
    updates = len(norms)

    def every(name: str) -> list[float]:  # one entry per trace of the step
        return [value for f in figures for value in f[name]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def total(name: str) -> float:
        return sum(f[name] for f in figures)

    rewards, lengths = every("reward"), every("length")
    tokens = max(1, sum(lengths))
    trace_loss, answer_loss, marker_loss, null_loss = (
        sum(f["losses"][i] for f in figures) / updates for i in range(4)
    )
    think, null = mean(every("think")), mean([f["null"] for f in figures])
    return {
        "reward_mean": mean(rewards),
        "reward_std": mean(
            [statistics.pstdev(f["reward"]) for f in figures]
        ),  # within a question: what advantages are made of
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "zero_std_frac": mean([not any(f["advantage"]) for f in figures]),
        "gold_logp_think": think,
        "gold_logp_null": null,
        "gain": think - null,
        "gold_ce": -sum(every("think"))
        / sum(f["answer_tokens"] * len(f["think"]) for f in figures),
        "null_capped": total("capped"),
        "trace_len_mean": mean(lengths),
        "trace_len_min": min(lengths),
        "trace_len_max": max(lengths),
        "finished_frac": mean(every("finished")),
        "entropy": total("entropy") / tokens,
        "dup_frac": 1 - mean([f["distinct"] for f in figures]),
        "rep_frac": mean(every("repeats")),
        "ratio_max": max(f["ratio_max"] for f in figures),
        "clip_frac": total("clipped") / tokens,
        "sampler_gap": max(
            f["gap"] for f in figures[: len(figures) // updates]
        ),  # before the weights have moved
        "trace_loss": trace_loss,
        "answer_loss": answer_loss,
        "marker_loss": marker_loss,
        "null_loss": null_loss,
        "loss": trace_loss + answer_loss + marker_loss + null_loss,
        "grad_norm": mean(norms),
        "bad_updates": sum(not math.isfinite(norm) for norm in norms),
    }


class Clock:
    """Seconds a step spends in each part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("sample", "score", "update"), 0.0)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Books the time since the last lap on `part`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def figures(self, tokens: int) -> dict[str, float]:
        """tokens_per_s: trace tokens (of all ranks) sampled, scored and trained on, per second of the step."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
        return (
            {"tokens_per_s": tokens / sum(self.seconds.values())}
            | {f"sec_{part}": seconds for part, seconds in self.seconds.items()}
            | {"mem_gb": peak / 1e9}
        )


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Log:
    """log.jsonl (a line per step), samples.jsonl (traces one can read), the console, and tensorboard where it is installed.

    Of several processes the first one speaks for all.
    """

    def __init__(self, out: Path, steps: int, last_step: int) -> None:
        self.out, self.steps, self.began, self.first = out, steps, time.perf_counter(), last_step
        if rank():
            return
        for name in ("log.jsonl", "samples.jsonl"):
            drop_lines_after(out / name, last_step)
        self.tensorboard = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)

    def write(self, record: dict) -> None:
        if rank():
            return
        # JSON knows no NaN: a figure that is not finite is null
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        append_line(self.out / "log.jsonl", record)
        if self.tensorboard:
            for name, value in record.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, record["step"])
            self.tensorboard.flush()
        print(self.console_line(record), flush=True)

    def say(self, text: str) -> None:
        if not rank():
            print(text, flush=True)

    def console_line(self, record: dict) -> str:
        step, steps = record["step"], self.steps
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        shown = {
            "reward_mean": "reward {:.3f}",
            "gain": "gain {:+.2f}",
            "gold_ce": "gold_ce {:.3f}",
            "trace_len_mean": "trace_len {:.1f}",
        }
        shown |= {
            "finished_frac": "finished {:.0%}",
            "entropy": "entropy {:.2f}",
            "grad_norm": "grad_norm {:.2g}",
        }
        shown |= {
            "eval_accuracy": "| eval_accuracy {:.3f}",
            "eval_accuracy_null": "without thinking {:.3f}",
            "eval_gain": "gain {:+.2f}",
        }
        parts += [
            shape.format(record[name])
            for name, shape in shown.items()
            if record.get(name) is not None
        ]
        if record.get("bad_updates"):
            parts.append(f"NOT APPLIED: {record['bad_updates']} update(s) not finite")
        if step > self.first:
            left = (time.perf_counter() - self.began) / (step - self.first) * (steps - step)
            parts.append(f"| {left / 60:.0f} min left" if left > 120 else f"| {left:.0f} s left")
        return "  ".join(parts)

    def samples(
        self, step: int, tokenizer: Tokenizer, example: Example, traces: list[Trace], figures: dict
    ) -> None:
        """The traces of the step's first question, with what they earned."""
        if rank():
            return
        shown = [
            {
                "trace": tokenizer.decode(trace.ids, special=True),
                "finished": trace.finished,
                "reward": reward,
                "advantage": advantage,
            }
            for trace, reward, advantage in zip(
                traces, figures["reward"], figures["advantage"], strict=True
            )
        ]
        append_line(
            self.out / "samples.jsonl",
            {"step": step, "question": example.question, "gold": example.gold, "traces": shown},
        )


def append_line(file: Path, record: dict) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def drop_lines_after(file: Path, step: int) -> None:
    """Forgets what an interrupted run logged beyond its last checkpoint (its last line may be half-written): it will be done again."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [
        line
        for line in lines
        if line.endswith(b"\n") and json.loads(line)["step"] <= step and step > 0
    ]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(file)
