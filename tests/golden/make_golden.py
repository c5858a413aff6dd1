"""Makes the golden models: tiny random Hugging Face directories, and the logits that transformers computes from each.

tests/golden/NAME/ is a directory as one downloads it (config.json, safetensors, sometimes an index) together with `expected.safetensors`:

    tokens  [2, 24]      int64  random
    logits  [2, 24, 96]  fp32   transformers, fp32, eager attention, the directory read back from disk

Our own model must reproduce the logits, and it can be tested without transformers being installed. Random weights prove as much as trained
ones do, if what they compute depends visibly on everything in config.json. That is checked here: every model carries `mistakes` (a window
that is off by one, a rope scaling left out, an epsilon taken from the defaults ...), and each must move some logit by more than 1 % of the
largest one, a hundred times the tolerance of the tests.

Run by hand, when a kind of model is added, in an environment of its own: nothing else needs transformers. Two runs give the same bytes.

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

# What all of them share. The config.json of the real models dates from transformers 4, with rope_theta and rope_scaling beside the sizes,
# and so do these: transformers 5 itself only writes rope_parameters, so they are spelt out here key by key, as they stand on the hub.
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

# The wavelengths of the four frequencies at rope_theta 100 are 6, 20, 63 and 199 positions, so these two scalings meet every branch of the
# llama3 formula: in the first one wavelength stays, one is interpolated, two are divided; in the second one is interpolated, three divided.
# The first original length is above our input's and the second below: the scaling applies from the first position on, in both.
SCALING_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
SCALING_32 = {**SCALING_31, "factor": 32.0, "original_max_position_embeddings": 16}

CONFIGS = {
    # Llama 2 says nothing of rope_theta (10000 is meant), and its files hold the rope frequencies as tensors that nobody reads any more.
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
}

# The same models after transformers 5 has loaded and saved them: its config.json with rope_parameters, its shards with their index.
RESAVED = {
    "llama31_rope_parameters": ("llama31_rope_scaling", "1GB"),
    "sharded": ("mistral_v03", "40KB"),
}

# Readings of config.json that are wrong, and must show.
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
}


def write_model(folder: Path, config: dict) -> None:
    """Writes config.json and random weights: matrices of std 0.2 (attention then is far from uniform), norms around 1."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    tensors = {}
    for name, empty in sorted(
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict().items()
    ):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        noise = torch.randn(empty.shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise
    if folder.name == "llama2":
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 1 / 10000 ** (
                torch.arange(0, 8, 2) / 8
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resave_model(folder: Path, source: Path, shard_size: str) -> None:
    """Writes what transformers makes of the directory `source`, in shards of at most `shard_size`."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(
        folder, max_shard_size=shard_size
    )


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor, **mistake) -> torch.Tensor:
    """[B, L, V] fp32, by transformers from the directory on disk; with `mistake`, as if its config.json said that instead."""
    config = {**json.loads((folder / "config.json").read_text()), **mistake}
    config = AutoConfig.for_model(**copy.deepcopy(config))  # it writes into the dicts it is given
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), (
        f"{folder.name}: {report}"
    )  # nothing missing, nothing left over
    return model.eval()(tokens, use_cache=False).logits


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # it warns of the mistakes, rightly
    logging.disable_progress_bar()
    for name in [*CONFIGS, *RESAVED]:
        folder, source = HERE / name, RESAVED.get(name, (name,))[0]
        shutil.rmtree(folder, ignore_errors=True)
        if name in CONFIGS:
            write_model(folder, CONFIGS[name])
        else:
            resave_model(folder, HERE / source, RESAVED[name][1])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{source} tokens".encode()))
        tokens = torch.randint(COMMON["vocab_size"], (BATCH, LENGTH), generator=generator)
        expected = logits(folder, tokens)
        assert torch.equal(expected, logits(HERE / source, tokens)), (
            f"{name} differs from {source}, which it is a copy of"
        )
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
