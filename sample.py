"""Rollouts: K reasoning traces for every question, sampled from the policy with a KV cache.

A trace is drawn token by token, z_t ~ pi(. | prompt, z_<t), until the model emits the marker (its
decision to answer) or another special token, or until max_new_tokens are drawn.

    prefill   the model reads each prompt once, several in one forward pass
    admit     idle rows of the decoding batch begin a trace, on a copy of their prompt's KV cache
    draw      every row draws a token                                              } a decode step
    feed      the model reads it, one forward pass of one token per row            }
    finish    ended traces are taken out of their rows, which can admit the next ones
    compact   once half of the rows stay idle, the batch shrinks to the others

How it differs from the usual generate():
1. Rows of different length decode together; they begin and end independently of each other.
2. A trace's random numbers are a function of its question's seed and its index among the K, so its
    tokens do not depend on what else is in the batch (but for rounding: sums of another number of
    rows may have another order).
3. What was sampled is what is recorded: token ids and their log-probs, never text.

    python sample.py --model DIR --question "..."        prints a trace and the answer after it
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from data import Example, Trace, stream_seed
from kernels.logprob import head_logits
from model import Config, Transformer, flash_takes, prefill
from support.args import Args, model_flags, open_model
from support.distributed import Progress
from support.errors import exit_on_bad_input, printable, refusing, require
from support.tokenizer import Tokenizer

# Most tokens of one prefill, padding included: bounds its memory. A longer prompt goes alone.
PROMPT_TOKENS = 8192
# Of the free memory, for the KV cache. The rest is for a prefill (3 GB at 8B) and a decode step; on
# a CPU also for other programs.
MEMORY_SHARE = {"cuda": 0.85, "cpu": 0.5}
# Decode steps from one `finish` to the next. It waits until a GPU has computed all that Python has
# issued, so it is rare there, and ended rows decode up to 15 tokens in vain.
FINISH_EVERY = {"cuda": 16, "cpu": 1}

Prompts = Sequence[Sequence[int]]  # token ids


@torch.no_grad()
def sample_traces(
    model: Transformer,
    prompts: Prompts,
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cut_ids: Sequence[int] = (),
    rows: int = 0,
) -> list[list[Trace]]:
    """k traces of at most max_new_tokens for every prompt, in the order of the prompts.

    temperature: 0 takes the most likely token and records its log-prob at temperature 1.
    stop_ids: a sampled one ends its trace and stays in it (the marker: stopping is an action).
    cut_ids: a sampled one ends its trace and is dropped (eos and other special tokens: no decision
        to answer). The prompt's own tokens end nothing.
    seed: one for all prompts, or one per prompt.
    rows: traces that decode at a time, 0 = as many as MEMORY_SHARE of the free memory holds if all
        prompts were as long as the longest. It changes speed and memory, not the traces.
    InputError (a ValueError): no prompts, an empty prompt, a number out of range.
    """
    in_range = k >= 1 and max_new_tokens >= 1 and temperature >= 0 and rows >= 0
    usable = len(prompts) > 0 and all(prompts)
    text = "prompts of at least one token, k and max_new_tokens >= 1, temperature and rows >= 0"
    require(usable and in_range, f"sample_traces needs {text}")
    if isinstance(seed, int):
        seed = [stream_seed(seed, i) for i in range(len(prompts))]
    stop, cut = frozenset(stop_ids), frozenset(cut_ids)
    weight = model.lm_head.weight  # [V, H]
    ends_trace = torch.zeros(len(weight), dtype=torch.bool)  # [V]
    # A tokenizer may know special tokens that the model does not: those are never sampled.
    ends_trace[[token for token in stop | cut if token < len(weight)]] = True
    ends_trace = ends_trace.to(weight.device)

    total = len(prompts) * k
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens  # positions of a row
    rows = min(total, rows or rows_that_fit(model.config, capacity, weight))
    batch = DecodeBatch(model.config, rows, capacity, max_new_tokens, like=weight)
    starts = trace_starts(model, prompts, k, seed, max_new_tokens)
    # Logits are fp32, as in scoring: rounding to bf16 would move the recorded log-probs, and the
    # importance ratio. A CPU has no such product of bf16: converted once, not for every token.
    head = weight
    if not weight.is_cuda:
        head = weight.to(torch.promote_types(weight.dtype, torch.float32))

    shown = Progress("sampling", total, "traces")
    traces: dict[int, Trace] = {}  # by number: those of the first prompt are 0 .. k - 1
    batch.admit(starts)
    for step in count(1):
        token = batch.draw(head, temperature, ends_trace)
        if step % FINISH_EVERY[weight.device.type] == 0:
            traces |= batch.finish(stop, cut)
            shown.update(len(traces))
            if len(traces) == total:
                break
        batch.feed(model, token)
        batch.admit(starts)
        batch.compact()
    return [[traces[number] for number in range(i, i + k)] for i in range(0, total, k)]


def rows_that_fit(config: Config, capacity: int, like: Tensor) -> int:
    """Rows of `capacity` positions whose KV cache MEMORY_SHARE of the free memory holds; 1 or more.

    like: gives dtype and device.
    """
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row_bytes = capacity * numbers * like.element_size()
    share = MEMORY_SHARE[like.device.type]
    return max(1, int(share * free_memory(like.device)) // row_bytes)


def free_memory(device: torch.device) -> int:
    """Bytes. A GPU's unused blocks go back to the driver first: one tensor may not fit in them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not Linux
        return 8 * 10**9


