"""Makes the golden export: a directory like train.py's final/, and what transformers reads there.

tests/golden/export/ is written by our own save_model and Tokenizer.save: a tiny random Llama on
the cut tokenizer of Llama 2, with the marker added. `expected.json` is written by transformers
from that directory: the token ids its chat template gives for a few conversations, and what its
greedy `generate` continues them with. The tests write the directory again, compare every file,
and compare ids with our own.

Run by hand, with transformers in an environment of its own (see make_golden.py). Two runs give the
same bytes.

    python3 tests/golden/make_export.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: E402

from model import Config, Transformer  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
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


def export(folder: Path) -> None:
    """Writes the directory, as training would."""
    tokenizer = Tokenizer(HERE / "tokenizers/llama2")
    config = Config(
        vocab_size=tokenizer.marker_id,  # without the marker, which copy_token_rows adds
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_ids,
        bos_token_id=tokenizer.prefix[0],
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform: no near-ties in greedy decoding
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() == 2 else 1 + 0.3 * noise)
    copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    save_model(model, folder)
    tokenizer.save(folder)


def main() -> None:
    logging.set_verbosity_error()
    folder = HERE / "export"
    export(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = []
    for messages in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        stops = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        output = model.generate(torch.tensor([prompt]), do_sample=False, **stops)
        greedy = output[0, len(prompt) :].tolist()
        lines.append(json.dumps({"messages": messages, "prompt": prompt, "greedy": greedy}))
    (folder / "expected.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
