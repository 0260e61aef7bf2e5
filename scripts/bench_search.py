"""Time the search engines against each other: same model, same text, same K, one process.

Engines take turns removal by removal, so that a noisy machine slows all of them; one evaluation before
is warm-up. Each engine that keeps states gets an equal share of the memory that one alone would take.
Peak memory is the most that a removal adds. Seconds are medians over --rounds. Orders and scores are
compared with cached, or with exhaustive, over the removals that both made. The formula row of an order
is what sharing work can give: exhaustive n^2 against n^2 (1 - x^2) / 2 for n blocks left and the last
removal at the fraction x of the depth.

    python -m scripts.bench_search --model-path SmolLM2-135M-Instruct.Q4_1.gguf --cal-dataset alpaca \\
        --data-dir data --cal-nsamples 8 --ppl-eval-seqlen 512 --del-block-num 12
    python -m scripts.bench_search --random-config llama2-7b --device cuda --tokens 32768 --del-block-num 20
"""

import math
import statistics
import time

from scripts import ending, flags

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
}


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--random-config", choices=tuple(SHAPES), help="random weights of this shape, random tokens")
    parser.add_argument("--scale", type=flags.positive, default=1, help="divide the random shape's widths by this")
    parser.add_argument("--tokens", type=flags.positive, default=32768, help="random tokens of --random-config")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=8)
    parser.add_argument("--cal-nsamples", type=flags.positive, default=8, help="documents to draw")
    parser.add_argument("--del-block-num", type=flags.positive, default=12, help="removals to time")
    parser.add_argument("--block-type", choices=("mha", "mlp", "mix"), default="mix", help="blocks to search")
    engines = ("exhaustive", "cached", "race", "streamed")
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines[:3], help="engines to time")
    parser.add_argument("--rounds", type=flags.positive, default=1, help="times everything is run; medians are shown")
    parser.add_argument(
        "--exhaustive-steps",
        type=flags.positive,
        default=None,
        help="time so many exhaustive removals, scale by the block forwards of all",
    )
    flags.add_engine_flags(parser)
    parser.add_argument("--race-batch-size", type=flags.positive, default=1, help="windows per decision of the race")
    parser.add_argument("--output-path", help="result file (.json)", default=None)
    args = parser.parse_args(argv)
    args.engines = list(dict.fromkeys(args.engines))
    if bool(args.model_path) == bool(args.random_config):
        parser.error("give either --model-path or --random-config")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.evaluate import window_losses
    from lib.files import to_json
    from lib.measure import device_name
    from lib.model import parameter_count, versions
    from lib.schema import write
    from lib.search import NoFiniteCandidate

    with parser.user_errors():
        flags.check_file(args.output_path, "--output-path", kind="bench")
        decoder, windows = random_model(args) if args.random_config else real_model(args)
    blocks, K = decoder.blocks(args.block_type), args.del_block_num
    if K >= len(blocks):
        parser.error(f"--del-block-num {K}: {len(blocks)} blocks; use 1..{len(blocks) - 1}")
    name, size = args.model_path or args.random_config, parameter_count(decoder.model)
    print(f"model    {name} / {args.scale}: {size:,} parameters, {args.device}, {args.compute_dtype}")
    print(f"text     {len(windows)} windows of {windows.shape[1]} = {windows.numel():,} tokens, K = {K}", flush=True)

    if args.cache_gb is None:
        from lib.memory import rooms

        keeping = sum(name != "exhaustive" for name in args.engines)
        args.cache_gb = sum(rooms(decoder.devices).values()) / max(1, keeping) / 2**30
    with parser.full_gpu("take a smaller --cache-gb, a smaller --ppl-eval-batch-size, or fewer --engines at a time"):
        for batch_size in {args.ppl_eval_batch_size, args.race_batch_size}:
            window_losses(decoder, windows[:batch_size], batch_size)
        try:
            rounds = [interleave(args, decoder, blocks, windows) for _ in range(args.rounds)]
        except NoFiniteCandidate as error:
            parser.error(f"{error}{flags.try_fp32(args)}")
    n, total = len(blocks), len(decoder.blocks())
    results = {name: summarise(name, args, [r[name] for r in rounds], n, total) for name in args.engines}
    orders = {name: [str(s.block) for s in rounds[0][name]] for name in args.engines}
    flops = block_flops(decoder, windows.shape[1])
    peak = matrix_peak(args) if str(args.device).startswith("cuda") else None
    base = results.get("exhaustive")
    for name, result in results.items():
        result["peak_memory_mib"] = max(step.peak_memory for step in rounds[0][name]) / 2**20
        result["tokens_per_second"] = result["evaluated_tokens"] / result["seconds"]
        result["tflops"] = sum(flops[k] * n for k, n in result.pop("forwards").items()) / 1e12
        result["tflops_per_second"] = result["tflops"] / result["seconds"]
        if peak:
            result["share_of_matrix_peak"] = result["tflops_per_second"] / peak
        if base:
            result["speedup"] = base["seconds"] / result["seconds"]
            result["fewer_block_forwards"] = base["block_forwards"] / result["block_forwards"]
        result |= compared(name, rounds[0])
        result["order"] = orders[name]
        result["perplexities"] = [s.score for s in rounds[0][name]]
    whole = [steps for name, steps in rounds[0].items() if name != "race" and len(steps) == K]
    formula = formula_ratio([s.block for s in whole[0]], blocks, decoder) if whole else None
    print_table(results)
    if formula:
        print(f"formula  {formula:.2f} times fewer block forwards for this order, with everything kept")
    summary = {
        "model": args.model_path or args.random_config,
        "scale": args.scale,
        "device": device_name(args.device),
        "dtype": args.compute_dtype,
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "K": K,
        "batch_size": args.ppl_eval_batch_size,
        "cache_gb": args.cache_gb,
        "rounds": args.rounds,
        "formula_ratio": formula,
        "matrix_peak_tflops_per_second": peak,
        "versions": versions(),
        "engines": results,
    }
    if args.output_path:
        write(args.output_path, "bench", summary)
    print(to_json(summary))