# ---- prefill
@dataclass
class Start:
    """What a row needs to begin a trace."""

    number: int  # of the trace
    kv: Tensor  # [layers, 2, P, Hkv, D] the KV cache of its prompt, P tokens
    hidden: Tensor  # [H] predicts its first token
    uniforms: Tensor  # [max_new_tokens] its random numbers


def trace_starts(
    model: Transformer,
    prompts: Prompts,
    k: int,
    seeds: Sequence[int],
    max_new_tokens: int,
) -> Iterator[Start]:
    """The starts of k traces per prompt, in order.

    A generator: a prompt is read when a row is idle and its first trace is next, together with the
    prompts after it. One such prefill at a time is in memory beside the decoding batch.
    """
    longest = max(len(prompt) for prompt in prompts)
    together = max(1, PROMPT_TOKENS // longest)  # prompts of a prefill
    for first in range(0, len(prompts), together):
        part = prompts[first : first + together]
        read = prefill(model, part)
        # In one tensor, [layers, 2, B, P, Hkv, D], so that a row copies its part at once.
        kv = torch.stack([tensor for layer in read.past.kv for tensor in layer])
        kv = kv.unflatten(0, (-1, 2)).transpose(3, 4)
        read.past.kv.clear()
        for index, prompt in enumerate(part):
            prompt_kv = kv[:, :, index, : len(prompt)]
            uniforms = random_numbers(seeds[first + index], k, max_new_tokens)
            for i in range(k):
                number = (first + index) * k + i
                yield Start(number, prompt_kv, read.hidden[index], uniforms[i])
        del kv, prompt_kv  # free before the next prefill is computed


def random_numbers(seed: int, k: int, count: int) -> Tensor:
    """What k traces of a prompt are drawn with, [k, count] in [0, 1).

    Always from the CPU's generator: then a seed means the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(k, count, generator=generator, dtype=torch.float64)


# ---- the decoding batch
class DecodeBatch:
    """Rows that decode together: their KV cache, and the trace that each row makes.

    The model continues it like any `past` (model.py), by `append` and `length`. The cache has its
    final size from the start, so a token is written in place and nothing is copied. What changes
    with every token is a tensor on the model's device, so `draw` and `feed` never wait for a GPU,
    and it is written in place, so that a CUDA graph of `forward` finds it.
    """

    def __init__(self, config: Config, rows: int, capacity: int, max_new: int, like: Tensor):
        """capacity: positions of a row, for prompt and trace. like: gives dtype and device."""
        layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        new = partial(torch.zeros, dtype=torch.long, device=like.device)
        # FlashAttention reads each row's own keys. The other kernels mask: they read up to the
        # longest row, and faster if a head's keys stand together in memory.
        self.flash = flash_takes(like, config, capacity)
        # Zeros, not empty: attention multiplies what it masks by 0, and 0 * NaN is NaN.
        if self.flash:
            self.kv = new(layers, 2, rows, capacity, heads, size, dtype=like.dtype)
        else:
            self.kv = new(layers, 2, rows, heads, capacity, size, dtype=like.dtype).transpose(3, 4)
        self.hidden = new(rows, config.hidden_size, dtype=like.dtype)  # predicts the next token
        self.token = new(rows)  # the one that is fed
        self.row = torch.arange(rows, device=like.device)  # 0, 1, 2, ... to index the others by row
        self.length = new(rows)  # tokens in the KV cache, the prompt's included
        self.live = new(rows, dtype=torch.bool)  # the row's trace has not ended
        # Column t belongs to token t of the trace. There is one more, as every row draws in every
        # step: one whose trace has ended uses the column after its last token, again and again.
        self.drawn = new(rows)  # tokens of the trace so far
        self.uniforms = new(rows, max_new + 1, dtype=torch.float64)
        self.ids = new(rows, max_new + 1)
        self.logp = new(rows, max_new + 1, dtype=torch.promote_types(like.dtype, torch.float32))
        # In Python, known without asking the device:
        self.number: list[int | None] = [None] * rows  # of the row's trace; None: the row is idle
        self.length_bound = [0] * rows  # `length`; too high where the trace has ended
        self.graph: torch.cuda.CUDAGraph | None = None  # of `forward`, with this number of rows

    def admit(self, starts: Iterator[Start]) -> None:
        """Every idle row begins the next trace, as long as there are any."""
        idle = [row for row, number in enumerate(self.number) if number is None]
        for row, start in zip(idle, starts, strict=False):  # no row left: no start is taken
            # What the row held before is overwritten, or lies beyond its length: never read.
            length = start.kv.shape[2]
            self.kv[:, :, row, :length] = start.kv
            self.hidden[row] = start.hidden
            self.length[row] = length
            self.live[row] = True
            self.drawn[row] = 0
            self.uniforms[row, :-1] = start.uniforms
            self.number[row] = start.number
            self.length_bound[row] = length

    def draw(self, head: Tensor, temperature: float, ends_trace: Tensor) -> Tensor:
        """Every row draws a token and records it -> token [rows]. ends_trace: [V] bool."""
        max_new = self.ids.shape[1] - 1
        uniform = self.uniforms[self.row, self.drawn]
        token, logp = draw(head_logits(self.hidden, head), temperature, uniform)
        self.ids[self.row, self.drawn] = token
        self.logp[self.row, self.drawn] = logp.to(self.logp.dtype)
        self.drawn += self.live
        self.live &= ~ends_trace[token] & (self.drawn < max_new)
        return token

    def feed(self, model: Transformer, token: Tensor) -> None:
        """The model reads token [rows]; `hidden` then predicts the tokens after it."""
        self.token.copy_(token)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.forward(model)
            if self.flash:
                self.record(model)
        self.length_bound = [bound + 1 for bound in self.length_bound]

    def forward(self, model: Transformer) -> None:
        """One forward pass over `token`. In a CUDA graph: every step uses the same memory."""
        self.hidden.copy_(model(self.token[:, None], self)[:, 0])
        self.length += self.live  # where a trace has ended, the next token overwrites this one

    def record(self, model: Transformer) -> None:
        """Records a CUDA graph of `forward`, in the time of one step; it computes nothing.

        Replayed, the hundreds of kernels of a forward pass are one launch. One by one they take
        longer to launch than to run, except in a large model with many rows.
        """
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": NCCL's thread may go on asking the GPU.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.forward(model)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a token per row, k and v [rows, Hkv, 1, D], at the row's own position.

        Returns what all rows hold, [rows, Hkv, S, D]. S is the capacity in FlashAttention: shapes
        that do not change with the step. Elsewhere S is the length of the longest row; the model
        masks what lies beyond the length of a shorter one.
        """
        keys, values = self.kv[layer]  # [rows, capacity, Hkv, D]
        keys[self.row, self.length] = k[:, :, 0]
        values[self.row, self.length] = v[:, :, 0]
        if not self.flash:
            used = max(self.length_bound) + 1
            keys, values = keys[:, :used], values[:, :used]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def finish(self, stop: frozenset[int], cut: frozenset[int]) -> dict[int, Trace]:
        """Takes ended traces out of their rows, which are idle then -> traces by number.

        Waits for the device.
        """
        ended = {}
        for row, live in enumerate(self.live.tolist()):
            number = self.number[row]
            if number is not None and not live:
                ids, logp = self.ids[row, :-1].tolist(), self.logp[row, :-1].tolist()
                ended[number] = cut_trace(ids, logp, stop, cut)
                self.number[row] = None
        return ended

    def compact(self) -> None:
        """If half of the rows or more are idle, the batch shrinks to the others."""
        busy = [row for row, number in enumerate(self.number) if number is not None]
        if 2 * len(busy) > len(self.number):
            return
        self.number = [self.number[row] for row in busy]
        self.length_bound = [self.length_bound[row] for row in busy]
        self.graph = None
        keep = torch.tensor(busy, device=self.row.device)
        self.row = self.row[: len(busy)]
        for kv in self.kv:  # in place, and layer by layer: a copy of all might not fit in memory
            kv[:, : len(busy)] = kv[:, keep]
        self.kv = self.kv[:, :, : len(busy)]
        for name in ("hidden", "token", "length", "live", "drawn", "uniforms", "ids", "logp"):
            setattr(self, name, getattr(self, name)[keep])


def cut_trace(ids: list[int], logp: list[float], stop: frozenset, cut: frozenset) -> Trace:
    """A row's record up to the token that ends the trace. Beyond it stands an earlier trace's."""
    for t, token in enumerate(ids):
        if token in stop:
            return Trace(ids[: t + 1], logp[: t + 1], finished=True)
        if token in cut:
            return Trace(ids[:t], logp[:t], finished=False, cut_id=token, cut_logp=logp[t])
    return Trace(ids, logp, finished=False)


# ---- one token
def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the token whose interval of the cumulative probabilities holds uniform.

    logits [rows, V], uniform [rows] in [0, 1) -> token [rows], logp [rows] in nats

    Sums are fp64: in fp32, tokens less likely than 1e-7 would have no interval.
    """
    scaled = logits if temperature in (0, 1) else logits / temperature
    peak = scaled.amax(dim=1, keepdim=True)  # [rows, 1]
    mass = (scaled - peak).exp_()  # [rows, V] probability / the likeliest token's
    ends = mass.cumsum(dim=1, dtype=torch.float64)  # [rows, V] of the intervals
    total = ends[:, -1:]  # [rows, 1]
    if temperature == 0:
        token = scaled.argmax(dim=1, keepdim=True)  # [rows, 1]
    else:
        # right: the first end beyond the target, so a token of probability 0 is never taken.
        token = torch.searchsorted(ends, uniform[:, None] * total, right=True)
        token = token.clamp(max=logits.shape[1] - 1)  # NaN logits: keeps the index in range
    logp = (scaled.gather(1, token) - peak).double() - total.log()
    return token[:, 0], logp[:, 0].to(logits.dtype)


# ---- traces of questions
def sample_groups(
    model: Transformer, tokenizer: Tokenizer, questions: list[Example], step: int, args: Args
) -> list[list[Trace]]:
    """K traces per question, as training samples them in this step.

    Plain SFT (K = 0) has one: the empty trace with a forced marker.
    """
    if args.traces == 0:
        return [[Trace([], [], finished=False)] for _ in questions]
    prompts = [question.prompt for question in questions]
    seeds = [stream_seed(args.seed, step, question.index) for question in questions]
    how = {"temperature": args.temperature, "seed": seeds, "rows": args.decode_rows}
    return sample_to_marker(model, tokenizer, prompts, args.traces, args.max_trace, **how)


def sample_to_marker(
    model: Transformer, tokenizer: Tokenizer, prompts: Prompts, k: int, max_trace: int, **how
) -> list[list[Trace]]:
    """k traces per prompt: the marker ends a trace, other special tokens cut it.

    how: temperature, seed and rows, as in sample_traces.
    """
    ends = {"stop_ids": [tokenizer.marker_id], "cut_ids": tokenizer.cut_ids}
    return sample_traces(model, prompts, k, max_trace, **ends, **how)


def trace_ids(trace: Trace, marker: int) -> list[int]:
    """What stands between prompt and answer: the trace, and a forced marker if it has none."""
    return trace.ids if trace.finished else [*trace.ids, marker]


# ---- the command
def think_and_answer(
    model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, answer_len: int = 1
) -> tuple[list[int], Trace]:
    """Samples a trace for --question and the answer after it, prints both -> prompt ids, trace.

    The trace leaves `answer_len` of the model's positions to an answer.
    """
    require(args.question.strip() != "", "--question is empty")
    with refusing("--question"):
        prompt = tokenizer.prompt_ids([args.question.strip()])
    positions = model.config.max_position_embeddings
    left = positions - len(prompt) - 1 - answer_len  # 1 for the marker
    require(left > 0, f"--question: its prompt of {len(prompt)} tokens fills the model's positions")
    how = {"temperature": args.temperature, "seed": args.seed}
    limit = min(args.max_trace, left)
    [[trace]] = sample_to_marker(model, tokenizer, [prompt], 1, limit, **how)
    context = [*prompt, *trace_ids(trace, tokenizer.marker_id)]
    limit = min(args.max_answer, positions - len(context))
    [[answer]] = sample_traces(model, [context], 1, limit, stop_ids=tokenizer.eos_ids, **how)
    forced = "" if trace.finished else " [cut: the marker was forced]"
    print(printable(f"trace   {tokenizer.decode(trace.ids, special=True)}{forced}"))
    print(printable(f"answer  {tokenizer.decode(answer.ids)}"))
    return prompt, trace


def main() -> None:
    parser = model_flags(__doc__, question=True)
    parser.add_argument("--question", required=True, help="the question to answer")
    args = parser.parse_args()
    require(args.temperature or not args.seed, "--seed has no effect on greedy decoding")
    think_and_answer(*open_model(args), args)


if __name__ == "__main__":
    exit_on_bad_input(main)()
