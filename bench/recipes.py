"""The contenders of bench/step.py: three ways to compute one training step on the same questions.

    ours          the body of train.py's loop
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

Ours prefills a prompt once and copies its KV cache; the others prefill it in each of the K rows.
The others hold fp32 logits [K, n + 1 + T, V], ours none; ours alone computes the entropy. All have
fp32 parameters, gradients and AdamW moments. In bf16 our model, which ours and dense train, is that
of train.py (support/distributed.py); the library's has a bf16 copy that samples and trains.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from aggregate import advantages, aggregate
from bench.machine import Laps, random_ids
from data import Example, Trace, stream_seed
from model import prefill
from reward import prompt_backward, prompt_leaves
from sample import sample_traces
from support import distributed
from support.args import Args
from support.distributed import gathered_view
from support.errors import TrainingError
from support.weights import file_name, load_model

MARKER = 0  # any id can be the marker: the cost does not depend on it


@dataclass
class Work:
    """The questions of one step, and train.py's settings for it."""

    examples: list[Example]
    args: Args


def make_work(flags: argparse.Namespace, vocab: int) -> Work:
    """Random token ids; the same --seed gives the same ids."""
    args = Args(model=flags.model, device=flags.device, dtype=flags.dtype, seed=flags.seed)
    args.questions = flags.questions
    args.traces = flags.traces
    args.max_trace = flags.new
    args.activation_checkpointing = flags.activation_checkpointing
    args.lr = 1e-6  # a real update that hardly changes the model
    # In nats: probabilities of a random answer are near 0, and equal rewards would be less work.
    args.aggregator = "info_gain"
    generator = torch.Generator().manual_seed(flags.seed)
    examples = []
    for index in range(flags.questions):
        prompt = random_ids(flags.prompt, vocab, generator)
        answer = random_ids(flags.answer, vocab, generator)
        examples.append(Example(index, prompt, answer, question="", gold=""))
    return Work(examples, args)


def unfinished(groups: list[list[Trace]], args: Args) -> list[list[Trace]]:
    """Replaces a last token that is the marker by chance: the rows would differ in length."""
    for traces in groups:
        for trace in traces:
            if len(trace.ids) != args.max_trace:
                expected = args.max_trace
                raise TrainingError(f"a trace has {len(trace.ids)} tokens, expected {expected}")
            if trace.ids[-1] == MARKER:
                trace.ids[-1] = MARKER + 1
    return groups


# ---- what a step trains ----
class Learner:
    """model: fp32 parameters and AdamW's moments. policy: the module that computes in --dtype.

    Both are the same object but for the library's model in bf16.
    """

    def __init__(self, model: nn.Module, policy: nn.Module, args: Args) -> None:
        self.model = model
        self.policy = policy
        self.optimizer = train.make_optimizer(model, replace(args, lr=0.0))
        for parameter in model.parameters():  # an update by 0: the moments exist from now on
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_native(args: Args) -> Learner:
    dtype = getattr(torch, args.dtype)
    distributed.start(args.device, dtype)
    model = distributed.shard(distributed.load(args.model, args.device), dtype)
    return Learner(model, model, args)


