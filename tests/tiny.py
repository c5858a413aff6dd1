"""Tiny models and tokenizers for tests: made in a millisecond, with outputs far from uniform, so
that mistakes show. Comparing their tensors; the logs of their runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from model import Config, Transformer

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@torch.no_grad()
def model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    """A random model of SIZES. `changes` are fields of Config."""
    made = Transformer(Config(**{**SIZES, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(0.5 * noise if parameter.dim() == 2 else 1 + 0.3 * noise)
    return made


def predictions(
    model: Transformer, context: list[int], tokens: list[int], temperature: float = 1.0
) -> Tensor:
    """Log-probs of all tokens in the place of each of `tokens`, by one forward of the whole text.

    -> [len(tokens), V]
    """
    hidden = model(torch.tensor([[*context, *tokens]]))[0, len(context) - 1 : -1]
    return (hidden @ model.lm_head.weight.T / temperature).log_softmax(-1)


def plain_logp(
    model: Transformer, context: list[int], tokens: list[int], temperature: float = 1.0
) -> Tensor:
    """Log-probs of `tokens` after `context`, [len(tokens)]."""
    index = torch.tensor(tokens, dtype=torch.long)[:, None]
    return predictions(model, context, tokens, temperature).gather(1, index)[:, 0]


@torch.no_grad()
def chain(logits: Tensor) -> Transformer:
    """A Markov chain as a transformer: after token i the logits are logits[i].  logits [V, V]

    Attention and MLP add nothing, the embedding is one-hot, and lm_head is the table.
    """
    vocab = len(logits)
    width = vocab + vocab % 2  # head_dim must be even
    made = model(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=1e-15,
    )
    for parameter in made.layers.parameters():
        parameter.zero_()
    made.norm.weight.fill_(width**-0.5)  # a one-hot vector then passes the norm unchanged
    made.embed_tokens.weight.copy_(torch.eye(vocab, width))
    made.lm_head.weight.zero_()
    made.lm_head.weight[:, :vocab] = logits.double().T
    return made


def tokenizer_dir(
    path: Path,
    words: Sequence[str] = ("a", "b", "c", "d"),
    special: Sequence[str] = ("<eos>",),
    eos: object = "<eos>",
) -> Path:
    """A directory with a tokenizer of whole words; decoded text has a space between words.

    Ids are in the order special, words. eos: the eos_token of tokenizer_config.json, None for no
    such file.
    """
    names = [*special, *words]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=names[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in special]
    )
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    if eos is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return path


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest element: those near zero are sums with its rounding error."""
    largest = float(expected.detach().abs().max())
    assert largest > 0  # comparing zeros shows nothing
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * largest)


WALL_CLOCK = {"tokens_per_s", "sec_sample", "sec_score", "sec_update", "mem_gb"}


def lines_of(file: str | Path) -> list[dict]:
    """Of log.jsonl or samples.jsonl. JSON has no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in Path(file).read_text().splitlines()]


def without_clock(lines: list[dict]) -> list[dict]:
    return [{name: line[name] for name in line if name not in WALL_CLOCK} for line in lines]
