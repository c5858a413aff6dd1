"""Cost of one training step: ours beside the usual recipe, which repeats the prompt K times.

    python bench/step.py --model DIR                        ours and dense
    python bench/step.py --model DIR --peer transformers    ours and the transformers library
    --json: one JSON object as the last line; --save: bench/results/step-<device>-<date>-...json

    ours          train.train_question, on traces of sample.sample_traces
    dense         the usual recipe, with our model: it repeats the prompt for every trace
    transformers  the usual recipe, with that library's model, attention and generate()

B questions of P prompt tokens and T answer tokens, K traces of n tokens each, all random. Nothing
stops a trace, so every marker is forced. Tokens fed to the model per question after sampling, in
brackets for K = 8, P = 96, n = 64, T = 48:

    ours      score, with its graph: P + K (n + T) + T   [1040]   null think included
              update: the backward of that forward
    others    old log-prob, no graph: K (P + n + T)      [1664]
              null, no graph: K (P + T)                  [1152]   K equal rows
              update, with its graph: K (P + n + T)      [1664]   the K rows of one question at once

The others prefill a prompt in each of its K rows and hold fp32 logits [K, n + 1 + T, V]; ours alone
computes the entropy. All have fp32 parameters, gradients and AdamW moments. In bf16 the library's
model has a bf16 copy that samples and trains.

Each has a process of its own, one after the other. Figures are medians over the rounds:

    sample_s, score_update_s, total_s    seconds of a step and of its two parts
    tokens_per_s     trace tokens per second of the step
    peak_mb          the most memory in use so far: of the GPU; on a CPU resident memory, in which
                     Python and its libraries are included
    gradient_norm    of one question's loss on given traces, before training: equal up to rounding,
                     as all compute the same gradient (tests/test_bench.py compares all of it)
"""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aggregate import advantages, aggregate
from bench import machine
from data import Example, Trace
from sample import sample_traces
from support import distributed
from support.args import Args
from support.distributed import gather_once, gathered_view
from support.errors import exit_on_bad_input, require
from support.metrics import now, peak_memory
from support.weights import load_model, read_config
from train import LENGTH_SCALE, make_optimizer, train_question, update

MARKER = 0  # any id can be the marker: the cost does not depend on it
SETTINGS = ("dtype", "questions", "traces", "prompt", "new", "answer", "seed")
FIGURES = ["sample_s", "score_update_s", "total_s", "tokens_per_s", "peak_mb", "gradient_norm"]
RATIOS = ["sample_s", "score_update_s", "total_s", "peak_mb"]
Groups = list[list[Trace]]  # K traces per question


# ---- the work
def make_work(flags: argparse.Namespace) -> tuple[list[Example], list[Trace], Args]:
    """Random questions, K random traces for the first one, train.py's settings."""
    args = Args(model=flags.model, device=flags.device, dtype=flags.dtype, seed=flags.seed)
    args.questions = flags.questions
    args.traces = flags.traces
    args.max_trace = flags.new
    args.lr = 1e-6  # a real update that hardly changes the model
    # In nats: probabilities of a random answer are near 0, and equal rewards would be less work.
    args.aggregator = "info_gain"
    generator = torch.Generator().manual_seed(flags.seed)
    vocab = read_config(flags.model).vocab_size
    new = partial(machine.random_ids, vocab=vocab, generator=generator)
    examples = [
        Example(index, new(flags.prompt), new(flags.answer), question="", gold="")
        for index in range(flags.questions)
    ]
    traces = [Trace(new(flags.new), [], finished=False) for _ in range(flags.traces)]
    return examples, traces, args


def measure(name: str, flags: argparse.Namespace) -> dict:
    """The figures of one recipe, for a process that has done nothing else before."""
    examples, traces, args = make_work(flags)
    recipe = RECIPES[name]
    model, policy = recipe.load(args)
    optimizer = make_optimizer(model, args)
    recipe.gradient(policy, examples[:1], [traces], args)
    gradient_norm = update(model, optimizer, 0.0, args.grad_clip)  # lr 0: no parameter changes

    rows = []
    for _ in range(flags.rounds + 1):
        began = now()
        groups = recipe.sample(policy, examples, args)
        sampled = now()
        recipe.gradient(policy, examples, groups, args)
        update(model, optimizer, args.lr, args.grad_clip)
        ended = now()
        seconds = {"sample_s": sampled - began, "score_update_s": ended - sampled}
        rows.append(seconds | {"total_s": ended - began})
    rows = rows[1:]  # the first one warms up
    figures = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    tokens = args.questions * args.traces * args.max_trace
    return figures | {
        "tokens_per_s": tokens / figures["total_s"],
        "peak_mb": peak_memory() / 1e6,
        "gradient_norm": gradient_norm,
        "rows": rows,
    }


