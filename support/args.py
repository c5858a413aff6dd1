"""The flags of train.py, and the checks of what cannot work.

The defaults suit the task in examples/hops on a CPU; the paper's values are in parentheses.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from aggregate import AGGREGATORS, declares, find_aggregator, sees_text
from model import KEEP, Transformer
from support.distributed import world_size
from support.errors import InputError, OneLineParser, read_json
from support.tokenizer import Tokenizer
from support.weights import check_device, load_model


def arg(default: object, reason: str, choices: Sequence[str] | None = None) -> object:
    return field(default=default, metadata={"help": reason, "choices": choices})


# The first flag of each section of --help.
SECTIONS = {
    "model": "model and data",
    "steps": "method",
    "lr": "optimisation",
    "dtype": "memory and device",
    "out": "run",
}


@dataclass
class Args:
    """Every flag of train.py."""

    # model and data
    model: str = arg("examples/hops/base", "Hugging Face directory to start from")
    data: str = arg("examples/hops/train.jsonl", "question-answer pairs, JSONL")
    eval_data: str = arg(
        "examples/hops/test.jsonl",
        "held-out pairs; '' = no evaluation (also when only --data is given)",
    )
    marker: str | None = arg(
        None,
        "token between trace and answer; default: the model directory's, else <|response_start|>",
    )
    prompt_format: str | None = arg(
        None,
        "prompt with {question} in it, \\n = newline, or chat: through the model directory's chat "
        "template; default: the format in the directory's nrt.json, else Tulu's",
    )
    max_prompt: int = arg(4096, "tokens; longer prompts are skipped and counted")
    max_answer: int = arg(
        2047, "tokens; longer answers are skipped and counted (paper: trace + answer <= 4096)"
    )

    # method
    steps: int = arg(30, "batches of questions; the embedded task takes about 10 (paper: 810)")
    questions: int = arg(16, "questions per step (paper: 256)")
    traces: int = arg(
        8,
        "K, traces per question, as in the paper; 0 = plain SFT: the answer's cross-entropy "
        "after the empty trace",
    )
    aggregator: str = arg(
        "weighted_sum_log_prob",
        f"f, the reward of a trace: {', '.join(AGGREGATORS)}, or FILE.py:FUNCTION; "
        "the default is the paper's best",
    )
    answer_weight: str = arg(
        "fixed",
        "omega: fixed = 1, the paper's main runs; exact = df/dlog c, the gradient of J; "
        "none = 0, the answer is not trained",
        ["fixed", "exact", "none"],
    )
    null: str = arg(
        "policy",
        "parameters of the null think behind null_logp: the current or the initial ones",
        ["policy", "frozen"],
    )
    null_loss: float = arg(
        0.0, "weight of a cross-entropy on the null think; > 0 keeps null_logp from drifting"
    )
    clip_null: bool = arg(False, "reward = max(f - f of the null think, 0)")
    center: str = arg(
        "mean",
        "baseline of the advantage: group mean, leave-one-out mean, none",
        ["mean", "loo", "none"],
    )
    scale: str = arg(
        "std",
        "divide advantages by the group's std (GRPO), or not (an unbiased gradient)",
        ["std", "none"],
    )
    marker_weight: float = arg(
        0.3, "lambda, weight of the cross-entropy on a forced marker, as in the paper"
    )
    max_trace: int = arg(48, "tokens of a trace before the marker is forced (paper: 2048)")
    temperature: float = arg(
        1.0, "of the distribution that traces are sampled from, and scored under"
    )
    updates: int = arg(
        1,
        "optimizer updates per step, each on its share of the questions (paper: 4); "
        "above 1 the importance ratio is truncated",
    )

    # optimisation
    lr: float = arg(2e-4, "peak learning rate, for a 0.8M model (paper: 2e-6 for 3B to 8B)")
    warmup: float = arg(0.1, "share of the steps in which the learning rate rises to its peak")
    weight_decay: float = arg(0.01, "AdamW, the paper's value; so are the next three")
    beta2: float = arg(0.95, "AdamW; beta1 is 0.9")
    eps: float = arg(
        1e-15, "AdamW; gradients divided by 512 are small, the usual 1e-8 would damp them"
    )
    grad_clip: float = arg(1.0, "largest gradient norm of an update")
    seed: int = arg(0, "of every random stream; same seed, same run")

    # memory and device
    dtype: str = arg(
        "float32",
        "of the computation; parameters, gradients and optimizer stay fp32",
        ["float32", "bfloat16"],
    )
    device: str = arg(
        "auto",
        "auto = cuda if there is one, else cpu; CUDA_VISIBLE_DEVICES=1 takes the second GPU",
        ["auto", "cpu", "cuda"],
    )
    micro_traces: int = arg(
        0, "traces per backward, 0 = all; fewer = less memory, one more forward, same gradient"
    )
    activation_checkpointing: str = arg(
        "none",
        "recompute in the backward pass: nothing, all but matrix products, or everything",
        list(KEEP),
    )
    decode_rows: int = arg(
        0,
        "traces sampled at a time, 0 = as many as 0.85 of a GPU's free memory holds (half of a "
        "CPU's); no trace depends on it",
    )

    timeout: float = arg(600.0, "seconds that ranks wait for each other before they give up")

    # run
    out: str = arg(
        "runs/hops",
        "folder of this run: args.json, log.jsonl, samples.jsonl, checkpoint-*/, final/",
    )
    resume: bool = arg(
        False, "continue from the newest checkpoint in --out, bit-identically on a CPU, if any"
    )
    overwrite: bool = arg(False, "replace the run in --out")
    eval_every: int = arg(
        5, "steps between evaluations; also before the first and after the last step"
    )
    eval_questions: int = arg(100, "held-out questions, from the top of the file")
    save_every: int = arg(10, "steps between checkpoints; also after the last step")
    keep: int = arg(2, "checkpoints kept")

    def __post_init__(self) -> None:
        if self.data != Args.data and self.eval_data == Args.eval_data:
            self.eval_data = ""  # the embedded test set says nothing about other data
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.prompt_format:
            self.prompt_format = self.prompt_format.replace("\\n", "\n")


def parse_args(argv: Sequence[str], doc: str) -> Args:
    """Args from the command line. doc: the command's docstring, for --help."""
    formatter = argparse.RawDescriptionHelpFormatter
    summary, command, examples = doc.partition("\n    python ")
    parser = OneLineParser(
        description=summary.split("\n")[0], epilog=command + examples, formatter_class=formatter
    )
    for f in fields(Args):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        flag = flag_of(f.name)
        text = f.metadata["help"]
        if f.type is bool:
            section.add_argument(flag, action="store_true", help=text)
            continue
        text += "" if f.default is None else f" (default: {f.default})"
        section.add_argument(
            flag,
            type=f.type if isinstance(f.type, type) else str,
            default=f.default,
            choices=f.metadata["choices"],
            help=text.replace("%", "%%"),
        )
    args = Args(**vars(parser.parse_args(argv)))
    saved = saved_args(args.out) if args.resume else None
    if saved:  # the flags that are not given are the run's, not today's defaults
        kept = vars(saved) | {"resume": True, "overwrite": False}
        if saved.aggregator not in AGGREGATORS:
            kept.pop("aggregator")  # a file of code: only the command line can ask to run it
        parser.set_defaults(**kept)
        args = Args(**vars(parser.parse_args(argv)))
    check_args(args)
    return args


