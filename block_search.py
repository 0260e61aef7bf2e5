"""Find the order in which a language model can lose its attention (mha) and MLP blocks.

Each step masks every remaining block in turn and removes the one whose absence leaves the lowest
perplexity on calibration text (BlockPruner, arXiv 2406.10594). The order is written after every
removal; a run that was cut short continues where it stopped.

    python block_search.py --model-path models/Llama-2-7b-hf --device cuda --del-block-num 20 \\
        --cal-dataset alpaca --cal-nsamples 256

--metric writes the same file by another method: the search with the divergence from the dense model in
place of perplexity (kl), one judgement of every block or layer (lib/importance.py), or the best run of
consecutive layers. --block-type layer removes whole layers; the file counts each as its two blocks.

    python block_search.py --model-path models/Llama-2-7b-hf --metric bi --block-type layer --target-ratio 0.2
"""

import contextlib
import hashlib
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

from scripts import flags

# Settings that decide the order: a file searched with others is not continued. Exact engines give the same.
SETTINGS = (
    "model",
    "metric",
    "block_type",
    "protect_first",
    "protect_last",
    "window",
    "dataset",
    "split",
    "text_column",
    "seed",
    "documents",
    "seqlen",
    "batch_size",
    "dtype",
    "device",
    "approximate",
    "race_confidence",
    "text_sha256",
    "weights",
)
# what files without these settings were made with
BEFORE = {"metric": "ppl", "protect_first": 0, "protect_last": 0, "approximate": False}