def searching(args, name, decoder, blocks, windows):
    """Return the generator of Steps of one engine."""
    from lib.engines import ENGINES
    from lib.search import greedy

    racing = name == "race"
    B = args.race_batch_size if racing else args.ppl_eval_batch_size
    options = {} if name == "exhaustive" else {"cache_bytes": int(args.cache_gb * 2**30)}
    engine = ENGINES["cached" if racing else name](decoder, blocks, windows, B, **options)
    return greedy(engine, blocks, args.del_block_num, confidence=args.race_confidence if racing else math.inf)


def interleave(args, decoder, blocks, windows):
    """Run the engines removal by removal in turns; return {engine: [Step with forwards per kind]}."""
    from lib.measure import peak_memory, synchronize

    def take(name):
        before, start = decoder.counts.copy(), time.perf_counter()
        step = next(running[name])
        synchronize(args.device)
        steps[name].append(Timed(step, time.perf_counter() - start, decoder.counts - before))

    running = {name: searching(args, name, decoder, blocks, windows) for name in args.engines}
    steps = {name: [] for name in args.engines}
    for k in range(args.del_block_num):
        for name in args.engines:
            if name == "exhaustive" and args.exhaustive_steps and k >= args.exhaustive_steps:
                continue
            memory = peak_memory(lambda e=name: take(e), args.device)
            step, seconds = steps[name][-1], steps[name][-1].seconds
            step.peak_memory = memory
            print(f"{k + 1:4d}  {name:10s} {step.block!s:6s} {step.score:12.4f} {seconds:9.2f} s", flush=True)
    return steps


class Timed:
    """A Step, its wall seconds with the device synchronised, its forwards by kind, and its peak memory."""

    def __init__(self, step, seconds, forwards):
        self.block, self.scores, self.windows = step.block, step.scores, step.windows
        self.score, self.peak_memory = step.score, None
        self.block_forwards, self.head_forwards = step.block_forwards, step.head_forwards
        self.seconds, self.forwards = seconds, forwards


def compared(name, steps):
    """Return whether an engine's order and scores are those of another, exact one; None where none ran beside it.

    perplexity_off_percent: how much higher the perplexity is after the last removal that both made.
    """
    other = next((e for e in ("cached", "exhaustive", "streamed") if e != name and e in steps), None)
    both = list(zip(steps[name], steps.get(other, ()), strict=False))
    if not both:
        return {
            "compared_with": None,
            "removals_compared": 0,
            "same_order": None,
            "same_scores": None,
            "perplexity_off_percent": None,
        }
    return {
        "compared_with": other,
        "removals_compared": len(both),
        "same_order": all(a.block == b.block for a, b in both),
        "same_scores": all(a.scores == b.scores for a, b in both),
        "perplexity_off_percent": 100 * (both[-1][0].score / both[-1][1].score - 1),
    }


def summarise(name, args, runs, n, total):
    """Return seconds (median of runs), forwards and evaluations of one engine, scaled up where steps were left out.

    n: candidates at the start; total: blocks of the model. Removal k is n - k evaluations of total - k - 1
    blocks each; seconds are scaled as block forwards are, which is a little less than evaluations would give.
    """
    steps, K = runs[0], args.del_block_num
    heads = sum(n - k for k in range(K)) / sum(n - k for k in range(len(steps)))
    factor = sum((n - k) * (total - k - 1) for k in range(K))
    factor /= sum((n - k) * (total - k - 1) for k in range(len(steps)))
    return {
        "seconds": factor * statistics.median(sum(s.seconds for s in run) for run in runs),
        "block_forwards": factor * sum(s.block_forwards for s in steps),
        "head_forwards": heads * sum(s.head_forwards for s in steps),
        "evaluated_tokens": heads * sum(s.head_forwards for s in steps) * args.ppl_eval_seqlen,
        "forwards": {
            kind: scale * sum(s.forwards[kind] for s in steps)
            for kind, scale in (("mha", factor), ("mlp", factor), ("head", heads))
        },
        "steps_timed": len(steps),
        "scaled_by": factor,
    }


