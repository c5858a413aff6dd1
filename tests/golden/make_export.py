"""Makes the golden export: a directory as train.py's final/ holds it, and what transformers makes of it.

tests/golden/export/ is written by our own save_model and Tokenizer.save: a tiny random Llama on the byte-level golden tokenizer, with the
marker added. `expected.json` holds what transformers reads there: the token ids its chat template gives for a few conversations, and what
its greedy `generate` continues them with. The tests make the directory anew, compare every file, and compare ids with our own.

Run by hand, with transformers in an environment of its own (make_golden.py says which). Two runs give the same bytes.

    python3 tests/golden/make_export.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: E402

from data import Tokenizer  # noqa: E402
from model import Config, Transformer  # noqa: E402
from support.weights import copy_token_rows, save_model  # noqa: E402

CONVERSATIONS = [
    [{"role": "user", "content": "Who wrote this book?"}],
    [{"role": "user", "content": "  What is 12 + 30? \n"}],
    [
        {"role": "system", "content": "You answer in a sentence."},
        {"role": "user", "content": "How many cows are there?"},
        {"role": "assistant", "content": " There are 100 cows. "},
        {"role": "user", "content": 'Is that "right"?'},
    ],
]
NEW_TOKENS = 40


def export(path: Path) -> None:
    """Writes the directory, as training would."""
    tokenizer = Tokenizer(HERE / "tokenizers/byte_level")
    vocab = tokenizer.marker_id  # the marker lies one beyond
    config = Config(
        vocab,
        16,
        24,
        2,
        4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_ids[0],
        bos_token_id=tokenizer.prefix[0],
    )
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise if parameter.dim() == 2 else 1 + 0.3 * noise
            )  # far from uniform: greedy choices are no near-ties
    copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    save_model(model, path)
    tokenizer.save(path)


def main() -> None:
    logging.set_verbosity_error()
    folder = HERE / "export"
    export(folder)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    expected = []
    for messages in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(
            {"messages": messages, "prompt": prompt, "greedy": out[0, len(prompt) :].tolist()}
        )
    (folder / "expected.json").write_text(
        "[\n" + ",\n".join(json.dumps(e) for e in expected) + "\n]\n"
    )


if __name__ == "__main__":
    main()
