"""Find the order in which a language model can lose its attention (mha) and MLP blocks.

Each step masks every remaining block in turn and removes the one whose absence leaves the lowest
perplexity on calibration text (BlockPruner, arXiv 2406.10594). The order is written after every
removal; a run that was cut short continues where it stopped.

    python block_search.py --model-path models/Llama-2-7b-hf --device cuda --del-block-num 20 \\
        --cal-dataset alpaca --cal-nsamples 256
"""
import hashlib
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

from scripts import flags

# Settings that decide the order: a file searched with others is not continued.
SETTINGS = (
    "model", "block_type", "dataset", "split", "text_column", "seed", "documents", "seqlen", "batch_size", "dtype",
    "device", "engine", "race_confidence", "text_sha256",
)  # fmt: skip


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--ppl-search-path", default="ppls", help="folder of the order file; made when missing")
    parser.add_argument("--del-block-num", type=flags.count, default=0, help="blocks to remove")
    parser.add_argument("--block-type", choices=("mha", "mlp", "mix"), default="mix", help="blocks to search")
    parser.add_argument("--cal-nsamples", type=flags.positive, default=128, help="documents to draw (not windows)")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=8)
    parser.add_argument("--search", choices=("cached", "race", "exhaustive"), default="cached",
                        help="cached: the exact order, shared work; race: approximate, faster; exhaustive: the paper's")
    parser.add_argument("--cache-gb", type=flags.size, default=None,
                        help="memory for kept states (cached, race), GiB; a share of what is free when absent")
    parser.add_argument("--race-confidence", type=flags.size, default=4.0,
                        help="race: standard errors behind the leader at which a candidate drops out")
    parser.add_argument("--offload", action="store_true",
                        help="the layers' weights visit the device one by one: for a model that does not fit; exact")
    parser.add_argument("--overwrite", action="store_true", help="replace an order searched with other settings")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and how long; write nothing")
    args = parser.parse_args(argv)
    if args.offload:
        if args.search == "race":
            parser.error("--offload walks all candidates through each layer and cannot race; drop --search race")
        args.search = "streamed"
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    from lib import data, orders
    from lib.blocks import Decoder
    from lib.evaluate import perplexity, window_losses
    from lib.model import default_device, dtype_note, load_model, load_tokenizer, parameter_count
    from lib.search import ENGINES, NoFiniteCandidate

    args.device = args.device or default_device()
    path = orders.order_path(
        args.ppl_search_path, args.model_path, args.block_type, args.cal_dataset, args.cal_nsamples
    )
    with parser.user_errors():  # everything that can fail fails before weights are read
        n_layers = check(args)
        corpus = data.load_documents(args.cal_dataset, args.cal_split, args.text_column, args.data_dir)
        documents = data.sample_documents(corpus.documents, args.cal_nsamples, args.seed)
        windows = data.cut_windows(
            documents, load_tokenizer(args.model_path, args.trust_remote_code), args.ppl_eval_seqlen
        )
        meta = describe(args, corpus, windows, n_layers)
        order, meta = resume(path, meta, args.overwrite)
        n = args.del_block_num
        if len(order) >= n > 0 and not args.dry_run:
            print(f"nothing to do: {path} holds {len(order)} removals searched with these settings")
            print_summary(path, order[:n], meta)
            return
        model = load_model(args.model_path, args.compute_dtype, args.device, args.trust_remote_code, args.offload)
        flags.check_tokens(windows, model)
        decoder = Decoder(model)
    blocks = decoder.blocks(args.block_type)
    evaluations = sum(len(blocks) - k for k in range(len(order), n))
    print(f"model         {args.model_path}: {parameter_count(model):,} parameters, {n_layers} layers")
    print(f"compute       {args.device}, {args.compute_dtype}, engine {args.search}")
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    print(f"calibration   {meta['documents']} documents of {corpus.source} ({corpus.split or 'whole file'}), "
          f"{len(windows)} windows of {args.ppl_eval_seqlen} = {windows.numel():,} tokens")  # fmt: skip
    print(f"search        {n} of {len(blocks)} {args.block_type} blocks, {evaluations:,} evaluations -> {path}")
    if order:
        print(f"resuming      {len(order)} removals are done: {' '.join(map(str, order))}")

    start = time.perf_counter()
    dense = perplexity(window_losses(decoder, windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
    seconds = time.perf_counter() - start
    print(f"dense         perplexity {dense:.4f}, one evaluation takes {seconds:.2f} s")
    if args.dry_run:
        # sharing the layers before each candidate alone halves them; kept states save more
        estimate = seconds * evaluations * (1 if args.search == "exhaustive" else 0.5)
        less = "" if args.search == "exhaustive" else " or less"
        print(f"estimate      {timedelta(seconds=round(estimate))}{less} for the whole search; nothing written")
        print(orders.to_json({
            "dry_run": True, "blocks": len(blocks), "windows": len(windows), "tokens": windows.numel(),
            "evaluations": evaluations, "estimated_seconds": estimate, "dense_perplexity": dense,
        }))  # fmt: skip
        return
    if not math.isfinite(dense):
        print(f"warning: the dense model's perplexity is {dense}; try --compute-dtype fp32", file=sys.stderr)
    meta["dense_perplexity"] = dense

    total = parameter_count(model)
    with progress(evaluations * len(windows)) as bar:
        options = {}
        if args.search in ("cached", "race") and args.cache_gb is not None:
            options["cache_bytes"] = int(args.cache_gb * 2**30)
        if args.search == "race":
            options["confidence"] = args.race_confidence
        engine = ENGINES[args.search](
            decoder, blocks, windows, n, order, args.ppl_eval_batch_size, bar.advance, **options
        )
        try:
            for step in engine:
                order.append(step.block)
                ratio = 100 * decoder.block_parameters(order) / total
                meta["steps"].append({**step._asdict(), "removed_percent": ratio})
                orders.save_order(path, order, meta)
                bar.write(f"{len(order):4d}/{n}  {step.block!s:6s}  perplexity {step.perplexity:12.4f}"
                          f"  removed {ratio:6.2f} %  {step.seconds:7.1f} s")  # fmt: skip
                bad = [str(b) for b, s in step.scores.items() if not math.isfinite(s)]
                if bad:
                    bar.write(f"warning: perplexity not finite without {', '.join(bad)}: never removed in this step")
        except NoFiniteCandidate as error:
            meta["failed"] = {"error": str(error), "candidates": error.scores}
            orders.save_order(path, order, meta)
            bar.close()
            sys.exit(f"block_search.py: error: step {len(order) + 1}: {error}; the {len(order)} removals before it "
                     f"are in {path}; try --compute-dtype fp32")  # fmt: skip
    draw(path, order, meta)
    print_summary(path, order, meta)


def draw(path, order, meta):
    """Draw the candidates' scores and what went, beside the order; without matplotlib, say so."""
    from lib.report import draw_order

    try:
        for picture in draw_order(path, order, meta):
            print(f"picture       {picture}")
    except ImportError:
        print("note          no pictures: pip install matplotlib, then python -m scripts.report " + str(path))


def print_summary(path, order, meta):
    """Print the one line for machines: what the order file holds of these removals."""
    from lib.orders import to_json

    steps = meta["steps"][: len(order)]
    last = steps[-1] if steps else {"perplexity": meta["dense_perplexity"], "removed_percent": 0.0}
    print(to_json({
        "order_file": str(path), "order": [str(b) for b in order], "dense_perplexity": meta["dense_perplexity"],
        "perplexity": last["perplexity"], "removed_percent": last["removed_percent"],
        "seconds": sum(step["seconds"] for step in steps),
    }))  # fmt: skip


def check(args):
    """Raise ValueError for whatever the flags, the configuration and the folders already tell; return n layers."""
    from lib.blocks import find_layers
    from lib.data import check_dataset
    from lib.model import check_device, skeleton

    check_device(args.device)
    check_dataset(args.cal_dataset, args.cal_split, args.data_dir)
    flags.check_folder(args.ppl_search_path, "--ppl-search-path")
    bare = skeleton(args.model_path, args.trust_remote_code)
    flags.check_seqlen(bare.config, args.ppl_eval_seqlen)
    n_layers = len(find_layers(bare))
    most = 2 * n_layers if args.block_type == "mix" else n_layers
    if args.del_block_num > most:
        kinds = f"{n_layers} mha + {n_layers} mlp" if args.block_type == "mix" else f"all {args.block_type}"
        raise ValueError(
            f"--del-block-num {args.del_block_num}: {args.model_path} has {most} blocks ({kinds}); use 0..{most}"
        )
    return n_layers


def describe(args, corpus, windows, n_layers):
    """Return the order file's meta before the first removal."""
    return {
        "model": args.model_path, "layers": n_layers, "block_type": args.block_type, "dataset": args.cal_dataset,
        "source": corpus.source, "split": corpus.split, "text_column": args.text_column, "seed": args.seed,
        "documents": args.cal_nsamples, "windows": len(windows), "seqlen": args.ppl_eval_seqlen,
        "tokens": windows.numel(), "batch_size": args.ppl_eval_batch_size,
        "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "dtype": args.compute_dtype,
        "device": args.device, "engine": args.search, "approximate": args.search == "race",
        "race_confidence": args.race_confidence if args.search == "race" else None, "versions": flags.versions(),
        "steps": [],
    }  # fmt: skip


def resume(path, meta, overwrite):
    """Return (removals done, meta) of the order file at `path`, ([], meta) where there is none to continue."""
    from lib.orders import check_order, read_order

    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder, where the order file belongs; move it, or give another --ppl-search-path")
    if overwrite or not Path(path).exists():
        return [], meta
    order, old = read_order(path)
    differ = [f"{key} {old.get(key)!r} there, {meta[key]!r} now" for key in SETTINGS if old.get(key) != meta[key]]
    if differ:
        what = f"with other settings ({'; '.join(differ)})" if old else "and does not say how it was searched"
        raise ValueError(f"{path}: exists {what}; pass --overwrite to replace it, or give another --ppl-search-path")
    check_order(order, meta["layers"], path, old)
    steps = old.get("steps")
    fields = {"perplexity", "removed_percent", "seconds"}
    whole = isinstance(steps, list) and all(isinstance(step, dict) and fields <= step.keys() for step in steps)
    if not whole or len(steps) != len(order):
        raise ValueError(f"{path}: its meta does not hold one step for each removal; pass --overwrite to replace it")
    old.pop("failed", None)
    return order, old


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
