"""The flags of the commands, each with its reason, and the checks of what cannot work.

The defaults suit the task in examples/hops on a CPU; the paper's values are in parentheses.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import torch

from aggregate import AGGREGATORS, aggregate, declares, sees_text
from model import Transformer
from support.distributed import world_size
from support.errors import InputError, OneLineParser, read_json, refusing, require
from support.tokenizer import Tokenizer
from support.weights import load_with_marker


def arg(default: object, reason: str, choices: Sequence[str] = (), least: float = 0) -> object:
    """A field of Args. least: of a number."""
    return field(default=default, metadata={"help": reason, "choices": choices, "least": least})


HELD_OUT = "examples/hops/test.jsonl"
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
    eval_data: str | None = arg(
        None,
        "held-out pairs; '' = no evaluation; default: of examples/hops with its --data, else ''",
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
    max_prompt: int = arg(4096, "tokens; longer prompts are skipped and counted", least=1)
    max_answer: int = arg(
        2047, "tokens; longer answers are skipped too (paper: trace + answer <= 4096)", least=1
    )

    # method
    steps: int = arg(30, "batches of questions; the embedded task takes 10 (paper: 810)", least=1)
    questions: int = arg(16, "questions per step (paper: 256)", least=1)
    traces: int = arg(
        8, "K, traces per question, the paper's; 0 = plain SFT, the answer after the empty trace"
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
        "policy", "parameters of the null think: current or initial ones", ["policy", "frozen"]
    )
    clip_null: bool = arg(False, "reward = max(f - f of the null think, 0)")
    center: str = arg("mean", "baseline of the advantage: group mean or none", ["mean", "none"])
    scale: str = arg(
        "std",
        "divide advantages by the group's std (GRPO), by its mean (MaxRL), or not (unbiased)",
        ["std", "mean", "none"],
    )
    filter_std: float = arg(
        0.0,
        "a group whose reward std lies below this times a moving average of earlier steps' gets "
        "advantage 0; its answer is trained (RLPR: 0.5)",
    )
    answers_first: int = arg(0, "first steps, in which the answer is trained but no trace")
    marker_weight: float = arg(
        0.3, "lambda, weight of a forced marker's cross-entropy; the paper's"
    )
    max_trace: int = arg(48, "tokens of a trace before the marker is forced (paper: 2048)", least=1)
    temperature: float = arg(1.0, "traces are sampled and scored at it; answers at 1", least=1e-6)
    updates: int = arg(
        1,
        "optimizer updates per step, each on its share of the questions (paper: 4); "
        "above 1 the importance ratio is truncated",
        least=1,
    )

    # optimisation
    lr: float = arg(2e-4, "peak learning rate, for a 0.8M model (paper: 2e-6 for 3B to 8B)")
    warmup: float = arg(
        0.1, "share of the steps in which the learning rate rises; more --steps do not stretch it"
    )
    weight_decay: float = arg(0.01, "of AdamW, the paper's value")
    grad_clip: float = arg(1.0, "largest gradient norm of an update", least=1e-30)
    seed: int = arg(0, "of every random stream; same seed, same run")

    # memory and device
    dtype: str = arg(
        "float32", "of computation and final/; parameters stay fp32", ["float32", "bfloat16"]
    )
    device: str = arg(
        "auto",
        "auto = cuda if there is one, else cpu; CUDA_VISIBLE_DEVICES=1 takes the second GPU",
        ["auto", "cpu", "cuda"],
    )
    micro_traces: int = arg(
        0, "traces per backward, 0 = all; fewer = less memory, one more forward, same gradient"
    )
    recompute: bool = arg(False, "keep each layer's inputs, recompute the rest in the backward")
    decode_rows: int = arg(
        0, "traces sampled at a time, 0 = as many as fit in memory; no trace depends on it"
    )

    # run
    out: str = arg("runs/hops", "folder of this run: log, samples, checkpoints, final/")
    resume: bool = arg(False, "continue from the newest checkpoint in --out, if there is one")
    overwrite: bool = arg(False, "replace the run in --out")
    eval_every: int = arg(
        5, "steps between evaluations; also before the first and after the last step", least=1
    )
    eval_questions: int = arg(100, "held-out questions, from the top of the file", least=1)
    tracker: str = arg("none", "gets the log's figures too", ["none", "wandb", "trackio"])
    save_every: int = arg(10, "steps between checkpoints; also after the last step", least=1)

    def __post_init__(self) -> None:
        for f in fields(self):  # an args.json may hold anything
            value, kind = getattr(self, f.name), int | float if f.type is float else f.type
            if not isinstance(value, kind):
                raise ValueError(f"{flag_of(f.name)} {value} should be of type {kind}")
        if self.eval_data is None:  # the embedded test set says nothing about other data
            self.eval_data = HELD_OUT if self.data == Args.data else ""
        self.warmup_steps = self.warmup * self.steps  # a resumed run keeps the number it began with
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.prompt_format:
            self.prompt_format = self.prompt_format.replace("\\n", "\n")


def parse_args(argv: Sequence[str], doc: str) -> Args:
    """Args from the command line, not checked. doc: the command's docstring, for --help."""
    summary, command, examples = doc.partition("\n    python ")
    parser = OneLineParser(description=summary.split("\n")[0], epilog=command + examples)
    for f in fields(Args):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        add_flag(section, f.name)
    args = Args(**vars(parser.parse_args(argv)))
    saved = saved_args(Path(args.out)) if args.resume else None
    if saved:  # the flags that are not given are the run's, not today's defaults
        kept = asdict(saved) | {"resume": True, "overwrite": False}
        if saved.aggregator not in AGGREGATORS:
            kept["aggregator"] = ""  # a file of code: only the command line can ask to run it
        parser.set_defaults(**kept)
        args = Args(**vars(parser.parse_args(argv)))
        text = f"--resume: the reward of {args.out} is a file of code, which runs only if"
        require(args.aggregator, f"{text} --aggregator {saved.aggregator} is given as well")
    elif args.resume:
        embedded = (args.model, args.data) == (Args.model, Args.data)
        text = f"--resume: there is no {args.out}/args.json of a run; leave it out to begin one"
        require(not embedded, text)
    return args


