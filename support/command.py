"""The flags of sample.py and evaluate.py that say which model thinks and how, and that model."""

import argparse
import math
import sys

import torch

from data import Tokenizer
from model import Transformer
from support.errors import InputError, OneLineParser, require
from support.weights import check_device, load_model


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
    require(args.seed >= 0, f"--seed is {args.seed}, it should be 0 or more")
    for name in ("max_trace", "max_answer"):
        value, flag = getattr(args, name), name.replace("_", "-")
        require(value >= 1, f"--{flag} is {value}, max_new_tokens should be 1 or more")
    warm = 0 <= args.temperature < math.inf
    require(warm, f"--temperature is {args.temperature}, it should be a number, 0 or more")
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