# ---- ours
def load_ours(args: Args) -> tuple[nn.Module, nn.Module]:
    dtype = getattr(torch, args.dtype)
    distributed.start(args.device, dtype)
    model = distributed.shard(load_model(args.model, torch.float32, args.device), dtype)
    return model, model


def sample_ours(policy: nn.Module, examples: list[Example], args: Args) -> Groups:
    prompts = [example.prompt for example in examples]
    with gathered_view(policy) as view:
        return sample_traces(view, prompts, args.traces, args.max_trace, seed=args.seed)


def gradient_ours(policy: nn.Module, examples: list[Example], groups: Groups, args: Args) -> None:
    tokenizer = SimpleNamespace(marker_id=MARKER)
    for example, traces in zip(examples, groups, strict=True):
        gather_once(policy, last=example is examples[-1])
        train_question(policy, tokenizer, example, traces, args)


# ---- the usual recipe: every row has a prompt of its own
def repeated_prompts(examples: list[Example], args: Args) -> list[list[int]]:
    return [example.prompt for example in examples for _ in range(args.traces)]


def sample_dense(policy: nn.Module, examples: list[Example], args: Args) -> Groups:
    """Our sampler with one trace per prompt, so that it prefills every row."""
    prompts = repeated_prompts(examples, args)
    with gathered_view(policy) as view:
        rows = sample_traces(view, prompts, 1, args.max_trace, seed=args.seed)
    traces = [trace for (trace,) in rows]
    return [traces[i : i + args.traces] for i in range(0, len(traces), args.traces)]


def logits_dense(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """tokens [K, L] -> fp32 logits of the last `count` positions, [K, count, V]."""
    return F.linear(policy(tokens)[:, -count:], policy.lm_head.weight).float()


def gradient_repeated(
    policy: nn.Module,
    examples: list[Example],
    groups: Groups,
    args: Args,
    logits: Callable[[nn.Module, Tensor, int], Tensor] = logits_dense,
) -> None:
    """The three passes, and train.py's loss written out for traces that were all cut:

    -1/(512 B K) sum_k [ A_k sum_t log pi(z_kt) + lambda log pi(m) + sum_i log c_ki ]
    """
    answer_len = len(examples[0].answer)  # T
    count = args.max_trace + 1 + answer_len
    rows = []
    null_rows = []
    for example, traces in zip(examples, groups, strict=True):
        rows.append([[*example.prompt, *trace.ids, MARKER, *example.answer] for trace in traces])
        null_rows.append([[*example.prompt, MARKER, *example.answer]] * args.traces)
    with torch.no_grad(), gathered_view(policy) as view:
        old_logp = [row_logp(logits, view, group, count) for group in rows]
        null_logp = [row_logp(logits, view, group, answer_len)[0] for group in null_rows]
    for group, old, null in zip(rows, old_logp, null_logp, strict=True):
        reward, _ = aggregate(args.aggregator, old[:, -answer_len:], null)
        advantage = advantages(reward, args.center, args.scale)
        coefficient = torch.ones_like(old)  # [K, n + 1 + T], 1 for the answer
        coefficient[:, : args.max_trace] = advantage[:, None]
        coefficient[:, args.max_trace] = args.marker_weight
        terms = coefficient * row_logp(logits, policy, group, count)
        loss = -terms.sum() / (args.questions * args.traces * LENGTH_SCALE)
        loss.backward()


def row_logp(logits: Callable, policy: nn.Module, rows: list[list[int]], count: int) -> Tensor:
    """Log-probs of the last `count` tokens of K equally long rows, [K, count]."""
    tokens = torch.tensor(rows, device=policy.lm_head.weight.device)
    logp = logits(policy, tokens[:, :-1], count).log_softmax(-1)
    return logp.gather(-1, tokens[:, -count:, None])[..., 0]


# ---- the same with the transformers library
def load_transformers(args: Args) -> tuple[nn.Module, nn.Module]:
    """The library's model in fp32, and its copy in --dtype that computes."""
    import transformers

    transformers.logging.set_verbosity_error()
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="sdpa")
    model = load(args.model, dtype=torch.float32).to(args.device)
    if args.dtype == "float32":
        return model, model
    policy = load(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pairs = list(zip(model.parameters(), policy.parameters(), strict=True))
    for parameter, low in pairs:
        low.register_post_accumulate_grad_hook(partial(add_in_fp32, parameter))

    @torch.no_grad()
    def copy_parameters(*_: object) -> None:
        for parameter, low in pairs:
            low.copy_(parameter)

    register_optimizer_step_post_hook(copy_parameters)
    return model, policy


def add_in_fp32(parameter: Tensor, low: Tensor) -> None:
    """A gradient of the copy is added to that of the fp32 parameter."""
    gradient = low.grad.float()
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    low.grad = None


@torch.no_grad()
def sample_transformers(policy: nn.Module, examples: list[Example], args: Args) -> Groups:
    prompts = torch.tensor(repeated_prompts(examples, args), device=args.device)  # [B K, P]
    torch.manual_seed(args.seed)
    rows = policy.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=args.max_trace,
        max_new_tokens=args.max_trace,
        pad_token_id=0,
    )
    traces = [Trace(ids, [], finished=False) for ids in rows[:, prompts.shape[1] :].tolist()]
    return [traces[i : i + args.traces] for i in range(0, len(traces), args.traces)]