GREEDY = ("ppl", "kl")  # searched: judged again after each removal
ONE_SHOT = ("ppl-oneshot", "kl-oneshot", "bi", "rm", "taylor", "magnitude", "last", "random")  # judged once
WINDOWS = ("angular", "window_ppl", "window_cos")  # one run of consecutive layers
PASSES = {"bi": 1, "rm": 1, "angular": 1, "window_cos": 1, "taylor": 3, "magnitude": 0, "last": 0, "random": 0}


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--ppl-search-path", default="ppls", help="folder of the order file; made when missing")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--del-block-num", type=flags.count, default=0, help="blocks to remove")
    amount.add_argument(
        "--target-ratio",
        type=flags.share,
        default=None,
        help="remove the fewest that reach this share of all parameters",
    )
    parser.add_argument(
        "--block-type",
        choices=("mha", "mlp", "mix", "layer"),
        default="mix",
        help="blocks to search; layer: both of a layer together, counted as two",
    )
    parser.add_argument(
        "--metric",
        choices=(*GREEDY, *ONE_SHOT, *WINDOWS),
        default="ppl",
        help="what makes a block dispensable; ppl and kl are searched step by step, the last three "
        "take one run of consecutive layers, the others judge every block once",
    )
    parser.add_argument("--protect-first", type=flags.count, default=0, help="lowest layers to keep whole")
    parser.add_argument("--protect-last", type=flags.count, default=0, help="topmost layers to keep whole")
    parser.add_argument("--cal-nsamples", type=flags.positive, default=128, help="documents to draw (not windows)")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=None)
    parser.add_argument(
        "--search",
        choices=("cached", "race", "exhaustive"),
        default="cached",
        help="cached: the exact order, shared work; race: approximate, faster; exhaustive: the paper's",
    )
    parser.add_argument(
        "--cache-gb",
        type=flags.size,
        default=None,
        help="memory for kept states, GiB; a share of what is free when absent",
    )
    parser.add_argument(
        "--race-confidence",
        type=flags.size,
        default=flags.RACE_CONFIDENCE,
        help="race: standard errors behind the leader at which a candidate drops out",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="the layers' weights visit the device one by one: for a model that does not fit; exact",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an order searched with other settings")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and how long; write nothing")
    args = parser.parse_args(argv)
    args.ppl_eval_batch_size = flags.search_batch_size(args)
    if args.offload:
        if args.search == "race":
            parser.error("--offload walks all candidates through each layer and cannot race; drop --search race")
        args.search = "streamed"
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    if args.block_type == "layer" and args.del_block_num % 2:
        parser.error(
            f"--del-block-num {args.del_block_num}: --block-type layer removes two blocks a layer; give an even number"
        )
    if args.metric in WINDOWS and args.block_type != "layer":
        parser.error(f"--metric {args.metric} removes whole layers; add --block-type layer")
    if args.metric not in GREEDY and args.search in ("race", "exhaustive"):
        parser.error(f"--search {args.search}: --metric {args.metric} does not search; drop --search")
    if args.metric == "taylor" and args.offload:
        parser.error(
            "--metric taylor: needs gradients, which offloaded layers do not have; drop --offload, or take "
            "another metric"
        )
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    from lib import orders
    from lib.decoder import Decoder
    from lib.evaluate import perplexity, window_losses
    from lib.files import to_json
    from lib.importance import check_weights
    from lib.model import default_device, dtype_note, load_model, load_tokenizer, parameter_count
    from lib.search import NoFiniteCandidate

    args.device = args.device or default_device()
    with parser.user_errors():  # everything that can fail fails before weights are read
        plan = check(args)
        path = orders.order_path(
            args.ppl_search_path,
            args.model_path,
            args.block_type,
            args.cal_dataset,
            args.cal_nsamples,
            metric_name(args, plan),
        )
        tokenizer = load_tokenizer(args.model_path, args.trust_remote_code)
        corpus, _, windows = flags.read_windows(args, tokenizer)
        fresh = describe(args, corpus, windows, plan)
        order, meta = resume(path, fresh, args.overwrite)
        if plan.enough(order) and not args.dry_run:
            print(f"nothing to do: {path} holds {len(order)} removals searched with these settings")
            print_summary(path, order[: plan.enough(order)], meta)
            return
        if args.metric not in GREEDY:  # judged at once: nothing to continue
            order, meta = [], fresh
        model = load_model(args.model_path, args.compute_dtype, args.device, args.trust_remote_code, args.offload)
        flags.check_tokens(windows, model)
        decoder = Decoder(model)
        if decoder.offloaded and args.metric in GREEDY and not args.offload:
            raise ValueError(
                f"--device {args.device}: the GPUs cannot hold the model, and layers in the host's memory "
                "would be moved for every candidate; pass --offload, which moves each once for all (from "
                "a folder, not a .gguf)"
            )
        if args.metric in ("magnitude", "taylor"):
            check_weights(decoder, plan.units, f"--metric {args.metric}", inside=args.metric == "taylor")
    blocks, evaluations = len(plan.units) * plan.size, count_evaluations(args, plan, len(order))
    how = f"engine {args.search}" if args.metric in GREEDY else "judged at once"
    print(f"model         {args.model_path}: {parameter_count(model):,} parameters, {len(plan.layers)} layers")
    print(f"compute       {args.device}, {args.compute_dtype}, metric {args.metric}, {how}")
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    print(
        f"calibration   {meta['documents']} documents of {corpus.source} ({corpus.split or 'whole file'}), "
        f"{len(windows)} windows of {args.ppl_eval_seqlen} = {windows.numel():,} tokens"
    )
    amount = f"{plan.most}" if args.target_ratio is None else f"{100 * args.target_ratio:g} %, at most {plan.most}"
    print(f"search        {amount} of {blocks} {args.block_type} blocks, {evaluations:,} evaluations -> {path}")
    if order:
        print(f"resuming      {len(order)} removals are done: {' '.join(map(str, order))}")

    start = time.perf_counter()
    with full_gpu_told(args, path, order):
        dense = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
    seconds = time.perf_counter() - start
    print(f"dense         perplexity {dense:.4f}, one evaluation takes {seconds:.2f} s")
    if args.dry_run:
        # sharing the layers before each candidate alone halves them; kept states save more
        whole = args.search == "exhaustive" or evaluations <= PASSES["taylor"]
        estimate = seconds * evaluations * (1 if whole else 0.5)
        less = "" if whole else " or less"
        print(f"estimate      {timedelta(seconds=round(estimate))}{less} for the whole search; nothing written")
        print(
            to_json(
                {
                    "dry_run": True,
                    "blocks": blocks,
                    "windows": len(windows),
                    "tokens": windows.numel(),
                    "evaluations": evaluations,
                    "estimated_seconds": estimate,
                    "dense_perplexity": dense,
                }
            )
        )
        return
    if not math.isfinite(dense):
        print(f"warning: the dense model's perplexity is {dense}; try --compute-dtype fp32", file=sys.stderr)
    meta["dense_perplexity"] = dense

    before = len(order)
    with full_gpu_told(args, path, order, searching=True), progress(evaluations * len(windows)) as bar:
        try:
            extend(args, plan, decoder, windows, path, order, meta, bar)
        except NoFiniteCandidate as error:
            bar.close()
            sys.exit(
                f"block_search.py: error: step {len(order) + 1}: {error}; the {len(order)} removals before it "
                f"are in {path}; try --compute-dtype fp32"
            )
    if len(order) > before and args.metric != "ppl":
        print(f"perplexity    {dense:.4f} -> {meta['steps'][-1]['perplexity']:.4f} on the calibration text")
    draw(path, order, meta)
    print_summary(path, order, meta)


