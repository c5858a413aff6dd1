"""Makes the golden tokenizers: the two kinds that Llama, Mistral and SmolLM2 have, in small.

tests/golden/tokenizers/KIND/ holds tokenizer.json and tokenizer_config.json, laid out as in the
models' own directories:

    byte_level      Llama 3, SmolLM2. BPE over bytes; a regular expression splits the text into
                    words; the special tokens come after the vocabulary
    sentencepiece   Llama 2, Mistral. BPE over characters, "▁" for a space, one "▁" in front of the
                    text; bytes for unknown characters

Both put bos in front of what they encode, unless told otherwise. They differ in what readers of
such files get wrong: one config names bos and eos by a string, the other by an object; a token of
the second kind loses the space in front of it when it is decoded alone. In both, a token may be a
part of a character. So decoding token by token is not decoding the text.

Run by hand. Two runs give the same bytes.

    pip install tokenizers==0.23.3
    python3 tests/golden/make_tokenizers.py
"""

import json
import os
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # for the same bytes every time

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = Path(__file__).parent / "tokenizers"

SENTENCES = """
The quick brown fox jumps over the lazy dog.
Pack my box with five dozen liquor jugs, and do not forget the labels.
Question: what is 12 + 30? Answer: the sum of 12 and 30 is 42.
If every farmer has 4 cows and there are 25 farmers, how many cows are there?
There are 4 * 25 = 100 cows, so the answer is 100.
First we add the two numbers, then we divide the result by three.
She thinks about the question before she gives the answer.
We do not know what the answer is, but we know how to find it.
A train leaves the station at 9:45 and arrives at 11:15; how long does it take?
It takes one hour and thirty minutes, that is 90 minutes in all.
Let us think about this step by step, and then write down what we have found.
The capital of France is Paris, and the capital of Italy is Rome.
Who wrote this book? I do not remember, but the name is on the cover.
You can't always get what you want, but if you try you'll get what you need.
I've said that they're late; he'd say that we're early, and she'll say nothing.
The water in the lake was cold, and nobody wanted to be the first to swim.
When the rain stopped, the children ran out of the house and into the garden.
Because the price went down by 20%, the shirt now costs $16 instead of $20.
The area of a square with sides of 7 cm is 7 * 7 = 49 square centimetres.
There is more than one way to solve this problem, and the second is shorter.
He opened the door, looked around, and closed it again without a word.
In the beginning it was hard, but with the help of others it became simple.
One of the reasons is that the other side of the hill is much steeper.
They worked through the night, and in the morning the work was done.
What would happen if the moon were twice as far from the earth?
The teacher asked the students to explain how they had come to the result.
So the answer to the question is yes, and here is the reason why.
Therefore x = 3, because 2x + 1 = 7 and nothing else gives seven.
Please read the instructions before you begin, and keep them for later.
It is better to try and to fail than never to have tried at all!
Zebras, quails and foxes were there; Kim, Max, Joe and Val were not.
Under the "old" rules (see above), nobody was allowed to leave early.
Jane & Quentin: "Great, we've won!" - "No, you haven't."
""".strip().split("\n")

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Llama 3's: contractions, words with the space in front of them, at most three digits,
# punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=376, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([BOS, EOS, "<|eot_id|>", "<|reserved_special_token_0|>"])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), prepend(BOS, tokenizer)]
    )
    names = {"bos_token": BOS, "eos_token": EOS}
    return tokenizer, {**names, "tokenizer_class": "PreTrainedTokenizerFast"}


def sentencepiece() -> tuple[Tokenizer, dict]:
    # Merges are learnt within words, then applied to the whole text as one word.
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=128, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    pieces = [*names.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in names.values()]
    )
    tokenizer.post_processor = prepend("<s>", tokenizer)
    options = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    options["__type"] = "AddedToken"
    return tokenizer, {
        "add_bos_token": True,
        "add_eos_token": False,
        **{name: {**options, "content": token} for name, token in names.items()},
        "tokenizer_class": "LlamaTokenizer",
    }


def prepend(bos: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def main() -> None:
    for kind in (byte_level, sentencepiece):
        tokenizer, config = kind()
        folder = HERE / kind.__name__
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text)


if __name__ == "__main__":
    main()