def logits_transformers(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    return policy(tokens, use_cache=False).logits[:, -count:].float()


@dataclass
class Recipe:
    load: Callable[[Args], tuple[nn.Module, nn.Module]]  # what AdamW updates, what computes
    sample: Callable[[nn.Module, list[Example], Args], Groups]
    gradient: Callable[[nn.Module, list[Example], Groups, Args], None]  # adds to .grad


gradient_transformers = partial(gradient_repeated, logits=logits_transformers)
RECIPES = {
    "ours": Recipe(load_ours, sample_ours, gradient_ours),
    "dense": Recipe(load_ours, sample_dense, gradient_repeated),
    "transformers": Recipe(load_transformers, sample_transformers, gradient_transformers),
}


# ---- the command
def parse(argv: list[str]) -> argparse.Namespace:
    parser = machine.make_parser(__doc__)
    add = parser.add_argument
    add("--questions", type=machine.count, default=4, help="B, questions a step (4)")
    add("--traces", type=machine.count, default=8, help="K, traces a question, 2 or more (8)")
    add("--prompt", type=machine.count, default=96, help="P, tokens of a prompt (96)")
    add("--new", type=machine.count, default=64, help="n, tokens of a trace (64)")
    add("--answer", type=machine.count, default=48, help="T, tokens of an answer (48)")
    add("--seed", type=int, default=0, help="of the random tokens")
    peers = ["dense", "transformers"]
    add("--peer", nargs="+", choices=peers, default=["dense"], help="beside ours (dense)")
    flags = parser.parse_args(argv)
    require(flags.traces > 1, "--traces 1: an advantage compares at least two")
    missing = "transformers" in flags.peer and not find_spec("transformers")
    require(not missing, "--peer transformers: it is not installed here; dense needs no library")
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    read_config(flags.model)  # refuses a wrong directory before a process starts
    result = machine.circumstances(flags.device, *flags.peer)
    result["model"] = Path(flags.model).resolve().name  # no path of the machine
    result |= {key: getattr(flags, key) for key in SETTINGS}
    spawn = multiprocessing.get_context("spawn")
    figures = {}
    for name in dict.fromkeys(["ours", *flags.peer]):
        print(name, file=sys.stderr, flush=True)
        try:
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
                figures[name] = process.submit(measure, name, flags).result()
        except RuntimeError as error:  # out of memory: the others go on
            figures[name] = {"note": " ".join(str(error).split())[:100]}

    rows = [{"": name} | row for name, row in figures.items()]
    ours = figures.pop("ours")
    ratios = {}
    for name, row in figures.items():
        if "note" not in ours | row:
            ratios[name] = {key: row[key] / ours[key] for key in RATIOS}
            rows.append({"": f"{name} / ours"} | ratios[name])
    result |= ours | figures | {"ratios": ratios}  # ours stands at the top level
    lengths = f"prompt {flags.prompt}, trace {flags.new}, answer {flags.answer}"
    shape = f"{flags.questions} questions x {flags.traces}, {lengths}"
    lines = [f"{result['model']}, {flags.dtype}: {shape}", *machine.table(["", *FIGURES], rows)]
    machine.conclude(flags, "step", result, lines, result["model"], f"prompt-{flags.prompt}")


if __name__ == "__main__":
    exit_on_bad_input(main)()
