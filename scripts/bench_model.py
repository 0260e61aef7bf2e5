"""Time models against each other: prefill, first token, decoding with the KV cache, and what each keeps in memory.

Give checkpoints (dense, pruned and exported), or one model with an order and several numbers of removals.
Every model continues the same prompts of random tokens. All are in memory at once and take turns repeat by
repeat, so that a noisy machine slows all of them; one turn before is warm-up. Ratios are to the first model.

    python -m scripts.bench_model models/Llama-2-7b-hf exports/Llama-2-7b-17 --trust-remote-code \\
        --batch-sizes 1 8 --prompt-lengths 128 512 --output-path speed.json --plot speed.png
    python -m scripts.bench_model models/Llama-2-7b-hf --del-block-num 0 5 10 \\
        --ppl-search-file ppls/Llama-2-7b-hf_mix_alpaca_ns_256_del_order_list.json
"""

import argparse
import contextlib
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

from scripts import ending, flags

SEED = 42  # of the prompts' tokens


class Subject(NamedTuple):
    """A model to measure; with a decoder, one that runs without the blocks in `removed`."""

    name: str
    path: str
    model: Any
    decoder: Any = None
    removed: tuple = ()

    def alone(self):
        """Within this context the model runs as it is to be measured."""
        return self.decoder.masked(self.removed) if self.removed else contextlib.nullcontext()

    def cache(self):
        """Return an empty KV cache, None for the one that the model makes itself."""
        from lib.measure import cache_without

        return cache_without(self.model.config, self.removed) if self.removed else None

    def generate(self, ids, new_tokens):
        from lib.measure import generate

        with self.alone():
            return generate(self.model, ids, new_tokens, self.cache())


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder, or .gguf file")
    flags.add_compute_flags(parser)
    parser.add_argument("--ppl-search-file", default=None, help="order file of the one MODEL, for --del-block-num")
    parser.add_argument(
        "--del-block-num",
        type=flags.count,
        nargs="+",
        metavar="K",
        default=None,
        help="removals to compare; 0 is the dense model",
    )
    parser.add_argument(
        "--batch-sizes", type=flags.positive, nargs="+", metavar="N", default=[1, 8], help="prompts at a time"
    )
    parser.add_argument(
        "--prompt-lengths", type=flags.positive, nargs="+", metavar="N", default=[128, 512], help="tokens a prompt"
    )
    parser.add_argument("--new-tokens", type=flags.positive, default=32, help="tokens each; the first by the prefill")
    parser.add_argument("--repeats", type=flags.positive, default=5, help="timed turns of each model")
    parser.add_argument("--threads", type=flags.positive, default=None, help="CPU threads; torch's choice when absent")
    parser.add_argument("--output-path", default=None, help="result file (.json) with the seconds of every turn")
    parser.add_argument(
        "--cost-file",
        default=None,
        help="file (.json) for the seconds of one attention and one MLP of the one MODEL, for block_search.py",
    )
    parser.add_argument("--plot", default=None, help="picture (.png) of tokens per second")
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error("--new-tokens 1: the prefill gives the first token; decoding needs 2 or more")
    if bool(args.ppl_search_file) != (args.del_block_num is not None):
        parser.error("give both --ppl-search-file (which blocks) and --del-block-num (how many), or neither")
    if args.ppl_search_file and len(args.models) > 1:
        parser.error(f"--ppl-search-file: an order belongs to one model, {len(args.models)} are given")
    if args.cost_file and (len(args.models) > 1 or args.ppl_search_file):
        parser.error("--cost-file: of one whole MODEL; give one, and no order")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    import torch

    from lib.files import to_json
    from lib.measure import device_name, interleaved
    from lib.model import default_device, dtype_note, versions
    from lib.schema import write

    args.device = args.device or default_device()
    if args.threads:
        torch.set_num_threads(args.threads)
    with parser.user_errors():  # everything that can fail fails before weights are read
        vocabulary, removals, meta = vocabulary_and_removals(args)
        subjects = load(args, removals)
    if removals:
        flags.warn_of_order(first_of(args), meta, removals[max(removals)])
    print(
        f"compute       {args.device} ({device_name(args.device)}), {args.compute_dtype}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    if args.ppl_search_file:
        print(f"model         {args.models[0]} without the first K blocks of {args.ppl_search_file}")
    print(f"generating    {args.new_tokens} tokens greedily after random prompts, {args.repeats} times and once before")

    shape = max(args.batch_sizes), max(args.prompt_lengths)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(SEED))
    ids = ids.to(subjects[0].model.get_input_embeddings().weight.device)
    speeds = {subject.name: [] for subject in subjects}
    for B in args.batch_sizes:
        for T in args.prompt_lengths:
            start = time.perf_counter()
            turns = {s.name: functools.partial(s.generate, ids[:B, :T], args.new_tokens) for s in subjects}
            for name, runs in interleaved(turns, args.repeats).items():
                speeds[name].append(summarise(B, T, args.new_tokens, runs))
            print(f"timed         batch {B}, prompt {T}: {time.perf_counter() - start:.1f} s", flush=True)
    models = [{**describe(subject, ids, args.device), "speed": speeds[subject.name]} for subject in subjects]
    print()
    print_sizes(models, *shape)
    print()
    print_speeds(models)
    summary = {
        "device": args.device,
        "device_name": device_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.compute_dtype,
        "order_file": args.ppl_search_file,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "warm_up": 1,
        "seed": SEED,
        "versions": versions(),
        "models": models,
    }
    if args.cost_file:
        with parser.user_errors():
            summary["block_seconds"] = write_cost_file(args, subjects[0].model, ids)
    if args.output_path:
        write(args.output_path, "bench", summary)
    if args.plot:
        from lib.report import pictures

        pictures.save(pictures.draw(pictures.speeds(summary)), args.plot)
    print(to_json(summary))


