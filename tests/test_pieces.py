"""Long texts in pieces: the ids of the whole, or the whole."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lib.pieces import divisible, tokenize

WORDS = (
    "the quick naïve fox 北京 don't 1234567 _jumps_ over\n\n = Title = \n a@b.c  two   gaps\ttabs lazy dogs é ..".split(
        " "
    )
)


def text(seed=0, length=40_000):
    rng = random.Random(seed)
    words = [rng.choice([*WORDS, "".join(rng.choices("abcdef", k=5))]) for _ in range(length // 5)]
    return " ".join(words)[:length]


def trained(kind, words_only=True):
    """A BPE in the manner of GPT-2, Llama 2 or Gemma; words_only: no token may reach over a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "gpt2", fuse_unk=True))
    alphabet = []
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words_only)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if words_only else None
        alphabet = [chr(i) for i in range(32, 127)]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special[:3], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(7)], trainer)
    if kind == "llama2":  # as its tokenizer.json: no splitting, a space in front of the text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = None
    if kind == "gemma":  # splits at spaces that its normalizer has replaced before
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma"])
def test_pieces_give_the_ids_of_the_whole(kind, special):
    tokenizer = trained(kind)
    for seed in range(3):
        whole = text(seed)
        assert divisible(tokenizer, whole)
        pieces, seen = [], []
        for piece in tokenize(whole, tokenizer, special, piece=700, progress=seen.append):
            pieces.append(piece)
        assert len(pieces) > 20 and sum(seen) == len(whole)
        assert sum(pieces, []) == tokenizer(whole, add_special_tokens=special)["input_ids"]


def test_pieces_give_the_ids_of_the_whole_on_real_text(data_dir):
    from lib.data import load_documents
    from lib.model import load_tokenizer

    path = Path(__file__).parent.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer(path)

    whole = "\n\n".join(load_documents("wikitext2", data_dir=data_dir).documents)[:600_000]
    pieces = list(tokenize(whole, tokenizer, piece=5000))
    assert len(pieces) > 100
    assert sum(pieces, []) == tokenizer(whole)["input_ids"]


def test_a_vocabulary_that_reaches_over_spaces_is_given_the_whole():
    for kind in ("gpt2", "gemma"):
        tokenizer = trained(kind, words_only=False)
        assert not divisible(tokenizer, text())
        assert list(tokenize(text(), tokenizer, piece=700)) == [tokenizer(text())["input_ids"]]


def test_an_added_token_that_takes_spaces_along_is_given_the_whole():
    tokenizer = trained("gpt2")
    tokenizer.add_tokens([AddedToken("fox", lstrip=True)])
    assert not divisible(tokenizer, text())
    assert divisible(tokenizer, "no such animal here")