def hops_defaults(args: Args) -> str:
    """A line of warning where another model meets defaults that are meant for examples/hops."""
    paper = {"lr": "2e-6", "max_trace": "2048", "questions": "256"}  # for 3B to 8B
    kept = [name for name in paper if getattr(args, name) == getattr(Args, name)]
    if args.model == Args.model or not kept:
        return ""
    ours = " ".join(f"{flag_of(name)} {getattr(args, name)}" for name in kept)
    theirs = " ".join(f"{flag_of(name)} {paper[name]}" for name in kept)
    return f"note: {ours} suits examples/hops; for 3B to 8B the paper takes {theirs}\n"


# ---- a run that goes on
# What may differ from the run's args.json when it is resumed; the rest makes it another run.
MAY_CHANGE = (
    "out resume overwrite steps lr warmup eval_data eval_every eval_questions save_every keep "
    "device timeout micro_traces activation_checkpointing decode_rows"
).split()


def saved_args(out: str | Path) -> Args | None:
    """The flags in the args.json of a run's folder; None if there is no such file.

    InputError if this program cannot have written it.
    """
    file = Path(out) / "args.json"
    values = read_json(file, {f.name: (kind_of(f), None, None) for f in fields(Args)})
    if not values:
        return None
    try:
        saved = Args(**values)
        check_args(saved, on_this_machine=False)
    except TypeError:
        raise InputError(f"{file}: not the flags of a run of this program") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return saved


def kind_of(f: object) -> type:
    return f.type if isinstance(f.type, type) else str  # str | None


def check_same_run(args: Args, saved: Args) -> None:
    """InputError for a flag that would make the run that is resumed another one."""
    for f in fields(Args):
        before, now = getattr(saved, f.name), getattr(args, f.name)
        if f.name not in MAY_CHANGE and before != now:
            raise InputError(
                f"{flag_of(f.name)} {now}: the run in {args.out} has {before}, and --resume keeps "
                "it (if the files have only moved: change its args.json)"
            )


# ---- checks
AT_LEAST = {
    0: "traces micro_traces decode_rows seed lr warmup weight_decay beta2 eps null_loss "
    "marker_weight",
    1: "steps questions updates max_trace max_prompt max_answer eval_every eval_questions "
    "save_every keep",
}
MOST = 10**12  # of any number; the step below keeps what memory would not hold
MOST_TOKENS = 10**9  # of a step's traces, which are lists in Python