def write_cost_file(args, model, ids):
    """Measure one attention and one MLP on ids (B, T), write --cost-file and return what it holds."""
    from lib.costs import BlockSeconds, block_seconds
    from lib.decoder import Decoder
    from lib.files import write_json
    from lib.hub import fingerprint
    from lib.measure import device_name

    decoder = Decoder(model)
    mha, mlp, rest = block_seconds(decoder, ids, args.new_tokens, args.repeats)
    about = fingerprint(args.models[0]), device_name(args.device), args.compute_dtype, decoder.n_layers
    seconds = BlockSeconds(*about, (*ids.shape, args.new_tokens), mha, mlp, rest)._asdict()
    write_json(args.cost_file, seconds)
    print(f"block         an attention takes {1e3 * mha:.3f} ms, an MLP {1e3 * mlp:.3f} ms -> {args.cost_file}")
    return seconds


def vocabulary_and_removals(args):
    """Raise ValueError for what flags, files and configurations already tell.

    Returns (size of the smallest vocabulary, {K: blocks that go} of the order or None, its meta).
    """
    from lib.model import DTYPES, check_device, parameter_count, skeleton

    with flags.naming("--device"):
        check_device(args.device)
    flags.check_file(args.output_path, "--output-path", kind="bench")
    flags.check_file(args.cost_file, "--cost-file")
    check_plot(args.plot)
    with flags.naming("MODEL"):
        bare = [skeleton(path, args.trust_remote_code) for path in args.models]
    most = max(args.prompt_lengths) + args.new_tokens
    for path, model in zip(args.models, bare, strict=True):
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions and most > positions:
            raise ValueError(
                f"--prompt-lengths {max(args.prompt_lengths)} --new-tokens {args.new_tokens}: {path} has "
                f"{positions} positions; use {positions} tokens or fewer in all"
            )
    removals, meta = read_removals(args, bare[0]) if args.ppl_search_file else (None, {})
    need, free = sum(map(parameter_count, bare)) * DTYPES[args.compute_dtype].itemsize, free_memory(args.device)
    if need > free:
        raise ValueError(
            f"MODEL {' '.join(args.models)}: {need / 2**30:,.1f} GiB of weights in {args.compute_dtype}, but "
            f"{free / 2**30:,.1f} GiB are free on {args.device}; compare fewer models at a time, or in a "
            "smaller --compute-dtype"
        )
    return min(model.config.get_text_config().vocab_size for model in bare), removals, meta


def check_plot(path):
    """Raise ValueError unless a picture can be drawn at `path`, None for no picture."""
    import importlib.util

    flags.check_file(path, "--plot", ".png")
    if path and Path(path).suffix != ".png":
        raise ValueError(f"--plot {path}: pictures are .png files; give a name that ends so")
    if path and not importlib.util.find_spec("matplotlib"):
        raise ValueError(f"--plot {path}: needs matplotlib; install it, or leave --plot out")


def read_removals(args, bare):
    """Return ({K: blocks that go}, meta); raise ValueError where the order, or a K, does not fit the model `bare`."""
    from lib.decoder import find_layers

    one = first_of(args)
    order, meta = flags.read_removals(one)
    removals, n_layers = {}, len(find_layers(bare))
    for one.del_block_num in sorted(args.del_block_num):
        removals[one.del_block_num] = tuple(flags.check_removals(one, order, meta, bare))
    if sum(block.kind == "mha" for block in removals[one.del_block_num]) == n_layers:
        raise ValueError(
            f"--del-block-num {one.del_block_num}: removes all {n_layers} attentions, so there is no KV "
            "cache to decode with; use fewer"
        )
    return removals, meta


def first_of(args):
    """Return the flags of the first model without the most of its blocks, as other scripts name them."""
    return argparse.Namespace(
        model_path=args.models[0],
        model_flag="MODEL",
        ppl_search_file=args.ppl_search_file,
        target_ratio=None,
        remove=None,
        del_block_num=max(args.del_block_num),
    )


