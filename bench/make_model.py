"""A model of a known shape with random weights: speed and memory depend on nothing else.

    python bench/make_model.py --shape llama-3.2-1b --out DIR
    python bench/make_model.py --shape llama-3.1-8b --layers 4 --out DIR    fewer layers

DIR is a Hugging Face directory that train.py, bench/sample.py and bench/step.py open. Its tokenizer
is that of the embedded task, 83 words: the embedding keeps all rows of the shape. The weights are
drawn on the GPU if there is one.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine
from model import Config
from support.errors import OneLineParser, exit_on_bad_input
from support.weights import assign, empty_model, save_model

BASE = machine.ROOT / "examples/hops/base"
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
    "100m": {  # of bench/memory.py: nearly all parameters are in the layers
        "vocab_size": 83,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
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


def make_model(
    shape: str,
    out: str | Path,
    layers: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> int:
    """Writes the directory `out` -> the number of parameters. layers: 0 = those of the shape."""
    config = Config(**SHAPES[shape], eos_token_id=EOS)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if values.dim() == 2:
            values.normal_(std=STD, generator=generator)
        state[name] = values
    save_model(assign(model, state), out)
    for file in TOKENIZER_FILES:
        shutil.copyfile(BASE / file, Path(out) / file)
    return sum(values.numel() for values in state.values())


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--layers", type=int, default=0, help="0 = those of the shape")
    parser.add_argument("--out", required=True, help="the directory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    machine.check_least("--layers", flags.layers, 0)
    flags.device = machine.check_device(flags.device)
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    dtype = getattr(torch, flags.dtype)
    count = make_model(flags.shape, flags.out, flags.layers, flags.device, dtype, flags.seed)
    print(f"wrote {flags.out}: {count / 1e6:.1f}M parameters in {flags.dtype}")


if __name__ == "__main__":
    exit_on_bad_input(main)()
