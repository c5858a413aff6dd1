"""A model of a known shape with random weights: speed and memory depend on nothing else.

    python bench/make_model.py --shape llama-3.2-1b --out DIR

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
# The first fields of Config: vocabulary, hidden size, that of the MLP, layers, heads, KV heads.
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
    "tiny": (512, 64, 96, 2, 4, 2),  # to try a command
}
TIED = ("smollm2-135m", "llama-3.2-1b")


def config_of(shape: str) -> Config:
    return Config(
        *SHAPES[shape],
        tie_word_embeddings=shape in TIED,
        max_position_embeddings=8192,
        eos_token_id=EOS,
    )


def random_model(
    shape: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Transformer:
    """The same weights every time, on the same device."""
    model = empty_model(config_of(shape))
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
    parser.add_argument("--out", type=Path, required=True, help="the directory")
    flags = parser.parse_args()
    model = random_model(flags.shape, device=machine.default_device())
    save_model(model, flags.out)
    for file in TOKENIZER_FILES:
        shutil.copyfile(machine.BASE / file, flags.out / file)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {flags.out}: {count / 1e6:.1f}M parameters in bfloat16")


if __name__ == "__main__":
    exit_on_bad_input(main)()
