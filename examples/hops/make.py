"""The embedded task: pointer chasing in words, and a tiny base model that has seen it the way web-trained models have seen reasoning.

    question   kim gus ; ann fay ; bob kim ; ... from fay go 3 ?       eight facts forming one cycle of names, in random order
    answer     so we end at kim , as planned .                         one token of nine needs thought

Nobody can follow several pointers in one forward pass of four layers, and the answers alone never show how. The base has read documents
"question trace => answer" of four kinds: a little worked reasoning, some of it wrong, among much rambling and many direct answers.
Left to itself it therefore rambles or guesses. That it can work a question out, and that this helps, is for training to discover.

    python examples/hops/make.py            writes train.jsonl, test.jsonl and base/ beside this file (about 7 minutes on one CPU core)

Deterministic on one machine; another one's rounding gives a base of the same quality with other digits.
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script: the project's files are two folders up

from data import Tokenizer  # noqa: E402
from model import Config, Transformer  # noqa: E402
from support.weights import save_model, write_json  # noqa: E402

NAMES = "ann bob cal dee eva fay gus kim".split()
HOPS = range(3, 7)
FILLER = "hmm well let me see maybe or perhaps i think it could be".split()
END, MARKER = "<end>", "=>"
SYMBOLS = ["<unk>", END, MARKER, *"; , . ? from go so we end at as planned".split(), *(str(n) for n in range(max(HOPS) + 1)), *NAMES]
VOCABULARY = list(dict.fromkeys([*SYMBOLS, *FILLER]))

FIRST_LESSONS = 0.3  # share of pretraining on worked documents alone, of 2 to 8 facts: this is where lookups are learnt
MIX = {"worked": 0.15, "wrong": 0.05, "rambling": 0.40, "direct": 0.40}
STEPS, BATCH, LR = 1000, 64, 2e-3


# ---------------------------------------------------------------------------------------------------------------- documents
def make_question(rng: random.Random, facts: int = len(NAMES)) -> tuple[str, list[str]]:
    """A question and the names its pointers visit, the first being the start and the last the answer."""
    cycle = rng.sample(NAMES, facts)
    follows = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    told = " ".join(f"{a} {b} ;" for a, b in rng.sample(sorted(follows.items()), facts))
    hops = rng.choice(HOPS)
    path = [rng.choice(cycle)]
    for _ in range(hops):
        path.append(follows[path[-1]])
    return f"{told} from {path[0]} go {hops} ?", path


def make_answer(name: str) -> str:
    return f"so we end at {name} , as planned ."


def make_trace(kind: str, path: list[str], rng: random.Random) -> tuple[str, str]:
    """The trace of a document of this kind, and the name its answer gives."""
    if kind == "wrong":  # goes astray somewhere and believes itself
        at = rng.randrange(1, len(path))
        path = path[:at] + [rng.choice(NAMES) for _ in path[at:]]
    if kind in ("worked", "wrong"):
        return " ".join(f"{i} {a} {b} ," for i, (a, b) in enumerate(pairwise(path), start=1)), path[-1]
    if kind == "rambling":
        return " ".join(rng.choice(FILLER + NAMES) for _ in range(rng.randrange(4, 16))), path[-1]
    return "", path[-1]


def make_document(rng: random.Random, first_lessons: bool) -> tuple[str, str]:
    """(what the model is given, what it learns to continue with)"""
    question, path = make_question(rng, rng.randrange(2, len(NAMES) + 1) if first_lessons else len(NAMES))
    kind = "worked" if first_lessons else rng.choices(list(MIX), list(MIX.values()))[0]
    trace, name = make_trace(kind, path, rng)
    return question, f"{trace} {MARKER} {make_answer(name)} {END}"


# ---------------------------------------------------------------------------------------------------------------- files
def write_rows(file: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    with open(file, "w") as out:
        for _ in range(count):
            question, path = make_question(rng)
            out.write(json.dumps({"question": question, "answer": make_answer(path[-1])}) + "\n")


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", END, MARKER])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": "<unk>"})
    write_json(folder / "nrt.json", {"marker": MARKER, "prompt_format": "{question}"})


# ---------------------------------------------------------------------------------------------------------------- the base
def pretrain(tokenizer: Tokenizer, steps: int = STEPS, seed: int = 0) -> Transformer:
    """Next-token prediction on documents, loss on trace and answer only."""
    torch.manual_seed(seed)
    end = tokenizer.eos_ids[0]
    config = Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        rope_theta=100.0,  # documents of 70 tokens: the usual 10000 would leave most frequencies standing still
        eos_token_id=end,
    )
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.06)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    rng = random.Random(seed + 1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 100, 0.1 + 0.9 * (steps - step) / (0.2 * steps))
        documents = [make_document(rng, first_lessons=step < FIRST_LESSONS * steps) for _ in range(BATCH)]
        given = [tokenizer.encode_prompt(question) for question, _ in documents]
        rows = [g + tokenizer.encode_prompt(rest) for g, (_, rest) in zip(given, documents, strict=True)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [end] * (width - len(row)) for row in rows])  # [B, L]
        place = torch.arange(width - 1)
        learnt = torch.stack([(place >= len(g) - 1) & (place < len(row) - 1) for g, row in zip(given, rows, strict=True)])  # [B, L-1]
        logits = model.lm_head(model(tokens[:, :-1])[learnt])
        loss = F.cross_entropy(logits, tokens[:, 1:][learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    return model


def main() -> None:
    torch.set_num_threads(1)  # the order of floating-point sums, and so the base, does not depend on the number of cores
    write_rows(HERE / "train.jsonl", 4000, seed=1)
    write_rows(HERE / "test.jsonl", 200, seed=2)
    write_tokenizer(HERE / "base")
    tokenizer = Tokenizer(HERE / "base")
    save_model(pretrain(tokenizer), HERE / "base")


if __name__ == "__main__":
    main()