def add_flag(parser: argparse._ActionsContainer, name: str) -> None:
    """A field of Args as a flag."""
    f = Args.__dataclass_fields__[name]
    text = f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        parser.add_argument(flag_of(f.name), action="store_true", help=text)
        return
    text += "" if f.default is None else f" (default: {f.default})"
    kind = f.type if f.type in (int, float) else str
    choices = f.metadata["choices"] or None
    parser.add_argument(flag_of(name), type=kind, default=f.default, choices=choices, help=text)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def hops_defaults(args: Args) -> str:
    """A line of warning where another model meets a default that is meant for examples/hops."""
    if args.model == Args.model or args.lr != Args.lr:
        return ""
    return f"note: --lr {args.lr} suits examples/hops; for 3B to 8B the paper takes 2e-6\n"


# ---- checks
def check_args(args: Args) -> None:
    """InputError naming the flag that cannot work, before anything is read or written."""

    def check(condition: bool, names: str, text: str) -> None:
        flags = [f"{flag_of(name)} {getattr(args, name)}" for name in names.split()]
        require(condition, " ".join(flags).replace(" True", "") + f": {text}")

    for f in fields(Args):
        value, choices, least = getattr(args, f.name), f.metadata["choices"], f.metadata["least"]
        check(not choices or value in choices, f.name, f"should be one of {choices}")
        if f.type in (int, float):  # NaN is not in the range
            check(least <= value < math.inf, f.name, f"should be {least} or more")
    shares = args.updates * world_size()
    text = f"the questions do not divide into {shares} equal shares (updates x processes)"
    check(args.questions % shares == 0, "questions updates", text)
    check(not (args.resume and args.overwrite), "resume overwrite", "they contradict each other")
    with refusing("--aggregator"):
        if not sees_text(args.aggregator):
            aggregate(args.aggregator, torch.zeros(2, 3), torch.zeros(3))  # refuses another shape
    with refusing(f"--device {args.device}"):
        torch.empty(0, device=args.device)
    installed = args.tracker == "none" or find_spec(args.tracker) is not None
    check(installed, "tracker", "is not installed")
    relative = declares(args.aggregator, "relative")
    if args.traces == 1:
        text = "every advantage would be 0; take --traces 2 or more, or --center none"
        check(args.center == "none" or relative, "traces center", text)
        text = "one reward has no std; take --scale none"
        check(args.scale == "none", "traces scale", text)
    of_traces = "aggregator null clip_null answer_weight center scale filter_std answers_first"
    of_traces += " temperature micro_traces decode_rows"
    for name in of_traces.split() if args.traces == 0 else ():
        default = getattr(args, name) == getattr(Args, name)
        check(default, f"traces {name}", "has no effect on plain SFT, which samples no trace")
    signed = declares(args.aggregator, "signed") and not args.clip_null
    text = "rewards below 0 have no mean to divide by; take --clip-null or --scale std"
    check(args.scale != "mean" or not signed, "scale aggregator", text)
    alone = not declares(args.aggregator, "group") and not sees_text(args.aggregator)
    text = "the empty trace has no such reward, which compares traces or sees their text"
    check(alone or not args.clip_null, "clip_null aggregator", text)


