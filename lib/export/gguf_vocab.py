"""A tokenizer as the metadata of a GGUF file, for llama.cpp to cut text into the same tokens.

llama.cpp has code of its own for tokenizers and knows how a byte-level one splits text by a name, not by
its pattern. So what a tokenizer does is read from its fast version (tokenizer.json) and looked up in
SPLITS; one that llama.cpp would run differently is refused.

    fields = vocabulary(tokenizer, vocab_size=49152)    # metadata key -> gguf.GGUFValue
"""

import json

# What llama.cpp calls a byte-level tokenizer that splits text by these patterns, in this order, and
# whether a piece that is a token is taken whole, without its merges (tokenizer.json: ignore_merges).
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((WORDS % r"\p{N}",), False): "qwen2",
}


def vocabulary(tokenizer, vocab_size):
    """Return the tokenizer.* fields of a transformers tokenizer, filled up to `vocab_size` tokens.

    Raises ValueError, one line, for a tokenizer that llama.cpp has no equal of.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} has no fast version (tokenizer.json)")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refusal(f"{model['type']} instead of BPE")
    if len(tokenizer) > vocab_size:
        raise _refusal(f"{len(tokenizer)} tokens, the model knows {vocab_size}")
    writer = gguf.GGUFWriter(None, "")
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_space_prefix(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(spec))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    scores = [0.0] * vocab_size
    rank = {"".join(pair): -float(i) for i, pair in reversed([*enumerate(_merges(model))])}
    for token, i in model["vocab"].items():
        tokens[i], types[i], scores[i] = token, gguf.TokenType.NORMAL, rank.get(token, 0.0)
        if model["byte_fallback"] and token == f"<0x{token[3:5]}>":
            types[i] = gguf.TokenType.BYTE
    for token in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    if model["unk_token"] is not None:
        types[model["vocab"][model["unk_token"]]] = gguf.TokenType.UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model["byte_fallback"]:
        writer.add_token_scores(scores)
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    first, last = _added_ends(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        named = isinstance(template, dict)
        writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()] if named else template)
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def _split(spec):
    """Return llama.cpp's name for how a byte-level BPE splits text."""
    normalizer = (spec["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes text as it is; nearly all text is in NFC
        raise _refusal(f"its normalizer is {normalizer}")
    steps = spec["pre_tokenizer"] or {}
    patterns = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] if step["use_regex"] else []
        else:
            raise _refusal(f"it splits text by {json.dumps(step)}")
    name = SPLITS.get((tuple(patterns), spec["model"]["ignore_merges"]))
    if name is None:
        raise _refusal(f"it splits text by {json.dumps(patterns)}")
    return name


def _space_prefix(spec):
    """Return whether a SentencePiece-like BPE puts a space before the text."""
    normalizer, split = spec["normalizer"] or {}, spec["pre_tokenizer"]
    steps = [step for step in normalizer.get("normalizers", [normalizer]) if step]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if split and split["type"] == "Split" and split["pattern"] == {"String": " "} and replaces in steps:
        split = None  # Gemma's, which finds no space
    if split is None and steps in ([{"type": "Prepend", "prepend": "▁"}, replaces], [replaces]):
        return len(steps) == 2
    if not steps and split and split["type"] == "Metaspace" and split["replacement"] == "▁" and not split["split"]:
        return split["prepend_scheme"] != "never"
    raise _refusal(f"it normalizes text by {json.dumps(normalizer)} and splits it by {json.dumps(split)}")


def _merges(model):
    """Return the merges as pairs; llama.cpp loads no byte-level tokenizer without any."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if not pairs:
        raise _refusal("a BPE without merges")
    return pairs


def _added_ends(tokenizer):
    """Return whether the tokenizer puts its BOS token before a text and its EOS token behind it."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for first in (False, True):
        for last in (False, True):
            if whole == [tokenizer.bos_token_id] * first + bare + [tokenizer.eos_token_id] * last:
                return first, last
    raise _refusal(f"it makes of {bare} {whole}, by more than one BOS and EOS token")


def _refusal(reason):
    return ValueError(
        f"format gguf: llama.cpp has no equal of this tokenizer ({reason}); known are byte-level BPE that splits "
        f"like {', '.join(SPLITS.values())}, and BPE with byte fallback (Llama 2, Mistral); give the model's .gguf "
        "file, whose vocabulary is copied, or use format hf"
    )