def check_args(args: Args, on_this_machine: bool = True) -> None:
    """InputError naming the flag that cannot work, before anything is read or written."""
    for least, names in AT_LEAST.items():
        for name in names.split():
            value = getattr(args, name)
            require(value >= least, args, [name], f"should be at least {least}")
            require(value <= MOST, args, [name], f"should be at most {MOST}")
    step = args.questions * max(1, args.traces) * args.max_trace
    names, text = ["questions", "traces", "max_trace"], f"{step} tokens a step are too many"
    require(step <= MOST_TOKENS, args, names, text)
    require(args.out != "", args, ["out"], "a folder is needed")
    for f in fields(Args):
        choices, value = f.metadata["choices"], getattr(args, f.name)
        require("\0" not in str(value), args, [f.name], "no name has a NUL")
        require(not choices or value in choices, args, [f.name], f"should be one of {choices}")
    for name in ("temperature", "grad_clip", "timeout"):
        positive = 0 < getattr(args, name) < math.inf
        require(positive, args, [name], "should be a number above 0")
    require(args.beta2 < 1, args, ["beta2"], "should be below 1")
    require(args.warmup <= 1, args, ["warmup"], "should be at most 1")
    processes = world_size() if on_this_machine else 1
    ranks = f" on each of {processes} processes" if processes > 1 else ""
    require(
        args.questions % (args.updates * processes) == 0,
        args,
        ["questions", "updates"],
        f"the questions do not divide into equal shares, one per update{ranks}",
    )
    if args.traces == 1:
        centred = args.center != "none" and not declares(args.aggregator, "relative")
        text = "every advantage would be 0; take --traces 2 or more, or --center none"
        require(not centred, args, ["traces", "center"], text)
        text = "one reward has no std; take --scale none"
        require(args.scale == "none", args, ["traces", "scale"], text)
    if args.traces == 0:
        text = "plain SFT on the empty trace: --null, --null-loss, --clip-null mean nothing there"
        unused = args.null_loss > 0 or args.clip_null or args.null == "frozen"
        require(not unused, args, ["traces"], text)
    if args.clip_null:
        text = "the null think has no reward outside the group"
        by_itself = not declares(args.aggregator, "group") and not sees_text(args.aggregator)
        require(by_itself, args, ["clip_null", "aggregator"], text)
    text = "they contradict each other"
    require(not (args.resume and args.overwrite), args, ["resume", "overwrite"], text)
    if not on_this_machine:
        return
    check_device(args.device)
    try:
        find_aggregator(args.aggregator)
    except ValueError as error:
        raise InputError(f"--aggregator {error}") from None


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def require(condition: bool, args: Args, names: list[str], text: str) -> None:
    """InputError unless the condition holds: the flags as they were given, then the text."""
    if not condition:
        flags = [f"{flag_of(name)} {getattr(args, name)}" for name in names]
        raise InputError(" ".join(flags).replace(" True", "") + f": {text}")


# ---- the flags of sample.py, evaluate.py and preflight.py
def model_flags(description: str) -> OneLineParser:
    """A parser with the flags that say which model thinks, and how."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory, a run's final/ for instance")
    add("--max-trace", type=int, default=512, help="tokens")
    add("--max-answer", type=int, default=512, help="tokens")
    add("--temperature", type=float, default=0.0, help="0 = always the most likely token")
    add("--seed", type=int, default=0)
    add("--marker", help="default: the model directory's own")
    add("--prompt-format", help="{question} in a text, or chat; default: the model directory's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def open_model(args: argparse.Namespace, untrained: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of --model; InputError where a flag does not fit them.

    untrained: a model that was not trained here (no nrt.json) need not have the marker yet.
    """
    check_flag(args.seed >= 0, f"--seed is {args.seed}, it should be 0 or more")
    for name in ("max_trace", "max_answer"):
        value, flag = getattr(args, name), name.replace("_", "-")
        check_flag(value >= 1, f"--{flag} is {value}, max_new_tokens should be 1 or more")
    warm = 0 <= args.temperature < math.inf
    check_flag(warm, f"--temperature is {args.temperature}, it should be a number, 0 or more")
    check_device(args.device)
    prompt_format = args.prompt_format and args.prompt_format.replace("\\n", "\n")
    tokenizer = Tokenizer(args.model, args.marker, prompt_format)
    print(tokenizer.note, end="", file=sys.stderr)
    trained_marker = tokenizer.trained_marker
    if tokenizer.marker_is_new and trained_marker:
        raise InputError(
            f"--marker {tokenizer.marker!r} is not in {args.model}'s vocabulary: "
            f"this model was trained with {trained_marker!r}"
        )
    if tokenizer.marker_is_new and not untrained:
        raise InputError(
            f"{args.model}: has no marker {tokenizer.marker!r}, the token that ends a trace and "
            "starts the answer; train.py adds it to a base, evaluate.py --data scores one without"
        )
    model = load_model(args.model, getattr(torch, args.dtype), args.device)
    return model, tokenizer

def check_flag(condition: bool, text: str) -> None:
    if not condition:
        raise InputError(text)
