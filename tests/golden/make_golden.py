"""Makes the golden models: tiny random Hugging Face directories, and transformers' logits of each.

tests/golden/NAME/ is a directory as one downloads it (config.json, safetensors, sometimes an
index), together with `expected.safetensors`:

    tokens  [2, 24]     int64  random
    logits  [2, 24, V]  fp32   by transformers in fp32 with eager attention, from the files on disk

model.py must reproduce the logits; that is tested without transformers. config.json of the models
in MISTAKES is written by hand, as the real files have it: by transformers 4, with rope_theta and
rope_scaling. In small they differ from real ones where a mistake would not show: rms_norm_eps is
1e-3, and at rope_theta 100 the llama3 scaling keeps, interpolates and divides wavelengths. The
models in RESAVED are theirs, loaded and saved by transformers 5.

Random weights test as much as trained ones if the logits depend visibly on every field. This is
checked here: each of a model's MISTAKES (a window off by one, a RoPE scaling left out, a default
epsilon) must move some logit by more than 1 % of the largest one, a hundred times the tolerance of
the tests.

Run by hand when a kind of model is added, in an environment of its own: nothing else needs
transformers. Two runs on one machine give the same bytes.

    pip install torch==2.13.0
    pip install transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6
    python3 tests/golden/make_golden.py
"""

import copy
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

HERE = Path(__file__).parent
BATCH, LENGTH = 2, 24

EPS = {"rms_norm_eps": 1e-6}
THETA = {"rope_theta": 10000.0}
UNSCALED = {"rope_scaling": None}
WINDOWED = {"use_sliding_window": True}


def scaling(name: str, **changes: object) -> dict:
    """The model's rope_scaling with a wrong field."""
    config = json.loads((HERE / name / "config.json").read_text())
    return {"rope_scaling": config["rope_scaling"] | changes}


# Wrong readings of config.json that the logits must show. The smaller Qwens are tied: no others.
MISTAKES = {
    "llama2": [{"rope_theta": 500000.0}, EPS],  # has RoPE frequencies, which readers ignore
    "llama31_rope_scaling": [
        UNSCALED,
        THETA,
        scaling("llama31_rope_scaling", rope_type="linear"),
        scaling("llama31_rope_scaling", original_max_position_embeddings=256),
    ],
    "llama32": [UNSCALED, scaling("llama32", factor=8.0), EPS],
    "mistral_v01": [{"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}],
    "mistral_v03": [{"sliding_window": 8}, THETA, EPS],
    "nemo": [THETA, EPS],  # heads 4 x 16 = 64 wide over a hidden size of 32
    "qwen2": [THETA, EPS, WINDOWED],
    "qwen25_tied": [],
    "qwen3": [THETA, EPS, WINDOWED],
    "qwen3_tied": [],
}
# New name: (source, shard size).
RESAVED = {
    "llama31_rope_parameters": ("llama31_rope_scaling", "1GB"),
    "sharded": ("mistral_v03", "40KB"),
    "qwen25_rope_parameters": ("qwen25_tied", "1GB"),
    "qwen3_rope_parameters": ("qwen3", "1GB"),
}


def write_weights(folder: Path) -> None:
    """Random weights: matrices and biases of std 0.2, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    config = AutoConfig.from_pretrained(folder)
    tensors = {}
    for name, empty in sorted(AutoModelForCausalLM.from_config(config).state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        noise = torch.randn(empty.shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise
    if folder.name == "llama2":
        frequency = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
        for layer in range(config.num_hidden_layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequency.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor, **mistake) -> torch.Tensor:
    """[B, L, V] fp32, by transformers. `mistake` replaces fields of config.json."""
    values = {**json.loads((folder / "config.json").read_text()), **mistake}
    config = AutoConfig.for_model(**copy.deepcopy(values))  # it writes into the dicts it is given
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), f"{folder.name}: {report}"  # no tensor missing or left over
    return model.eval()(tokens, use_cache=False).logits


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # it warns of the mistakes
    for name in [*MISTAKES, *RESAVED]:
        folder = HERE / name
        source, shard_size = RESAVED.get(name, (name, ""))
        if shard_size:
            model = AutoModelForCausalLM.from_pretrained(HERE / source, dtype=torch.float32)
            model.save_pretrained(folder, max_shard_size=shard_size)
        else:
            write_weights(folder)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{source} tokens".encode()))
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokens = torch.randint(vocab, (BATCH, LENGTH), generator=generator)
        expected = logits(folder, tokens)
        assert torch.equal(expected, logits(HERE / source, tokens)), f"{name} is not {source}"
        save_file({"tokens": tokens, "logits": expected}, folder / "expected.safetensors")
        for mistake in MISTAKES.get(name, []):
            effect = (logits(folder, tokens, **mistake) - expected).abs().max()
            print(f"{name} {effect / expected.abs().max():6.1%} {mistake}")
            assert effect > 0.01 * expected.abs().max(), "too little for a test to notice"


if __name__ == "__main__":
    main()
