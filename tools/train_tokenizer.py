"""Train the embedded model's tokenizer: CLIP's byte-level BPE with about 2,000 tokens and 20
positions.

    python tools/train_tokenizer.py --work build/assets

Needs what data.py wrote; leaves `tokenizer/` under --work. No randomness.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import CLIPTokenizer

from data import BACKDROPS, COLOURS, STYLES, caption, load_pictures

START, END = "<|startoftext|>", "<|endoftext|>"
# The way CLIP's own tokenizer cuts text into words before the merges.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def train(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    start, end = ids[START], ids[END]
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, end), (START, start), False, False
    )
    return tokenizer


def clip_vocabulary(
    tokenizer: Tokenizer, alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary in CLIP's order (bytes, bytes at a word's end, merges, start, end), and merges."""
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = (
        alphabet
        + [letter + "</w>" for letter in alphabet]
        + [left + right for left, right in merges]
    )
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: number for number, token in enumerate(tokens)}, [
        (left, right) for left, right in merges
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--size", type=int, default=2000)
    args = parser.parse_args()
    pictures, _ = load_pictures(args.work)
    # The model's own captions count more often than the scorers' extra names, so that they get
    # whole words.
    texts = [picture.caption for picture in pictures for _ in range(1 if picture.extra else 3)]
    for colour in {*COLOURS, *BACKDROPS}:
        texts += [caption(colour, style, backdrop=colour) for style in STYLES for _ in range(10)]
    # The vocabulary also holds each byte at the end of a word, which the trainer does not count.
    trained = train(texts, args.size - 256)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = clip_vocabulary(trained, alphabet)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=20)
    tokenizer.save_pretrained(args.work / "tokenizer")
    loaded = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    lengths = [len(loaded(text).input_ids) for text in dict.fromkeys(texts)]
    print(
        f"{len(loaded)} tokens; longest caption {max(lengths)}, "
        f"mean {sum(lengths) / len(lengths):.1f}"
    )
    for text in ("red apple, noto style, on a blue background", "Zebra  crossing!", ""):
        ids = loaded(text, padding="max_length", truncation=True, max_length=20).input_ids
        print(
            ids,
            loaded.convert_ids_to_tokens(ids)[:12],
            loaded.decode(ids, skip_special_tokens=True),
        )


if __name__ == "__main__":
    main()