def free_memory(device):
    """Return the bytes free where models will be: plain "cuda" spreads a large one over all visible GPUs."""
    import torch

    from lib.memory import free_bytes

    if device == "cuda":
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return free_bytes(device)[0]


def load(args, removals):
    """Return the Subjects; with an order they share one model's weights."""
    from lib.decoder import Decoder
    from lib.model import load_model

    with flags.naming("MODEL"):
        models = [load_model(path, args.compute_dtype, args.device, args.trust_remote_code) for path in args.models]
    if removals is None:
        return [Subject(*named) for named in zip(names(args.models), args.models, models, strict=True)]
    decoder, counts = Decoder(models[0]), dict.fromkeys(args.del_block_num)
    return [Subject(f"K = {K}", args.models[0], models[0], decoder, removals[K]) for K in counts]


def names(paths):
    """Return a name for each path: its last part, the whole where that is not unique, numbered if given twice."""
    short = [Path(path).name for path in paths]
    long = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    return [name if long.count(name) == 1 else f"{name} ({long[:i].count(name) + 1})" for i, name in enumerate(long)]


def summarise(B, T, new_tokens, runs):
    """Return what a list of Runs at one batch size and prompt length says, as a dict for the result file."""
    from lib.measure import spread

    prefill, decode = [run.prefill_seconds for run in runs], [run.decode_seconds for run in runs]
    return {
        "batch_size": B,
        "prompt_length": T,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "first_token_seconds": spread(prefill)._asdict(),
        "prefill_tokens_per_second": spread([B * T / s for s in prefill])._asdict(),
        "decode_tokens_per_second": spread([B * (new_tokens - 1) / s for s in decode])._asdict(),
        "kv_cache_bytes": runs[0].cache_bytes,
    }


def describe(subject, ids, device):
    """Return a model's sizes as a dict for the result file.

    peak_bytes: the weights, and the most that the prefill of ids (B, T) and the choice of a first token add.
    """
    from lib.measure import count_kv, kv_per_token, peak_memory, weight_bytes
    from lib.model import parameter_count

    with subject.alone():
        model, weights, kv = subject.model, weight_bytes(subject.model), count_kv(subject.model)
        return {
            "name": subject.name,
            "path": subject.path,
            "model_class": type(model).__name__,
            "removed": [str(block) for block in subject.removed],
            "parameters": parameter_count(model),
            "weight_bytes": weights,
            "kv_bytes_per_token": kv and kv.per_token,
            "kv_bytes_per_token_measured": kv_per_token(model, subject.cache),
            "kv_sliding_bytes_per_token": kv and kv.sliding,
            "sliding_window": kv and kv.window,
            "peak_bytes": weights + peak_memory(lambda: subject.generate(ids, 1), device),
        }


def print_sizes(models, B, T):
    columns = {  # title: (key, divided by, format)
        "parameters": ("parameters", 1, ",.0f"),
        "weights MiB": ("weight_bytes", 2**20, ",.1f"),
        "KV bytes/token": ("kv_bytes_per_token", 1, ",.0f"),
        "KV measured": ("kv_bytes_per_token_measured", 1, ",.0f"),
        f"peak MiB at {B} x {T}": ("peak_bytes", 2**20, ",.1f"),
    }
    rows = [["model", *(cell for title in columns for cell in (title, ""))]]
    for model in models:
        rows.append([model["name"]])
        for key, unit, form in columns.values():
            value = model[key]
            rows[-1] += ["-" if value is None else format(value / unit, form), times(value, models[0][key])]
    flags.print_aligned(rows)
    for model in models:
        if model["kv_sliding_bytes_per_token"]:
            print(
                f"{model['name']}: {model['kv_sliding_bytes_per_token']:,} of its KV bytes/token stop growing at a "
                f"window of {model['sliding_window']:,} tokens"
            )


def print_speeds(models):
    spread = "min..max", ""
    rows = [["model", "batch", "prompt", "prefill tok/s", *spread, "first token ms", "decode tok/s", *spread]]
    for i, first in enumerate(models[0]["speed"]):
        for model in models:
            speed = model["speed"][i]
            cells = [model["name"], str(speed["batch_size"]), str(speed["prompt_length"])]
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
                s = speed[key]
                cells += [f"{s['median']:,.1f}", f"{s['low']:,.1f}..{s['high']:,.1f}"]
                cells += [times(s["median"], first[key]["median"])]
            cells.insert(6, f"{1000 * speed['first_token_seconds']['median']:,.1f}")
            rows.append(cells)
    flags.print_aligned(rows)


def times(value, base):
    return f"{value / base:.2f}x" if value is not None and base else "-"


if __name__ == "__main__":
    ending.run(main)
