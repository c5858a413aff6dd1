"""A model of a known shape with random weights: speed and memory depend on nothing else.

    python bench/make_model.py --shape llama-3.2-1b --out DIR
    python bench/make_model.py --shape llama-3.1-8b --layers 4 --out DIR    fewer layers

DIR is a Hugging Face directory that train.py, bench/sample.py and bench/step.py open. Its tokenizer
is that of the embedded task, 83 words: the embedding keeps all rows of the shape. The weights are
drawn on the GPU if there is one.
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine
from model import Config, Transformer
from support.errors import OneLineParser, exit_on_bad_input
from support.weights import assign, empty_model, save_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "nrt.json")
EOS = 1  # of that tokenizer
STD = 0.02  # of every matrix, as before pretraining: logits of a deviation near 1

ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
LLAMA = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "rope_scaling": ROPE | {"factor": 8.0},
    },
    "tiny": {  # to try a command
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def random_model(
    shape: str, layers: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Transformer:
    """layers: 0 = those of the shape. The same weights every time, on the same device."""
    config = Config(**SHAPES[shape], eos_token_id=EOS)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 2:
            state[name].normal_(std=STD, generator=generator)
    return assign(model, state)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--layers", type=machine.count, default=0, help="default: the shape's")
    parser.add_argument("--out", type=Path, required=True, help="the directory")
    flags = parser.parse_args()
    model = random_model(flags.shape, flags.layers, device=machine.default_device())
    save_model(model, flags.out)
    for file in TOKENIZER_FILES:
        shutil.copyfile(machine.BASE / file, flags.out / file)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {flags.out}: {count / 1e6:.1f}M parameters in bfloat16")


if __name__ == "__main__":
    exit_on_bad_input(main)()
