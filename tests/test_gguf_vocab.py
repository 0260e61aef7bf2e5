"""lib/gguf_vocab.py: llama.cpp cuts text into the same tokens, or the tokenizer is refused."""

import json

import pytest
from families import toy
from test_export_gguf import SHAPE, byte_level, refused, written
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lib.export import gguf_vocab


def sentencepiece_like(prefix=True):
    """Return a BPE tokenizer with byte fallback, as Llama 2's is after conversion."""
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence(steps)
    trained.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog the end 12"] * 3,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False),
    )
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are tokens of the model's own
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_like():
    """Return one as Gemma's is: it splits at spaces, of which its normalizer leaves none."""
    tokenizer = sentencepiece_like(prefix=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def split(pattern):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split(gguf_vocab.WORDS % r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": lambda: byte_level(split(gguf_vocab.WORDS % r"\p{N}")),
    "byte fallback": sentencepiece_like,
    "byte fallback, no space before": lambda: sentencepiece_like(prefix=False),
    "byte fallback, Gemma's": gemma_like,
}
TEXTS = (
    "The quick brown fox's 1234567 jumps, they've said; 99 99 the end.\n\n  end",
    "the  lazy dog\t12",
    " lead",
    "naïve 日本 🙂",
    "THEY'VE the end  ",
    "</s>the<s>",
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path, name):
    pytest.importorskip("xllamacpp")
    from lib.export.runtimes import Server

    toy("llama", **SHAPE | {"vocab_size": 352}).save_pretrained(tmp_path / "model")
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path / "model")
    with Server(written(tmp_path / "model", tmp_path / "out", "mha1"), 256) as server:
        for text in TEXTS[: 5 if name == "byte fallback" else 6]:  # spaces after special tokens differ there
            assert server.tokenize(text) == tokenizer.encode(text), text


def unigram():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)))


def doubled():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", pair="$A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def too_many():
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<{i}>" for i in range(70)])
    return tokenizer


def lower_case():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "make, says",
    (
        (unigram, "Unigram instead of BPE"),
        (lambda: byte_level(merges=0), "without merges"),
        (too_many, "tokens, the model knows 320"),
        (lambda: byte_level(split("x+")), "it splits text by"),
        (lambda: byte_level(pre_tokenizers.Whitespace()), "Whitespace"),
        (lower_case, "normalizer is Lowercase"),
        (doubled, "more than one BOS"),
    ),
)
def test_a_tokenizer_that_llama_cpp_has_no_equal_of_is_refused(tmp_path, make, says):
    toy("llama", **SHAPE).save_pretrained(tmp_path / "model")
    make().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", tmp_path, says, "known are byte-level BPE", "format hf")