@contextlib.contextmanager
def full_gpu_told(args, path, order, searching=False):
    """Within this context a full GPU ends the program with one line, which says how to go on."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        greedy = searching and args.metric in GREEDY
        kept = len(order) if greedy else 0  # what is judged at once is kept at its end
        exact = args.search in ("cached", "exhaustive") and args.metric != "taylor"
        ways = ["a smaller --cache-gb"] * (greedy and args.search != "exhaustive")
        ways += ["--offload"] * (exact and not args.model_path.endswith(".gguf"))
        less = "--ppl-eval-seqlen" if searching and args.metric == "taylor" else "--ppl-eval-batch-size"
        ways.append(f"a smaller {less}" + (" (which starts anew, with --overwrite)" if kept else ""))
        where = f"; the {kept} removals before it are in {path} and are continued" if kept else ""
        sys.exit(
            f"block_search.py: error: step {len(order) + 1}: the GPU's memory is full{where}; less is needed with "
            f"{', or '.join(ways)}"
        )


def extend(args, plan, decoder, windows, path, order, meta, bar):
    """Add removals to `order` and `meta`, and to the file at `path`, until the plan has enough.

    Raises NoFiniteCandidate, also kept in the file, where no candidate is left that can go.
    """
    from lib import orders
    from lib.blocks import blocks_of
    from lib.evaluate import perplexity, window_losses
    from lib.model import parameter_count
    from lib.search import NoFiniteCandidate

    total = parameter_count(decoder.model)
    try:
        for unit, step in removals(args, plan, decoder, windows, order, meta, bar):
            for block in blocks_of([unit]):  # a layer is two removals; what is known stands on the second
                order.append(block)
                ratio = 100 * decoder.block_parameters(order) / total
                rest = {"removed_percent": ratio, "block": block}
                meta["steps"].append({"perplexity": None, "scores": {}, "seconds": 0.0} | rest)
            meta["steps"][-1] = step | rest
            if step["perplexity"] is None and (args.metric in GREEDY or plan.enough(order)):
                losses = window_losses(decoder, windows, args.ppl_eval_batch_size, order)
                meta["steps"][-1]["perplexity"] = perplexity(losses, args.ppl_eval_seqlen)
            if args.metric in GREEDY:
                orders.save_order(path, order, meta)
            score = f"{args.metric:10s} {step.get('score', step['perplexity']):12.6g}"
            if args.metric == "ppl":
                score = f"perplexity {step['perplexity']:12.4f}"
            bar.write(
                f"{len(order):4d}/{plan.most}  {unit!s:7s} {score}  removed {ratio:6.2f} %  {step['seconds']:7.1f} s"
            )
            bad = [str(b) for b, s in step["scores"].items() if not math.isfinite(s)]
            if bad:
                bar.write(f"warning: {args.metric} not finite without {', '.join(bad)}: never removed in this step")
            if plan.enough(order):
                break
    except NoFiniteCandidate as error:
        meta["failed"] = {"error": str(error), "candidates": error.scores}
        orders.save_order(path, order, meta)
        raise
    if order and args.metric not in GREEDY:
        orders.save_order(path, order, meta)


def draw(path, order, meta):
    """Draw the candidates' scores and what went, beside the order; without matplotlib, say so."""
    from lib.report.pictures import draw_order

    try:
        for picture in draw_order(path, order, meta):
            print(f"picture       {picture}")
    except ImportError:
        print(f"note          no pictures: pip install matplotlib, then python -m scripts.report {path}")