def load_transformers(args: Args) -> Learner:
    """The library's model and its copy in --dtype."""
    import transformers

    transformers.logging.set_verbosity_error()
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="sdpa")
    model = load(args.model, dtype=torch.float32).to(args.device)
    if args.dtype == "float32":
        return Learner(model, model, args)
    policy = load(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    learner = Learner(model, policy, args)
    pairs = list(zip(model.parameters(), policy.parameters(), strict=True))
    for parameter, low in pairs:
        low.register_post_accumulate_grad_hook(partial(add_in_fp32, parameter))

    @torch.no_grad()
    def copy_parameters(*_: object) -> None:
        for parameter, low in pairs:
            low.copy_(parameter)

    learner.optimizer.register_step_post_hook(copy_parameters)
    return learner


def add_in_fp32(parameter: Tensor, low: Tensor) -> None:
    """A gradient of the copy is added to that of the fp32 parameter."""
    gradient = low.grad.float()
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    low.grad = None


# ---- ours ----
def sample_ours(policy: nn.Module, work: Work) -> list[list[Trace]]:
    args = work.args
    prompts = [example.prompt for example in work.examples]
    seeds = [stream_seed(args.seed, example.index) for example in work.examples]
    with gathered_view(policy) as view:
        return sample_traces(view, prompts, args.traces, args.max_trace, 1.0, seed=seeds)


def gradient_ours(policy: nn.Module, work: Work, groups: list[list[Trace]], laps: Laps) -> None:
    args = work.args
    policy.activation_checkpointing = args.activation_checkpointing
    for example, traces in zip(work.examples, groups, strict=True):
        prompt = prefill(policy, [example.prompt])
        leaves = prompt_leaves(prompt)
        scores = train.score_group(policy, leaves, example, traces, MARKER, args)
        answer_logp = scores.answer_logp.detach()
        reward, weight = train.rewards(answer_logp, scores.null_logp.detach(), args)
        advantage = train.group_advantages(reward, weight, args)
        omega = train.answer_weights(weight, args)
        laps.lap("score")
        train.loss_terms(scores, traces, advantage, omega, args).sum().backward()
        prompt_backward(prompt, leaves)
        laps.lap("update")
    policy.activation_checkpointing = "none"  # dense computes with the same model


# ---- the usual recipe: every row has a prompt of its own ----
def repeated_prompts(work: Work) -> list[list[int]]:
    return [example.prompt for example in work.examples for _ in range(work.args.traces)]


def in_groups(traces: list[Trace], k: int) -> list[list[Trace]]:
    return [traces[i : i + k] for i in range(0, len(traces), k)]


def sample_dense(policy: nn.Module, work: Work) -> list[list[Trace]]:
    """Our sampler with one trace per prompt, so that it prefills every row."""
    args = work.args
    prompts = repeated_prompts(work)
    seeds = [stream_seed(args.seed, row) for row in range(len(prompts))]
    with gathered_view(policy) as view:
        rows = sample_traces(view, prompts, 1, args.max_trace, 1.0, seed=seeds)
    return in_groups([row[0] for row in rows], args.traces)


@torch.no_grad()
def sample_transformers(policy: nn.Module, work: Work) -> list[list[Trace]]:
    args = work.args
    prompts = torch.tensor(repeated_prompts(work), device=args.device)  # [B K, P]
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
    sampled = rows[:, prompts.shape[1] :].tolist()
    return in_groups([Trace(ids, [], finished=False) for ids in sampled], args.traces)


def logits_dense(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """tokens [K, L] -> fp32 logits of the last `count` positions, [K, count, V]."""
    return F.linear(policy(tokens)[:, -count:], policy.lm_head.weight).float()


def logits_transformers(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    return policy(tokens, use_cache=False).logits[:, -count:].float()


def row_logp(logits: Callable, policy: nn.Module, rows: list[list[int]], count: int) -> Tensor:
    """Log-probs of the last `count` tokens of K equally long rows, [K, count]."""
    tokens = torch.tensor(rows, device=policy.lm_head.weight.device)
    logp = logits(policy, tokens[:, :-1], count).log_softmax(-1)
    return logp.gather(-1, tokens[:, -count:, None])[..., 0]


def gradient_repeated(
    logits: Callable, policy: nn.Module, work: Work, groups: list[list[Trace]], laps: Laps
) -> None:
    """The three passes, and train.py's loss written out for traces that were all cut:

    -1/(512 B K) sum_k [ A_k sum_t log pi(z_kt) + lambda log pi(m) + sum_i log c_ki ]
    """
    args = work.args
    width = len(work.examples[0].answer)  # T
    count = args.max_trace + 1 + width
    rows = []
    null_rows = []
    for example, traces in zip(work.examples, groups, strict=True):
        rows.append([[*example.prompt, *trace.ids, MARKER, *example.answer] for trace in traces])
        null_rows.append([[*example.prompt, MARKER, *example.answer]] * args.traces)
    with torch.no_grad(), gathered_view(policy) as view:
        old_logp = [row_logp(logits, view, group, count) for group in rows]
        laps.lap("old_logp")
        null_logp = [row_logp(logits, view, group, width)[0] for group in null_rows]
        laps.lap("null")
    for group, old, null in zip(rows, old_logp, null_logp, strict=True):
        reward, _ = aggregate(args.aggregator, old[:, -width:], null)
        advantage = advantages(reward, args.center, args.scale)
        coefficient = torch.ones_like(old)  # [K, n + 1 + T], 1 for the answer
        coefficient[:, : args.max_trace] = advantage[:, None]
        coefficient[:, args.max_trace] = args.marker_weight
        terms = coefficient * row_logp(logits, policy, group, count)
        loss = -terms.sum() / (args.questions * args.traces * train.LENGTH_SCALE)
        loss.backward()
    laps.lap("update")


@dataclass
class Contender:
    load: Callable[[Args], Learner]  # contenders with the same loader share one learner
    sample: Callable[[nn.Module, Work], list[list[Trace]]]
    gradient: Callable[[nn.Module, Work, list[list[Trace]], Laps], None]  # adds to .grad


gradient_dense = partial(gradient_repeated, logits_dense)
gradient_transformers = partial(gradient_repeated, logits_transformers)
CONTENDERS = {
    "ours": Contender(load_native, sample_ours, gradient_ours),
    "dense": Contender(load_native, sample_dense, gradient_dense),
    "transformers": Contender(load_transformers, sample_transformers, gradient_transformers),
}


# ---- the check that all compute the same gradient ----
def gradients(
    name: str, model: nn.Module, work: Work, groups: list[list[Trace]]
) -> dict[str, Tensor]:
    """A contender's gradient of the loss on given traces, by Hugging Face tensor names."""
    CONTENDERS[name].gradient(model, work, groups, Laps())
    found = {}
    for key, parameter in model.named_parameters():
        key = key if key.startswith("model.") else file_name(key)
        found[key] = parameter.grad.cpu()
    model.zero_grad()
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all parameters."""
    apart = sum((a[name] - b[name]).double().square().sum() for name in b)
    size = sum(tensor.double().square().sum() for tensor in b.values())
    return float((apart / size).sqrt())


def gradient_differences(learners: dict[str, Learner], work: Work) -> dict[str, float]:
    """Every peer's gradient beside ours: one question, the same traces, fp32 parameters."""
    one = replace(work, examples=work.examples[:1])
    native = load_model(work.args.model, device=work.args.device)  # fp32, plain
    groups = unfinished(sample_ours(native, one), one.args)
    ours = gradients("ours", native, one, groups)
    found = {}
    for name, learner in learners.items():
        if name != "ours":
            model = native if name == "dense" else learner.model
            found[name] = difference(gradients(name, model, one, groups), ours)
    return found