# ---- a run that goes on
# What may differ from the run's args.json when it is resumed; the rest makes it another run.
MAY_CHANGE = (
    "out resume overwrite steps lr eval_data eval_every eval_questions save_every "
    "device micro_traces recompute decode_rows tracker"
).split()


def saved_args(out: Path) -> Args | None:
    """The flags in the args.json of a run's folder; None if there is no such file."""
    file = out / "args.json"
    with refusing(file):
        values = read_json(file)
        values.pop("command", None)  # kept for people
        return Args(**values) if values else None


def check_same_run(args: Args, saved: Args) -> None:
    """InputError for a flag that would make the run that is resumed another one."""
    for name, before in asdict(saved).items():
        now = getattr(args, name)
        require(
            name in MAY_CHANGE or before == now,
            f"{flag_of(name)} {now}: the run in {args.out} has {before}, and --resume keeps it "
            "(if the files have only moved: change its args.json)",
        )


# ---- the flags of sample.py, evaluate.py and preflight.py: which model thinks, and how
def model_flags(description: str, question: bool = False) -> OneLineParser:
    """question: with the flags that only a single question has."""
    parser = OneLineParser(description=description)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory, a run's final/ for instance")
    add("--max-trace", type=int, default=512, help="tokens")
    add("--seed", type=int, default=0)
    add("--marker", help="default: the model directory's own")
    add("--prompt-format", help="{question} in a text, or chat; default: the model directory's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    if question:
        add("--max-answer", type=int, default=512, help="tokens")
        add("--temperature", type=float, default=0.0, help="0 = always the most likely token")
    return parser


def open_model(args: argparse.Namespace, untrained: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of --model; InputError where a flag does not fit them.

    untrained: a model that was not trained here (no nrt.json) need not have the marker yet.
    """
    prompt_format = args.prompt_format and args.prompt_format.replace("\\n", "\n")
    tokenizer = Tokenizer(args.model, args.marker, prompt_format)
    if tokenizer.marker_is_new and (tokenizer.trained_marker or not untrained):
        trained = tokenizer.trained_marker
        text = f"was trained with {trained!r}" if trained else "train.py adds it to a base"
        raise InputError(f"{args.model}: has no marker {tokenizer.marker!r}: {text}")
    print(tokenizer.note, end="", file=sys.stderr)
    for least, names in enumerate(("seed race_seed temperature", "max_trace max_answer limit")):
        for name in names.split():
            value = getattr(args, name, least)
            require(value >= least, f"{flag_of(name)} {value}: should be {least} or more")
    with refusing(f"--device {args.device}"):
        torch.empty(0, device=args.device)
    dtype = getattr(torch, args.dtype)
    return load_with_marker(args.model, tokenizer, dtype, args.device), tokenizer