def removals(args, plan, decoder, windows, order, meta, bar):
    """Yield (unit, step of the order file) for every removal of the metric, until the caller has enough."""
    from lib.blocks import Block
    from lib.evaluate import OBJECTIVES
    from lib.importance import METRICS, WINDOW_METRICS, ranked
    from lib.search import ENGINES, NoFiniteCandidate

    if not plan.most:
        return
    B, start = args.ppl_eval_batch_size, time.perf_counter()
    if args.metric in GREEDY:
        options = {"objective": OBJECTIVES[args.metric]}
        if args.search != "exhaustive" and args.cache_gb is not None:
            options["cache_bytes"] = int(args.cache_gb * 2**30)
        if args.search == "race":
            options["confidence"] = args.race_confidence
        done = order if plan.size == 1 else [Block("layer", i) for _, i in order[:: plan.size]]
        for step in ENGINES[args.search](
            decoder, plan.units, windows, plan.most // plan.size, done, B, bar.advance, **options
        ):
            score = {} if args.metric == "ppl" else {"score": step.perplexity, "perplexity": None}
            yield step.block, step._asdict() | score
        return
    if args.metric in WINDOWS:
        scores = WINDOW_METRICS[args.metric](
            decoder,
            plan.window,
            windows,
            batch_size=B,
            first=args.protect_first,
            last=args.protect_last,
            progress=bar.done,
        )
        meta["window_scores"] = scores
        best = next(iter(ranked(scores)), None)
        units = [] if best is None else [Block("layer", i) for i in range(best, best + plan.window)]
        value, first = dict.fromkeys(units, scores.get(best)), {}
    else:
        metric = METRICS[args.metric.removesuffix("-oneshot")]
        scores = first = metric(decoder, plan.units, windows, batch_size=B, seed=args.seed, progress=bar.done)
        units, value = ranked(scores), scores
    seconds = time.perf_counter() - start
    for unit in units:
        yield unit, {"perplexity": None, "score": value[unit], "scores": first, "seconds": seconds}
        first, seconds = {}, 0.0
    raise NoFiniteCandidate({unit: score for unit, score in scores.items() if not math.isfinite(score)})


def print_summary(path, order, meta):
    """Print the one line for machines: what the order file holds of these removals."""
    from lib.files import to_json

    steps = meta["steps"][: len(order)]
    last = steps[-1] if steps else {"perplexity": meta["dense_perplexity"], "removed_percent": 0.0}
    print(
        to_json(
            {
                "order_file": str(path),
                "order": [str(b) for b in order],
                "dense_perplexity": meta["dense_perplexity"],
                "perplexity": last["perplexity"],
                "removed_percent": last["removed_percent"],
                "seconds": sum(step["seconds"] for step in steps),
            }
        )
    )


def check(args):
    """Raise ValueError for whatever the flags, the configuration and the folders already tell; return Candidates."""
    from lib.candidates import candidates
    from lib.decoder import find_layers
    from lib.model import check_whole, parameter_count

    flags.check_folder(args.ppl_search_path, "--ppl-search-path")
    bare = flags.check_search(args)
    check_whole(bare.config, args.model_path)
    return candidates(
        find_layers(bare),
        parameter_count(bare),
        args.block_type,
        args.del_block_num,
        args.target_ratio,
        args.protect_first,
        args.protect_last,
        consecutive=args.metric in WINDOWS,
    )


def metric_name(args, plan):
    """Return the metric as the file's name tells it: orders of other windows and draws lie beside each other."""
    if args.metric == "random":
        return f"random{args.seed}"
    return args.metric if plan.window is None else f"{args.metric}{plan.window}"


