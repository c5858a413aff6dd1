"""Drawing reasoning traces from the policy, and the command that talks to a trained model.

Each prompt is read once; its keys and values are copied into K rows of static memory ("slots"), and all rows then decode together, one
token a step, whatever their lengths. A row's randomness is a function of (its question's seed, k) alone, so a trace does not depend on
what else is in the batch. What is recorded is what was sampled: ids and their log-probs, never text.

    python sample.py --model DIR --question "..."                  the trace and the answer
    python sample.py --model DIR --question "..." --gold "..."     ... and each gold token, coloured by how much thinking raised it
    python sample.py --model DIR --data test.jsonl                 exact match with and without thinking, gain, trace length
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example, Pairs, Tokenizer, stream_seed
from errors import InputError, OneLineParser, exit_on_bad_input
from model import Config, Prefix, Transformer, load_model
from reward import score


@dataclass
class Trace:
    """One sampled continuation of a prompt."""

    ids: list[int]  # as sampled; the stop token that finished it comes last
    logp: list[float]  # log-prob in nats of each id under the distribution it was drawn from
    finished: bool  # ended by a stop token; False: cut, by the length limit or by a cut token
    cut_id: int | None = None  # the cut token: no longer part of ids, but sampled all the same
    cut_logp: float = 0.0


# ---------------------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def sample_traces(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cut_ids: Sequence[int] = (),
) -> list[list[Trace]]:
    """k traces of at most max_new_tokens for every prompt.

    temperature 0 is greedy. stop_ids end a trace and stay in it (the marker: stopping is an action); cut_ids end it and are dropped (eos
    and the like: not a decision to answer). Only sampled tokens stop a trace: an eos inside the prompt does not. seed: one for all, or
    one per prompt; the same seed gives a prompt the same traces whatever else is sampled beside it.
    """
    if k < 1 or max_new_tokens < 1 or temperature < 0 or not prompts or not all(prompts):
        raise InputError("sample_traces needs prompts of at least one token, k >= 1, max_new_tokens >= 1 and temperature >= 0")
    device, rows = model.lm_head.weight.device, len(prompts) * k
    seeds = [stream_seed(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    uniforms = torch.cat([uniform(s, k, max_new_tokens) for s in seeds]).to(device)  # [R, max_new]
    ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ends[[token for token in (*stop_ids, *cut_ids) if token < len(ends)]] = True  # a tokenizer may know tokens the model does not
    ends = ends.to(device)

    # Prompts once each, padded on the right; then every prompt's keys and values into its k rows.
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    width = int(lengths.max())
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)  # [B, P]
    prefix = Prefix()
    hidden = model(padded, prefix)[torch.arange(len(prompts), device=device), lengths - 1]  # [B, H]
    slots = Slots(model.config, rows, width + max_new_tokens, like=hidden)
    slots.fill(prefix, lengths, copies=k)
    hidden = hidden.repeat_interleave(k, dim=0)  # [R, H]

    ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logp = torch.zeros(rows, max_new_tokens, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        ids[:, step], logp[:, step] = draw(logits(hidden, model.lm_head.weight), temperature, uniforms[:, step])
        done |= ends[ids[:, step]]
        if step + 1 == max_new_tokens or bool(done.all()):
            break
        hidden = model(ids[:, step : step + 1], slots)[:, 0]  # finished rows decode on, unread: static shapes are worth more
        slots.advance()
    traces = [cut(*row, stop_ids, cut_ids) for row in zip(ids[:, : step + 1].tolist(), logp[:, : step + 1].tolist(), strict=True)]
    return [traces[i : i + k] for i in range(0, rows, k)]


def uniform(seed: int, k: int, count: int) -> Tensor:
    """The random numbers of one prompt's k traces, [k, count] in [0, 1): drawn on the CPU, so that every device samples the same."""
    return torch.rand(k, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [R, H], weight [V, H] -> fp32 logits [R, V] (fp64 for an fp64 model), never rounded to bf16 where the device can avoid it."""
    if hidden.dtype in (torch.bfloat16, torch.float16) and hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    wide = F.linear(hidden, weight)
    return wide if wide.dtype == torch.float64 else wide.float()


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: logits [R, V], uniform [R] in [0, 1) -> token [R], logp [R].

    Inverse-CDF sampling: one random number per token, whatever the vocabulary. The running sum is fp64: in fp32 it would lose every
    token less likely than 1e-7.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1)
    else:
        cdf = logp.double().exp().cumsum(dim=-1)
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )  # NaN logits stay in range
    return token, logp.gather(1, token[:, None])[:, 0]


def cut(ids: list[int], logp: list[float], stop_ids: Sequence[int], cut_ids: Sequence[int]) -> Trace:
    """The trace within what a row has decoded: up to its first stop token (kept) or cut token (dropped)."""
    for at, token in enumerate(ids):
        if token in stop_ids:
            return Trace(ids[: at + 1], logp[: at + 1], finished=True)
        if token in cut_ids:
            return Trace(ids[:at], logp[:at], finished=False, cut_id=token, cut_logp=logp[at])
    return Trace(ids, logp, finished=False)


class Slots:
    """Static key/value memory for R rows that decode together: [R, Hkv, capacity, D] per layer, of which row r holds length[r] places."""

    def __init__(self, config: Config, rows: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)  # [R] tokens held
        self.used = 0  # no row holds more places than this; what lies beyond is not read

    def fill(self, prefix: Prefix, lengths: Tensor, copies: int) -> None:
        """Copies B right-padded prompts into `copies` rows each. A row overwrites the padding as it grows, and never sees it before."""
        for layer, (k, v) in enumerate(prefix.kv):
            self.kv[layer, 0, :, :, : prefix.length] = k.repeat_interleave(copies, dim=0)
            self.kv[layer, 1, :, :, : prefix.length] = v.repeat_interleave(copies, dim=0)
        self.length.copy_(lengths.repeat_interleave(copies))
        self.used = prefix.length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token per row, k and v [R, Hkv, 1, D], at the row's own place -> all places in use, [R, Hkv, used + 1, D]."""
        place = self.length.view(-1, 1, 1, 1).expand(k.shape)
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys.scatter_(2, place, k)  # scatter_, not indexing: 40 times faster on a CPU
        values.scatter_(2, place, v)
        return keys[:, :, : self.used + 1], values[:, :, : self.used + 1]

    def advance(self) -> None:
        self.length += 1
        self.used += 1


# ---------------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], max_trace: int, batch: int = 64) -> dict[str, float]:
    """Held-out figures over `examples`, decoding greedily: the answer is right if its text equals the gold answer's.

    eval_accuracy: after a trace of the model's own. eval_accuracy_null: with the empty trace. eval_gain: how much the trace raises the
    gold answer's log-prob, nats per answer. eval_trace_len: tokens.
    """
    marker, totals = tokenizer.marker_id, torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        thoughts = sample_traces(model, [e.prompt for e in part], 1, max_trace, 0.0, [marker], cut_ids=tokenizer.cut_ids)
        traces = [trace for (trace,) in thoughts]
        right = answers_right(model, tokenizer, part, [trace_ids(trace, marker) for trace in traces])
        right_null = answers_right(model, tokenizer, part, [[marker] for _ in part])
        for example, trace, *rights in zip(part, traces, right, right_null, strict=True):
            scores = score(model, example.prompt, [trace], example.answer, marker)
            gain = scores.answer_logp.sum() - scores.null_logp.sum()
            totals += torch.tensor([*rights, float(gain), len(trace.ids)], dtype=torch.float64)
    names = ("eval_accuracy", "eval_accuracy_null", "eval_gain", "eval_trace_len")
    return dict(zip(names, (totals / len(examples)).tolist(), strict=True))


def trace_ids(trace: Trace, marker: int) -> list[int]:
    """The trace as context for the answer: its ids, with the marker forced where the model did not emit it."""
    return trace.ids if trace.finished else [*trace.ids, marker]


def answers_right(model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], contexts: list[list[int]]) -> list[bool]:
    """Whether the greedy answer after prompt + context is the gold answer. More tokens than the gold has cannot be right."""
    prompts = [[*e.prompt, *context] for e, context in zip(examples, contexts, strict=True)]
    longest = max(len(e.answer) for e in examples)
    answers = sample_traces(model, prompts, 1, longest, 0.0, tokenizer.eos_ids)
    return [
        answer.finished and len(answer.ids) <= len(e.answer) and tokenizer.decode(answer.ids).strip() == tokenizer.decode(e.answer).strip()
        for e, (answer,) in zip(examples, answers, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------- the command
def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory, a run's final/ for instance")
    parser.add_argument("--question", help="one question to answer")
    parser.add_argument("--gold", help="its gold answer: shows what thinking does to each of its tokens")
    parser.add_argument("--data", help="JSONL file to score instead")
    parser.add_argument("--limit", type=int, default=1000, help="rows of --data to score")
    parser.add_argument("--max-trace", type=int, default=512, help="tokens")
    parser.add_argument("--max-answer", type=int, default=512, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marker", help="default: the model directory's own")
    parser.add_argument("--prompt-format", help="default: the model directory's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if (args.question is None) == (args.data is None):
        raise InputError("give either --question or --data")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, it should be 0 or more")
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    if tokenizer.marker_is_new:
        raise InputError(f"--marker {tokenizer.marker!r} is not in {args.model}'s vocabulary: was this model trained with another?")
    model = load_model(args.model, getattr(torch, args.dtype), args.device)
    if args.data:
        pairs = Pairs(args.data, tokenizer)
        figures = evaluate(model, tokenizer, [pairs[i] for i in range(min(args.limit, len(pairs)))], args.max_trace)
        print("\n".join(f"{name} {value:.4g}" for name, value in figures.items()))
    else:
        talk(model, tokenizer, args)


def talk(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Prints the trace and the answer to one question, and what the trace does to the gold answer."""
    marker = tokenizer.marker_id
    prompt = tokenizer.encode_prompt(tokenizer.prompt_format.replace("{question}", args.question.strip()))
    if not prompt:
        raise InputError("--question is empty")
    ((trace,),) = sample_traces(model, [prompt], 1, args.max_trace, args.temperature, [marker], args.seed, tokenizer.cut_ids)
    context = [*prompt, *trace_ids(trace, marker)]
    ((answer,),) = sample_traces(model, [context], 1, args.max_answer, args.temperature, tokenizer.eos_ids, args.seed)
    print(f"trace   {tokenizer.decode(trace.ids, special=True)}" + ("" if trace.finished else " [cut: the marker was forced]"))
    print(f"answer  {tokenizer.decode(answer.ids)}")
    if args.gold:
        gold = tokenizer.encode_answer(args.gold)
        with torch.no_grad():
            scores = score(model, prompt, [trace], gold, marker)
        print(f"gold    {colour_by_gain(tokenizer, gold, scores.answer_logp[0], scores.null_logp)}")
        think, null = float(scores.answer_logp.sum()), float(scores.null_logp.sum())
        print(f"        log-prob {think:.2f} after thinking, {null:.2f} without: gain {think - null:+.2f} nats")


def colour_by_gain(tokenizer: Tokenizer, gold: list[int], logp: Tensor, null_logp: Tensor) -> str:
    """The gold tokens, green where thinking raised their log-prob and red where it lowered it; plain numbers where colours do not show."""
    shown = []
    for token, gain in zip(gold, (logp - null_logp).tolist(), strict=True):
        text = tokenizer.decode([token], special=True)
        if sys.stdout.isatty():
            strength = min(4, int(abs(gain) + 0.5))  # full colour from 3.5 nats
            ground = (16 + 36 * strength, 16 + 6 * strength)[gain > 0]  # a step of the terminal's red or green scale
            shown.append(f"\x1b[48;5;{ground}m{text}\x1b[0m" if strength else text)
        else:
            shown.append(f"{text} ({gain:+.1f})")
    return " ".join(shown)


if __name__ == "__main__":
    exit_on_bad_input(main)()
