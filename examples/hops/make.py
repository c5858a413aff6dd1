"""The embedded task: pointer chasing in words with a long easy answer, and the tiny base model.

    question   kim gus ; ann fay ; bob kim ; ... from fay go 3 ?
    answer     so we end at kim , as planned which is where the old road leads all who read ... .

The question lists eight facts that form one cycle of names. The name in the answer is the one hard
token: a transformer of four layers cannot follow several pointers in one forward pass. All other
tokens are the same in every answer.

Why this is the situation of real models: their answers are long and mostly easy, and only a few
tokens depend on reasoning. A model that starts to reason first loses fluency on the many easy
tokens, before its traces are good enough to help with the few hard ones.

THE BASE IS CONSTRUCTED to be in this situation. It is pretrained on documents
"question trace => answer" of four kinds:

    kind      share  trace                                   easy part of the answer
    worked    0.15   "1 fay ann , 2 ann bob , 3 bob kim ,"   each word random with probability 0.3
    wrong     0.05   the same with wrong names               the same
    rambling  0.40   random filler words and names           the same
    direct    0.40   empty                                   clean

so it can work a question out, rarely does, and writes worse after any trace than after none. The
task shows a mechanism and when it acts, not what large models do. The flags are the laboratory's
axes; --easy 0 is the control, in which no trace costs anything.

    python examples/hops/make.py                            train.jsonl, test.jsonl, base/ (minutes)
    python examples/hops/make.py --easy 128 --out /tmp/128  the same task with a longer easy part

A row of the data also has "hard", the positions of the hard tokens in the answer. Training ignores
it. The same torch build gives the same base, bit for bit; on another CPU the digits differ.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the project's files are two folders up

from model import Config, Transformer  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import save_model  # noqa: E402


def flag(default: float, help: str) -> float:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Task:
    """The axes of the laboratory."""

    easy: int = flag(32, "tokens in the easy part of an answer")
    sloppy: float = flag(0.3, "share of random words in the easy part after a trace")
    worked: float = flag(0.15, "share of worked traces in the documents, at most 0.95")
    noise: int = flag(0, "unpredictable tokens in an answer, after the easy part")
    hard: int = flag(1, "hard tokens in an answer, one for each start in the question: 1 or 3")
    steps: int = flag(1000, "steps of pretraining; below about 800 the base may not learn lookups")
    seed: int = flag(0, "of data, documents and initial weights")


# ---- vocabulary
NAMES = "ann bob cal dee eva fay gus kim".split()
FILLER = "hmm well let me see maybe or perhaps i think it could be".split()
EASY = (
    "which is where the old road leads all who read every sign along its side with care "
    "then walk on past each gate until no more are left and they can rest"
).split()
NOISE = "red blue green white black brown grey pink".split()
OTHERS = "; , . ? from go so we end at as planned 0 1 2 3 4 5 6".split()
END, MARKER = "<end>", "=>"
VOCABULARY = ["<unk>", END, MARKER, *OTHERS, *NAMES, *FILLER, *EASY, *NOISE]

# A worked trace has 4 tokens per hop and start. Those of 3 starts stay within 48 tokens as well.
HOPS = {1: range(3, 7), 3: range(3, 4)}


# ---- documents
def make_question(
    task: Task, rng: random.Random, facts: int = len(NAMES)
) -> tuple[str, list[list[str]]]:
    """A question and, for each start in it, the path of names from the start to the answer.

    Several hard tokens need several starts: the last names of one path would be no harder than the
    first of them, because each follows from the one before by a single lookup.
    """
    cycle = rng.sample(NAMES, facts)
    follows = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    told = " ".join(f"{a} {b} ;" for a, b in rng.sample(sorted(follows.items()), facts))
    hops = rng.choice(HOPS[task.hard])
    paths = []
    for start in rng.sample(cycle, task.hard):
        path = [start]
        for _ in range(hops):
            path.append(follows[path[-1]])
        paths.append(path)
    starts = " ".join(path[0] for path in paths)
    return f"{told} from {starts} go {hops} ?", paths


class Subject(NamedTuple):
    """What another task on the same documents replaces (examples/sums)."""

    make_question: Callable
    make_hop: Callable  # (number, name, next name) -> one hop of a worked trace
    names: Sequence[str]  # that a path consists of
    vocabulary: Sequence[str]


POINTERS = Subject(make_question, "{} {} {} ,".format, NAMES, VOCABULARY)


def make_trace(
    kind: str, paths: list[list[str]], rng: random.Random, subject: Subject = POINTERS
) -> tuple[str, list[list[str]]]:
    """A trace of this kind, and the paths whose ends the answer names after it."""
    if kind == "direct":
        return "", paths
    if kind == "rambling":
        words = [rng.choice([*FILLER, *subject.names]) for _ in range(rng.randrange(4, 16))]
        return " ".join(words), paths
    if kind == "wrong":  # random names from some hop on, and an answer that relies on them
        paths = [go_astray(path, rng, subject.names) for path in paths]
    hops = []
    for path in paths:
        for i, (a, b) in enumerate(pairwise(path), start=1):
            hops.append(subject.make_hop(i, a, b))
    return " ".join(hops), paths


def go_astray(path: list[str], rng: random.Random, names: Sequence[str]) -> list[str]:
    at = rng.randrange(1, len(path))
    return path[:at] + [rng.choice(names) for _ in path[at:]]


def make_answer(
    task: Task, paths: list[list[str]], rng: random.Random, sloppy: float = 0.0
) -> tuple[str, list[int]]:
    """An answer and the positions of its hard tokens.

    sloppy: probability of each word of the easy part to be a random one.
    """
    words = "so we end at".split()
    hard = list(range(len(words), len(words) + len(paths)))
    words += [path[-1] for path in paths]
    words += ", as planned".split()
    for i in range(task.easy):
        random_word = rng.random() < sloppy
        words.append(rng.choice(EASY) if random_word else EASY[i % len(EASY)])
    words += [rng.choice(NOISE) for _ in range(task.noise)]
    return " ".join([*words, "."]), hard


def make_document(task: Task, rng: random.Random, subject: Subject = POINTERS) -> tuple[str, str]:
    """(question, what the base learns to continue it with)"""
    question, paths = subject.make_question(task, rng)
    rest = (0.95 - task.worked) / 2
    mix = {"worked": task.worked, "wrong": 0.05, "rambling": rest, "direct": rest}
    (kind,) = rng.choices(list(mix), list(mix.values()))
    trace, paths = make_trace(kind, paths, rng, subject)
    answer, _ = make_answer(task, paths, rng, 0.0 if kind == "direct" else task.sloppy)
    return question, f"{trace} {MARKER} {answer} {END}"


def make_lookup_document(
    task: Task, rng: random.Random, subject: Subject = POINTERS
) -> tuple[str, str]:
    """A worked document of few or many facts, without an easy part: a model learns lookups soon
    from these, and hardly at all from the mix."""
    facts = rng.randrange(max(2, task.hard), len(NAMES) + 1)
    question, paths = subject.make_question(task, rng, facts)
    trace, paths = make_trace("worked", paths, rng, subject)
    answer, _ = make_answer(replace(task, easy=0, noise=0), paths, rng)
    return question, f"{trace} {MARKER} {answer} {END}"


# ---- files
def write_rows(task: Task, file: Path, count: int, subject: Subject = POINTERS) -> None:
    rng = random.Random(f"{task.seed} {file.name}")
    with open(file, "w") as out:
        for _ in range(count):
            question, paths = subject.make_question(task, rng)
            answer, hard = make_answer(task, paths, rng)
            row = {"question": question, "answer": answer, "hard": hard}
            out.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """One token per word."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", END, MARKER])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast"}
    described |= {"eos_token": END, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    ours = {"marker": MARKER, "prompt_format": "{question}"}
    (folder / "nrt.json").write_text(json.dumps(ours, indent=2) + "\n")


# ---- the base
BATCH = 16  # documents
PEAK_LR = 2e-3
LOOKUPS = 0.5  # share of the steps on lookup documents alone, before the mix


def pretrain(task: Task, tokenizer: Tokenizer, subject: Subject = POINTERS) -> Transformer:
    """Next-token prediction on documents, with a loss on trace and answer only."""
    torch.manual_seed(task.seed)
    model = initial_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rng = random.Random(f"{task.seed} documents")
    for step in range(task.steps):
        make = make_lookup_document if step < LOOKUPS * task.steps else make_document
        tokens, learnt = make_batch([make(task, rng, subject) for _ in range(BATCH)], tokenizer)
        logits = model.lm_head(model(tokens[:, :-1])[learnt])  # [N, V]
        loss = F.cross_entropy(logits, tokens[:, 1:][learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm_up = (step + 1) / 50
        decay = 0.1 + 0.9 * (task.steps - step) / (0.2 * task.steps)  # over the last fifth
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(1.0, warm_up, decay)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == task.steps - 1:
            print(f"step {step}/{task.steps}  loss {loss.item():.3f}", flush=True)
    return model


def initial_model(tokenizer: Tokenizer) -> Transformer:
    config = Config(
        vocab_size=tokenizer.model.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_ids[0],
    )
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.06)
    return model


def make_batch(
    documents: list[tuple[str, str]], tokenizer: Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L], and which positions [B, L-1] predict a token of a trace or answer."""
    prompts = [tokenizer.encode_prompt(question) for question, _ in documents]
    rests = [tokenizer.encode_prompt(rest) for _, rest in documents]
    length = max(len(prompt) + len(rest) for prompt, rest in zip(prompts, rests, strict=True))
    tokens = torch.full((len(documents), length), tokenizer.eos_ids[0])
    learnt = torch.zeros(len(documents), length - 1, dtype=torch.bool)
    for i, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        end = len(prompt) + len(rest)
        tokens[i, :end] = torch.tensor(prompt + rest)
        learnt[i, len(prompt) - 1 : end - 1] = True
    return tokens, learnt


# ---- command
def make(task: Task, out: Path, subject: Subject = POINTERS) -> None:
    torch.set_num_threads(1)  # the base must not depend on the number of cores
    base = out / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_rows(task, out / "train.jsonl", 4000, subject)
    write_rows(task, out / "test.jsonl", 200, subject)
    write_tokenizer(base, subject.vocabulary)
    model = pretrain(task, Tokenizer(base), subject)
    save_model(model.to(torch.bfloat16), base)


def main(out: Path = HERE, subject: Subject = POINTERS) -> None:
    parser = argparse.ArgumentParser(description="Writes a task's data and base model.")
    for axis in fields(Task):
        parser.add_argument(
            f"--{axis.name}",
            type=axis.type,
            default=axis.default,
            help=f"{axis.metadata['help']} (default: {axis.default})",
        )
    parser.add_argument("--out", type=Path, default=out, help=f"folder (default: {out})")
    args = vars(parser.parse_args())
    out = args.pop("out")
    task = Task(**args)
    if task.hard not in HOPS or not 0 <= task.worked <= 0.95:
        parser.error("--hard should be 1 or 3, --worked between 0 and 0.95")
    make(task, out, subject)


if __name__ == "__main__":
    main()
