"""Drawing reasoning traces from the policy, and the command that talks to a trained model.

Each prompt is read once; its keys and values are copied into rows of static memory ("slots"), which then decode together, one token a
step, whatever their lengths. A row whose trace has ended takes the next trace at once. A trace's randomness is a function of (its
question's seed, k) alone, so it does not depend on what else is in the batch. What is recorded is what was sampled: ids and their
log-probs, never text.

    python sample.py --model DIR --question "..."                  the trace and the answer
    python sample.py --model DIR --question "..." --gold "..."     ... and each gold token, coloured by how much thinking raised it
    python sample.py --model DIR --data test.jsonl                 exact match with and without thinking, gain, trace length
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Tokenizer, stream_seed
from kernels.logprob import bf16_products
from model import Config, Prefix, Transformer
from support.errors import InputError, OneLineParser, exit_on_bad_input
from support.weights import load_model

PROMPT_TOKENS = 16384  # of a batch of prompts read together, padding included
GRAPH_PLACES = (
    256  # with CUDA graphs the places that are read come in steps of this, so that few graphs do
)
CHUNK = 256  # tokens whose probabilities are summed before the running sum looks inside


@dataclass
class Trace:
    """One sampled continuation of a prompt."""

    ids: list[int]  # as sampled; the stop token that finished it comes last
    logp: list[float]  # log-prob in nats of each id under the distribution it was drawn from
    finished: bool  # ended by a stop token; False: cut, by the length limit or by a cut token
    cut_id: int | None = None  # the cut token: no longer part of ids, but sampled all the same
    cut_logp: float = 0.0


@dataclass
class Prefill:
    past: Prefix
    hidden: Tensor


def prefill(model, prompts):
    width = max(map(len, prompts))
    device = model.lm_head.weight.device
    padded = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    past = Prefix()
    hidden = model(padded, past)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    return Prefill(past, hidden[torch.arange(len(prompts), device=device), last])


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
    rows: int = 0,
    cuda_graphs: bool = False,
) -> list[list[Trace]]:
    """k traces of at most max_new_tokens for every prompt.

    temperature 0 is greedy. stop_ids end a trace and stay in it (the marker: stopping is an action); cut_ids end it and are dropped (eos
    and the like: not a decision to answer). Only sampled tokens stop a trace: an eos inside the prompt does not. seed: one for all, or
    one per prompt; the same seed gives a prompt the same traces whatever else is sampled beside it. slots: rows that decode at a time,
    0 = as many as half of the free memory holds; the traces do not depend on it. cuda_graphs: decode steps are recorded and replayed,
    which saves a GPU the wait for hundreds of launches.
    """
    if (
        k < 1
        or max_new_tokens < 1
        or temperature < 0
        or rows < 0
        or not prompts
        or not all(prompts)
    ):
        raise InputError(
            "sample_traces needs prompts of at least one token, k >= 1, max_new_tokens >= 1, temperature >= 0 and slots >= 0"
        )
    slots = count_rows = rows
    weight, traces = model.lm_head.weight, len(prompts) * k
    seeds = (
        [stream_seed(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    )
    uniforms = torch.cat([uniform(s, k, max_new_tokens) for s in seeds]).to(
        weight.device
    )  # [N, max_new], N = traces
    ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ends[[token for token in (*stop_ids, *cut_ids) if token < len(ends)]] = (
        True  # a tokenizer may know tokens the model does not
    )
    ends, logits = ends.to(weight.device), make_logits(weight)

    places = max(map(len, prompts)) + max_new_tokens
    rows = Slots(model.config, count_rows, places, traces, weight, GRAPH_PLACES if cuda_graphs else 1)
    ids = torch.zeros(
        traces, max_new_tokens + 1, dtype=torch.long, device=weight.device
    )  # the last column is for rows that have ended
    logp = torch.zeros(
        traces,
        max_new_tokens + 1,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device,
    )
    waiting = read_prompts(model, prompts, k)
    rows.refill(range(len(rows.live)), waiting)
    decode = partial(decode_step, model, rows)
    if cuda_graphs:
        decode = Recorded(decode, key=lambda: (len(rows.lead), rows.reach()))
    glance = glance_every(weight.device)
    for step in count(1):
        token, token_logp = draw(
            logits(rows.hidden),
            temperature,
            uniforms[rows.trace, rows.drawn.clamp(max=max_new_tokens - 1)],
        )
        column = torch.where(rows.live, rows.drawn, max_new_tokens)
        ids[rows.trace, column], logp[rows.trace, column] = token, token_logp.to(logp.dtype)
        rows.drawn += rows.live
        rows.live &= ~ends[token] & (rows.drawn < max_new_tokens)
        live = rows.live.tolist() if step % glance == 0 else None  # the only wait for the device
        if live and not any(live) and not rows.left:
            break
        rows.token.copy_(token)
        decode()
        rows.steps += 1
        if live and not all(live):
            rows.refill([s for s, alive in enumerate(live) if not alive], waiting)
    result = [
        cut(*row, stop_ids, cut_ids)
        for row in zip(ids[:, :-1].tolist(), logp[:, :-1].tolist(), strict=True)
    ]
    return [result[i : i + k] for i in range(0, traces, k)]


def decode_step(model: Transformer, rows: "Slots") -> None:
    """Feeds every row its token. All that changes are tensors, and they stay where they are."""
    rows.hidden.copy_(model(rows.token[:, None], rows)[:, 0])
    rows.length += rows.live  # an ended row writes over its last token


class Recorded:
    """A step as CUDA graphs, one launch instead of hundreds: a graph per key, recorded the second time the key comes up (what libraries do
    at their first call must not be recorded), replayed from then on. The step must not wait for the device, and the key must tell all
    that Python would have done differently."""

    def __init__(self, step: Callable[[], None], key: Callable[[], tuple]) -> None:
        self.step, self.key, self.pool = step, key, torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}

    def __call__(self) -> None:
        key = self.key()
        if key not in self.graphs:
            self.graphs[key] = None
            return self.step()
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):
                self.step()
        self.graphs[key].replay()


@dataclass
class Beginning:
    """Where a trace begins: its prompt has been read, as row `row` of a batch."""

    trace: int
    length: int  # of the prompt, P
    prefix: Prefix  # of the batch, [B, Hkv, >= P, D] per layer
    row: int
    hidden: Tensor  # [H], predicts the first token


def read_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], k: int
) -> Iterator[Beginning]:
    """The beginnings of k traces per prompt, in order.

    Every prompt is read once, when its first trace is due, together with those that come after it; its keys and values live until the last
    of its k traces has started.
    """
    at, device = 0, model.lm_head.weight.device
    while at < len(prompts):
        size, width = 0, 0
        while at + size < len(prompts) and (
            size == 0 or (size + 1) * max(width, len(prompts[at + size])) <= PROMPT_TOKENS
        ):
            width = max(width, len(prompts[at + size]))
            size += 1
        batch, prefix = prompts[at : at + size], Prefix()
        padded = torch.tensor(
            [[*prompt, *[0] * (width - len(prompt))] for prompt in batch], device=device
        )  # [B, P], padded on the right
        hidden = model(padded, prefix)  # [B, P, H]
        hidden = [hidden[row, len(prompt) - 1].clone() for row, prompt in enumerate(batch)]
        for row, prompt in enumerate(batch):
            for trace in range((at + row) * k, (at + row + 1) * k):
                yield Beginning(trace, len(prompt), prefix, row, hidden[row])
        at += size


def glance_every(device: torch.device) -> int:
    """Tokens between two looks at which rows have ended: each look waits for a GPU; a CPU had rather not decode what nobody wants."""
    return 16 if device.type == "cuda" else 1


def uniform(seed: int, k: int, count: int) -> Tensor:
    """The random numbers of one prompt's k traces, [k, count] in [0, 1): drawn on the CPU, so that every device samples the same."""
    return torch.rand(k, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_logits(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """weight [V, H] -> the function hidden [S, H] -> logits [S, V] in fp32 (fp64 for an fp64 model), never rounded to 16 bits."""
    if weight.element_size() > 2:
        return lambda hidden: F.linear(hidden, weight)
    if weight.is_cuda:
        return lambda hidden: torch.mm(hidden, weight.T, out_dtype=torch.float32)
    wide = weight.float()  # once, not at every token

    def logits(hidden: Tensor) -> Tensor:
        with bf16_products(weight.dtype):
            return F.linear(hidden.float(), wide)

    return logits


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: logits [S, V], uniform [S] in [0, 1) -> token [S], logp [S].

    Inverse-CDF sampling in two stages, which token's chunk and which token of it: one random number per token, one exp per logit. The
    running sums are fp64: in fp32 they would lose every token less likely than 1e-7.
    """
    scaled = logits if temperature in (0, 1) else logits / temperature
    peak = scaled.amax(dim=1, keepdim=True)  # [S, 1]
    mass = F.pad((scaled - peak).exp_(), (0, -scaled.shape[1] % CHUNK)).unflatten(
        1, (-1, CHUNK)
    )  # [S, C, CHUNK]
    by_chunk = mass.sum(dim=2, dtype=torch.float64)  # [S, C]
    upto = by_chunk.cumsum(dim=1)
    total = upto[:, -1:]
    if temperature == 0:
        token = scaled.argmax(dim=1, keepdim=True)
    else:
        target = uniform[:, None] * total
        chunk = torch.searchsorted(upto, target, right=True).clamp(
            max=upto.shape[1] - 1
        )  # clamp: NaN logits stay in range
        inside = (
            mass.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK))[:, 0].double().cumsum(dim=1)
        )  # [S, CHUNK]
        rest = target - (upto - by_chunk).gather(1, chunk)
        rest = rest.clamp(min=0).minimum(
            inside[:, -1:] * (1 - 2**-52)
        )  # by rounding it could lie beyond the chunk's last possible token
        token = chunk * CHUNK + torch.searchsorted(inside, rest, right=True)
        token = token.clamp(max=logits.shape[1] - 1)
    logp = (scaled.gather(1, token) - peak).double() - total.log()
    return token[:, 0], logp[:, 0].to(logits.dtype)


def cut(
    ids: list[int], logp: list[float], stop_ids: Sequence[int], cut_ids: Sequence[int]
) -> Trace:
    """The trace within what a row has decoded: up to its first stop token (kept) or cut token (dropped)."""
    for at, token in enumerate(ids):
        if token in stop_ids:
            return Trace(ids[: at + 1], logp[: at + 1], finished=True)
        if token in cut_ids:
            return Trace(ids[:at], logp[:at], finished=False, cut_id=token, cut_logp=logp[at])
    return Trace(ids, logp, finished=False)


class Slots:
    """S rows that decode together in static memory, [S, Hkv, capacity, D] keys and values per layer; each holds a trace in the making.

    All that changes from token to token is a tensor on the model's device, so nothing waits for it. A row whose trace has ended takes the
    next one; once there are none, and half of the rows idle, the others close ranks.
    """

    def __init__(
        self,
        config: Config,
        count: int,
        capacity: int,
        traces: int,
        like: Tensor,
        multiple: int = 1,
    ) -> None:
        """count 0: as many as half of the free memory holds. multiple: of places that are read at a time."""
        shape = (
            config.num_hidden_layers,
            2,
            1,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        count = min(
            traces,
            count
            or max(1, free_memory(like.device) // 2 // (math.prod(shape) * like.element_size())),
        )
        self.kv = like.new_zeros(
            (*shape[:2], count, *shape[3:])
        )  # zeros: what is masked is still multiplied by 0, which NaN is not
        self.hidden = like.new_zeros(count, config.hidden_size)  # [S, H], predicts the next token
        self.token = torch.zeros(
            count, dtype=torch.long, device=like.device
        )  # [S] the token drawn last
        self.trace = torch.zeros_like(self.token)  # [S] whom the row works for
        self.drawn = torch.zeros_like(self.trace)  # [S] tokens drawn
        self.length = torch.zeros_like(self.trace)  # [S] tokens held, the prompt's included
        self.live = torch.zeros(
            count, dtype=torch.bool, device=like.device
        )  # [S] the trace has not ended
        self.left = traces  # that have not begun
        self.multiple = multiple
        self.steps, self.lead = (
            0,
            [0] * count,
        )  # a row holds steps + lead tokens, or less if it has ended: known without asking the device

    def refill(self, free: Sequence[int], waiting: Iterator[Beginning]) -> None:
        """Begins the next traces in the rows that are free. A row overwrites its prompt's padding as it grows, and never sees it before."""
        begun = list(zip(free, waiting, strict=False))
        self.left -= len(begun)
        for _, group in groupby(begun, key=lambda pair: id(pair[1].prefix)):
            slots, begins = zip(*group, strict=True)
            slot, row, trace, length = torch.tensor(
                [
                    slots,
                    *zip(
                        *((begin.row, begin.trace, begin.length) for begin in begins), strict=True
                    ),
                ],
                device=self.trace.device,
            )
            for (keys, values), (k, v) in zip(self.kv, begins[0].prefix.kv, strict=True):
                keys[slot, :, : k.shape[2]], values[slot, :, : v.shape[2]] = k[row], v[row]
            self.hidden[slot] = torch.stack([begin.hidden for begin in begins])
            self.trace[slot], self.length[slot], self.drawn[slot], self.live[slot] = (
                trace,
                length,
                0,
                True,
            )
        for slot, begin in begun:
            self.lead[slot] = begin.length - self.steps
        idle = set(free[len(begun) :])
        busy = [slot for slot in range(len(self.lead)) if slot not in idle]
        if busy and 2 * len(busy) <= len(self.lead):
            self.keep(busy)

    def keep(self, slots: list[int]) -> None:
        """Only these rows go on."""
        at = torch.tensor(slots, device=self.trace.device)
        self.kv = self.kv[:, :, at]
        self.hidden, self.token, self.trace, self.drawn, self.length, self.live = (
            tensor[at]
            for tensor in (self.hidden, self.token, self.trace, self.drawn, self.length, self.live)
        )
        self.lead = [self.lead[slot] for slot in slots]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token per row, k and v [S, Hkv, 1, D], at the row's own place -> all places in use, [S, Hkv, used, D]."""
        _, _, count, heads, capacity, size = self.kv.shape
        if layer == 0:  # the same places in every layer, in memory seen as [S Hkv capacity, D]
            self.places = torch.arange(
                count * heads, device=k.device
            ) * capacity + self.length.repeat_interleave(heads)
        keys, values = self.kv[layer]
        keys.view(-1, size).index_copy_(0, self.places, k.reshape(-1, size))
        values.view(-1, size).index_copy_(0, self.places, v.reshape(-1, size))
        return keys[:, :, : self.reach()], values[:, :, : self.reach()]

    def reach(self) -> int:
        """Places in use: those of the longest row and its next token, rounded up to a multiple."""
        return min(
            self.kv.shape[-2],
            -(-(self.steps + max(self.lead) + 1) // self.multiple) * self.multiple,
        )


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not Linux
        return 8 * 10**9


def trace_ids(trace: Trace, marker: int) -> list[int]:
    """The trace as context for the answer: its ids, with the marker forced where the model did not emit it."""
    return trace.ids if trace.finished else [*trace.ids, marker]


# ---- the command
def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="Hugging Face directory, a run's final/ for instance"
    )
    parser.add_argument("--question", required=True, help="the question to answer")
    parser.add_argument("--max-trace", type=int, default=512, help="tokens")
    parser.add_argument("--max-answer", type=int, default=512, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marker", help="default: the model directory's own")
    parser.add_argument("--prompt-format", help="default: the model directory's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, it should be 0 or more")
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    if tokenizer.marker_is_new:
        raise InputError(
            f"--marker {tokenizer.marker!r} is not in {args.model}'s vocabulary: was this model trained with another?"
        )
    model = load_model(args.model, getattr(torch, args.dtype), args.device)
    marker = tokenizer.marker_id
    prompt = tokenizer.encode_prompt(
        tokenizer.prompt_format.replace("{question}", args.question.strip())
    )
    if not prompt:
        raise InputError("--question is empty")
    ((trace,),) = sample_traces(
        model, [prompt], 1, args.max_trace, args.temperature, [marker], args.seed, tokenizer.cut_ids
    )
    context = [*prompt, *trace_ids(trace, marker)]
    ((answer,),) = sample_traces(
        model, [context], 1, args.max_answer, args.temperature, tokenizer.eos_ids, args.seed
    )
    print(
        f"trace   {tokenizer.decode(trace.ids, special=True)}"
        + ("" if trace.finished else " [cut: the marker was forced]")
    )
    print(f"answer  {tokenizer.decode(answer.ids)}")


if __name__ == "__main__":
    exit_on_bad_input(main)()