def formula_ratio(order, blocks, decoder):
    """Return exhaustive over cached block forwards by the formula, for the depth positions of this order."""
    depth = sorted(blocks, key=lambda b: (b.layer, b.kind))
    exhaustive = shared = 0.0
    x = 0.0
    for block in order:
        n = len(depth)
        exhaustive += n * n
        shared += n * n * (1 - x * x) / 2
        p = depth.index(block)
        depth.remove(block)
        x = p / len(depth)
    return exhaustive / shared


def block_flops(decoder, T):
    """Return forward FLOPs of one window: {"mha", "mlp", "head"}: 2 per weight and token, causal attention scores.

    Of experts those count that a token goes through.
    """
    from lib.blocks import Block

    L, config = decoder.n_layers, decoder.model.config
    flops = {kind: sum(decoder.block_parameters([Block(kind, i)]) for i in range(L)) / L for kind in ("mha", "mlp")}
    experts = sum(p.numel() for name, p in decoder.layers.named_parameters() if ".experts." in name) / L
    if experts:
        names = "num_local_experts", "num_experts", "n_routed_experts"
        n = next(n for name in names if (n := getattr(config, name, None)))
        flops["mlp"] -= experts * (1 - config.num_experts_per_tok / n)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    head = config.vocab_size * config.hidden_size
    return {"mha": 2 * flops["mha"] * T + 2 * width * T * T, "mlp": 2 * flops["mlp"] * T, "head": 2 * head * T}


def random_model(args):
    """Return (Decoder, windows): random weights of a published shape, made on the device, and random tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lib.decoder import Decoder
    from lib.model import DTYPES, check_device, default_device

    args.device = args.device or default_device()
    with flags.naming("--device"):
        check_device(args.device)
    shape, s = SHAPES[args.random_config], args.scale
    hidden, intermediate, layers, heads, kv_heads, vocab = (n if k == 2 else n // s for k, n in enumerate(shape))
    heads, kv_heads = max(1, heads), max(1, kv_heads)
    if hidden < 2 or hidden % (2 * heads) or heads % kv_heads:
        raise ValueError(f"--scale {s}: {shape[0]} dimensions and {shape[3]} heads do not divide so; use 2, 4, 8 or 16")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=max(4096, args.ppl_eval_seqlen),
    )
    flags.check_seqlen(config, args.ppl_eval_seqlen)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.compute_dtype]).eval().requires_grad_(False)
    n = max(1, args.tokens // args.ppl_eval_seqlen)
    generator = torch.Generator().manual_seed(args.seed)
    return Decoder(model), torch.randint(config.vocab_size, (n, args.ppl_eval_seqlen), generator=generator)


def real_model(args):
    """Return (Decoder, windows) of --model-path and --cal-dataset, as block_search.py reads them."""
    bare = flags.open_bare(args)
    text = flags.open_text(args, flags.open_tokenizer(args), bare)
    return flags.open_decoder(args, text.windows), text.windows


def matrix_peak(args, n=8192):
    """Return the TFLOP/s of a large square matrix product in this dtype on this device, the best of 10."""
    import torch

    from lib.measure import synchronize
    from lib.model import DTYPES

    a, b = (torch.randn(n, n, device=args.device, dtype=DTYPES[args.compute_dtype]) for _ in range(2))
    best = math.inf
    for _ in range(10):
        synchronize(args.device)
        start = time.perf_counter()
        a @ b
        synchronize(args.device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def print_table(results):
    rows = ["engine seconds speed-up block-forwards fewer head-forwards tokens/s peak-MiB order scores ppl-off".split()]
    for name, r in results.items():
        rows.append(
            [
                name + ("*" if r["scaled_by"] > 1 else ""),
                f"{r['seconds']:.1f}",
                f"{r['speedup']:.2f}x" if "speedup" in r else "-",
                f"{r['block_forwards']:,.0f}",
                f"{r['fewer_block_forwards']:.2f}x" if "fewer_block_forwards" in r else "-",
                f"{r['head_forwards']:,.0f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['peak_memory_mib']:,.0f}",
                told(r, "same_order", "DIFFERS"),
                told(r, "same_scores", "differ"),
                "-" if r["perplexity_off_percent"] is None else f"{r['perplexity_off_percent']:+.3f}%",
            ]
        )
    flags.print_aligned(rows)
    if any(r["scaled_by"] > 1 for r in results.values()):
        print("* timed on its first removals and scaled by the exact number of block forwards")


def told(result, key, otherwise):
    """Return how a comparison is printed, with the removals that were compared where they are not all."""
    if result[key] is None:
        return "-"
    whole = result["scaled_by"] == 1 and result["removals_compared"] == result["steps_timed"]
    part = "" if whole else f" ({result['removals_compared']})"
    return ("same" if result[key] else otherwise) + part


if __name__ == "__main__":
    ending.run(main)
