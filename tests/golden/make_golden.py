"""Makes the golden models: tiny random Hugging Face directories, and transformers' logits of each.

tests/golden/NAME/ is a directory as one downloads it (config.json, safetensors, sometimes an
index), together with `expected.safetensors`:

    tokens  [2, 24]     int64  random
    logits  [2, 24, V]  fp32   by transformers in fp32 with eager attention, from the files on disk

model.py must reproduce the logits; that is tested without transformers. Random weights test as
much as trained ones if the logits depend visibly on every field of config.json. This is checked
here: each model has a list of MISTAKES (a window off by one, a RoPE scaling left out, a default
epsilon), and each mistake must move some logit by more than 1 % of the largest one, a hundred
times the tolerance of the tests.

Run by hand when a kind of model is added, in an environment of its own: nothing else needs
transformers. Two runs give the same bytes.

    pip install torch==2.13.0
    pip install transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6
    python3 tests/golden/make_golden.py
"""

import copy
import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

HERE = Path(__file__).parent
BATCH, LENGTH = 2, 24

# Fields of all models. The real models' config.json was written by transformers 4, with the fields
# rope_theta and rope_scaling. transformers 5 writes rope_parameters instead, so the older form is
# written out here, as the real files have it.
COMMON = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-3,  # real models have 1e-5, too little to notice when it is forgotten
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 96,
}
LLAMA = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
}
MISTRAL = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Real Qwens state a sliding window that is switched off.
QWEN = {
    **COMMON,
    "attention_dropout": 0.0,
    "bos_token_id": 30,
    "eos_token_id": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "max_window_layers": 1,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "use_sliding_window": False,
    "vocab_size": 32,
}
QWEN2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {
    **QWEN,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 8,  # 4 heads x 8 over a hidden size of 16
    "rope_scaling": None,
}

# At rope_theta 100 the four wavelengths are 6, 20, 63 and 199 positions. These two scalings cover
# the llama3 formula: in the first, one wavelength stays, one is interpolated and two are divided;
# in the second, one is interpolated and three are divided. The original length is above the input's
# in the first and below it in the second: the scaling applies from the first position, in both.
SCALING_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
SCALING_32 = {**SCALING_31, "factor": 32.0, "original_max_position_embeddings": 16}

CONFIGS = {
    # Llama 2 has no rope_theta (10000 is meant). Its files hold RoPE frequencies, which readers
    # ignore.
    "llama2": {
        **LLAMA,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama31_rope_scaling": {
        **LLAMA,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 100.0,
        "rope_scaling": SCALING_31,
        "mlp_bias": False,
        "bos_token_id": 93,
        "eos_token_id": [94, 95],  # several, as in the instruct models
    },
    "llama32": {
        **LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_theta": 100.0,
        "rope_scaling": SCALING_32,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 93,
        "eos_token_id": 94,
    },
    "mistral_v01": {
        **MISTRAL,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "sliding_window": 8,
    },
    "mistral_v03": {
        **MISTRAL,
        "num_key_value_heads": 1,
        "head_dim": None,  # written so by the transformers of 2025: the same as absent
        "max_position_embeddings": 64,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    # Heads 4 x 16 = 64 wide over a hidden size of 32: q_proj and o_proj are not square.
    "nemo": {
        **MISTRAL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    # The smaller Qwens are tied.
    "qwen2": QWEN2,
    "qwen25_tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3_tied": {**QWEN3, "tie_word_embeddings": True},
}

# The same models loaded and saved by transformers 5: rope_parameters, shards with an index.
# New name: (source, shard size).
RESAVED = {
    "llama31_rope_parameters": ("llama31_rope_scaling", "1GB"),
    "sharded": ("mistral_v03", "40KB"),
    "qwen25_rope_parameters": ("qwen25_tied", "1GB"),
    "qwen3_rope_parameters": ("qwen3", "1GB"),
}

# Wrong readings of config.json that the logits must show.
MISTAKES = {
    "llama2": [{"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}],
    "llama31_rope_scaling": [
        {"rope_scaling": None},
        {"rope_theta": 10000.0},
        {"rope_scaling": {**SCALING_31, "rope_type": "linear"}},
        {"rope_scaling": {**SCALING_31, "original_max_position_embeddings": 256}},
    ],
    "llama32": [
        {"rope_scaling": None},
        {"rope_scaling": {**SCALING_32, "factor": 8.0}},
        {"rms_norm_eps": 1e-6},
    ],
    "mistral_v01": [{"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}],
    "mistral_v03": [{"sliding_window": 8}, {"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    "nemo": [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    "qwen2": [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}, {"use_sliding_window": True}],
    "qwen3": [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}, {"use_sliding_window": True}],
}


def write_model(folder: Path, config: dict) -> None:
    """Writes config.json and random weights: matrices and biases of std 0.2, norms around 1.

    With this std attention is far from uniform.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = {}
    for name, empty in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        noise = torch.randn(empty.shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise
    if folder.name == "llama2":
        frequency = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequency.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resave_model(folder: Path, source: Path, shard_size: str) -> None:
    """Loads the directory `source` and saves it with transformers, in shards of `shard_size`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shard_size)


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
    logging.disable_progress_bar()
    for name in [*CONFIGS, *RESAVED]:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        if name in CONFIGS:
            source = name
            write_model(folder, CONFIGS[name])
        else:
            source, shard_size = RESAVED[name]
            resave_model(folder, HERE / source, shard_size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{source} tokens".encode()))
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokens = torch.randint(vocab, (BATCH, LENGTH), generator=generator)
        expected = logits(folder, tokens)
        assert torch.equal(expected, logits(HERE / source, tokens)), f"{name} is not {source}"
        save_file({"tokens": tokens, "logits": expected}, folder / "expected.safetensors")

        top = expected.abs().max()
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name} {size / 1000:.0f} kB, largest |logit| {top:.1f}")
        for mistake in MISTAKES.get(name, []):
            effect = (logits(folder, tokens, **mistake) - expected).abs().max() / top
            print(f"  {effect:6.1%} {mistake}")
            assert effect > 0.01, "the logits depend too little on this for a test to notice it"


if __name__ == "__main__":
    main()