def count_evaluations(args, plan, done):
    """Return how many passes of all windows the search means, at most."""
    from lib.candidates import starts

    if args.metric in GREEDY:
        return sum(len(plan.units) - k for k in range(done // plan.size, plan.most // plan.size))
    if args.metric == "window_ppl":
        return len(starts(len(plan.layers), plan.window, args.protect_first, args.protect_last))
    return PASSES.get(args.metric, len(plan.units))


def describe(args, corpus, windows, plan):
    """Return the order file's meta before the first removal."""
    from lib.hub import fingerprint

    return {
        "model": args.model_path,
        "weights": fingerprint(args.model_path),
        "layers": len(plan.layers),
        "metric": args.metric,
        "block_type": args.block_type,
        "protect_first": args.protect_first,
        "protect_last": args.protect_last,
        "window": plan.window,
        "dataset": args.cal_dataset,
        "source": corpus.source,
        "split": corpus.split,
        "text_column": args.text_column,
        "seed": args.seed,
        "documents": args.cal_nsamples,
        "windows": len(windows),
        "seqlen": args.ppl_eval_seqlen,
        "bos": args.bos,
        "tokens": windows.numel(),
        "batch_size": args.ppl_eval_batch_size,
        "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "dtype": args.compute_dtype,
        "device": args.device,
        "engine": args.search if args.metric in GREEDY else None,
        "approximate": args.search == "race",
        "race_confidence": args.race_confidence if args.search == "race" else None,
        "versions": flags.versions(),
        "steps": [],
    }


def resume(path, meta, overwrite):
    """Return (removals done, meta) of the order file at `path`, ([], meta) where there is none to continue."""
    from lib.orders import check_order, read_order

    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder, where the order file belongs; move it, or give another --ppl-search-path")
    if overwrite or not Path(path).exists():
        return [], meta
    order, old = read_order(path)
    there = BEFORE | {"weights": meta["weights"]} | old  # files of before do not tell the weights
    same = {"model"} if old.get("weights") == meta["weights"] != "not cached" else set()  # however it is spelled
    same |= {"dataset", "split", "text_column"} if old.get("text_sha256") == meta["text_sha256"] else set()
    differ = [
        f"{key} {there.get(key)!r} there, {meta[key]!r} now"
        for key in SETTINGS
        if key not in same and there.get(key) != meta[key]
    ]
    if differ:
        what = f"with other settings ({'; '.join(differ)})" if old else "and does not say how it was searched"
        raise ValueError(f"{path}: exists {what}; pass --overwrite to replace it, or give another --ppl-search-path")
    check_order(order, meta["layers"], path, old)
    steps = old.get("steps")
    fields = {"perplexity", "removed_percent", "seconds", "scores"}
    whole = isinstance(steps, list) and all(isinstance(step, dict) and fields <= step.keys() for step in steps)
    if not whole or len(steps) != len(order) or "dense_perplexity" not in old:
        raise ValueError(
            f"{path}: its meta does not hold the dense model's perplexity and one step for each removal; "
            "pass --overwrite to replace it"
        )
    old.pop("failed", None)
    return order, old | {"engine": meta["engine"]}


class progress:
    """A progress bar over candidates with the best block of the step; a plain writer of lines above it."""

    def __init__(self, total):
        from tqdm import tqdm

        every = 0.1 if sys.stderr.isatty() else 60  # seconds; a log file gets a line a minute
        self.bar = tqdm(total=total, unit="window", dynamic_ncols=True, leave=False, file=sys.stderr, mininterval=every)
        self.scores = {}

    def advance(self, block, windows, score):
        self.scores[block] = score
        best = min(self.scores, key=lambda b: (math.isnan(self.scores[b]), self.scores[b]))
        self.bar.set_postfix_str(f"best {best} {self.scores[best]:.4f}", refresh=False)
        self.bar.update(windows)

    def done(self, windows):
        self.bar.update(windows)

    def write(self, line):
        self.scores = {}
        with self.bar.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def close(self):
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


if __name__ == "__main__":
    main()
