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
import math
import sys
import time
from datetime import timedelta

from scripts import ending, flags


def parse_args(argv=None):
    from lib.importance import METRICS

    kinds = {
        kind: " ".join(name for name, m in METRICS.items() if m.kind == kind) for kind in ("searched", "once", "run")
    }
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--ppl-search-path", default="ppls", help="folder of the order file; made when missing")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--del-block-num", type=flags.count, default=0, help="blocks to remove")
    flags.add_ratio_flag(amount, flags.share, "remove the fewest that reach this share of all parameters")
    parser.add_argument(
        "--block-type",
        choices=("mha", "mlp", "mix", "layer"),
        default="mix",
        help="blocks to search; layer: both of a layer together, counted as two",
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        metavar="METRIC",
        default="ppl",
        help=f"what makes a block dispensable; {kinds['searched']}: searched step by step; {kinds['once']}: every "
        f"block judged once; {kinds['run']}: one run of consecutive layers",
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
    flags.add_engine_flags(parser)
    flags.add_audit_flag(parser)
    flags.add_rule_flags(parser)
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
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    flags.join_ranks(parser)
    with contextlib.ExitStack() as stack:
        search(parser, args, stack)


def search(parser, args, stack):
    with parser.user_errors():  # everything that can fail fails before weights are read
        job, decoder = open_search(args, stack)
    if decoder is None:
        print(f"nothing to do: {job.path} holds {len(job.order)} removals searched with these settings")
        draw(job, missing=True)
        return print_summary(job)
    print_header(args, job, decoder)
    dense, seconds = measure_dense(args, job, decoder)
    if args.dry_run:
        return print_estimate(args, job, decoder, dense, seconds)

    from lib.job import refinements, steps, told, told_swap

    before = len(job.order)
    cache_bytes = None if args.cache_gb is None else int(args.cache_gb * 2**30)
    with stopped(args, job, searching=True), flags.progress(job.evaluations * len(job.text.windows)) as bar:
        for unit, step in steps(job, decoder, dense, cache_bytes, bar.advance, ending.check):
            for line in [*told(job, unit, step), *notes_of(decoder)]:
                bar.write(line)
        for swap in refinements(job, decoder, cache_bytes):
            bar.write(told_swap(job, swap))
    if len(job.order) > before and args.metric != "ppl":
        print(f"perplexity    {dense:.4f} -> {job.meta['steps'][-1]['perplexity']:.4f} on the calibration text")
    draw(job)
    print_summary(job)


def notes_of(decoder):
    """Return what the decoder has to say to people, once."""
    lines = [f"note          {line}" for line in decoder.notes]
    decoder.notes.clear()
    return lines


def open_search(args, stack):
    """Return (Job, Decoder or None where the order is there already); raise ValueError for whatever cannot work.

    The order file is this process's until `stack` is closed.
    """
    from lib.candidates import WrongAmount
    from lib.files import own
    from lib.job import Settings, Taken, check_decoder, open_job

    check_flags(args)
    flags.check_folder(args.ppl_search_path, "--ppl-search-path")
    bare = flags.open_bare(args)
    text = flags.open_text(args, flags.open_tokenizer(args), bare)
    settings = Settings(
        args.model_path,
        args.metric,
        args.block_type,
        number=args.del_block_num,
        ratio=args.target_ratio,
        protect_first=args.protect_first,
        protect_last=args.protect_last,
        seed=args.seed,
        batch_size=args.ppl_eval_batch_size,
        dtype=args.compute_dtype,
        device=args.device,
        search=args.search,
        race_confidence=args.race_confidence,
        rule=args.rule,
        cost=args.cost,
        seconds=flags.read_cost_file(args),
        budgets=tuple(args.budget),
        refine=args.refine,
        evaluations=args.refine_evaluations,
        passes=args.passes,
        audit=args.race_audit,
        kl_top_k=args.kl_top_k or None,
    )
    try:
        hold = None if args.dry_run else lambda path: flags.note(stack.enter_context(own(path)))
        job = open_job(settings, text, bare, args.ppl_search_path, args.overwrite, hold)
    except WrongAmount as error:
        flag = {"number": "--del-block-num", "ratio": "--target-ratio"}.get(
            error.what, "--protect-first, --protect-last:"
        )
        raise ValueError(f"{flag} {error}") from None
    except Taken as error:
        raise ValueError(f"{error}; pass --overwrite to replace it, or give another --ppl-search-path") from None
    if job.finished and not args.dry_run:
        return job, None
    decoder = flags.open_decoder(args, text.windows, offload=args.offload)
    try:
        check_decoder(job, decoder)
    except ValueError as error:
        offload = decoder.offloaded and job.searched
        raise ValueError(f"--device {error}; pass --offload" if offload else f"--metric {error}") from None
    return job, decoder


def check_flags(args):
    """Raise ValueError where flags do not go together."""
    from lib.importance import METRICS

    kind = METRICS[args.metric].kind
    if kind == "run" and args.block_type != "layer":
        raise ValueError(f"--metric {args.metric} removes whole layers; add --block-type layer")
    chosen = {"search": args.search, "rule": args.rule, "refine": args.refine, "pass": args.passes}
    for flag, value in chosen.items():
        if kind != "searched" and value not in ("cached", "streamed", "lowest", "none", "nothing"):
            raise ValueError(f"--{flag} {value}: --metric {args.metric} does not search; drop --{flag}")
    if args.race_audit and args.search != "race":
        raise ValueError("--race-audit: nothing races; add --search race, or drop it")
    if args.metric == "taylor" and args.offload:
        raise ValueError("--metric taylor: needs gradients, which offloaded layers do not have; drop --offload")
    if args.budget and args.del_block_num:
        raise ValueError("--del-block-num goes with no --budget; give budgets, or a number of blocks")
    if args.refine != "none" and not (args.budget or args.del_block_num or args.target_ratio):
        raise ValueError(f"--refine {args.refine}: how much must go? give --target-ratio, --budget or --del-block-num")
    if args.refine == "none" and args.refine_evaluations:
        raise ValueError("--refine-evaluations: nothing is refined; add --refine swaps or evolve, or drop it")


def print_header(args, job, decoder):
    from lib.job import journaled

    how = f"engine {args.search}" if job.searched else "judged at once"
    flags.print_opened(args, job.text, decoder, f", metric {args.metric}, {how}")
    c = job.candidates
    amount = f"{c.most}" if args.target_ratio is None else f"{100 * args.target_ratio:g} %, at most {c.most}"
    blocks = len(c.units) * c.size
    print(f"search        {amount} of {blocks} {args.block_type} blocks, {job.evaluations:,} evaluations -> {job.path}")
    if (args.rule, args.refine, args.passes) != ("lowest", "none", "nothing") or args.budget:
        budgets = "".join(f", {100 * share:g} % of {name}" for name, share in args.budget)
        print(f"rule          {args.rule}, cost {args.cost}{budgets}; refined by {args.refine}; pass {args.passes}")
    if job.order:
        print(f"resuming      {len(job.order)} removals are done: {' '.join(map(str, job.order))}")
    if kept := journaled(job):
        every = (len(c.units) - len(job.order) // c.size) * -(-len(job.text.windows) // args.ppl_eval_batch_size)
        print(f"resuming      {kept:,} of {every:,} batches of candidates of removal {len(job.order) + 1} are kept")


def measure_dense(args, job, decoder):
    """Return the dense model's perplexity on the calibration text, and the seconds that took."""
    from lib.evaluate import perplexity
    from lib.ranks import shared_losses

    start = time.perf_counter()
    with stopped(args, job):
        dense = perplexity(shared_losses(decoder, job.text.windows, args.ppl_eval_batch_size), args.ppl_eval_seqlen)
    seconds = time.perf_counter() - start
    print(f"dense         perplexity {dense:.4f}, one evaluation takes {seconds:.2f} s")
    if not math.isfinite(dense) and not args.dry_run:
        print(f"warning: the dense model's perplexity is {dense}{flags.try_fp32(args)}", file=sys.stderr)
    return dense, seconds


def print_estimate(args, job, decoder, dense, seconds):
    from lib.files import to_json
    from lib.job import reachable_shares

    # sharing the layers before each candidate alone halves them; kept states save more
    whole = args.search == "exhaustive" or not job.searched and job.evaluations <= 3
    estimate = seconds * job.evaluations * (1 if whole else 0.5)
    less = "" if whole else " or less"
    print(f"estimate      {timedelta(seconds=round(estimate))}{less} for the whole search; nothing written")
    shares = reachable_shares(job, decoder)
    print(f"reachable     {', '.join(f'{100 * share:.2f} % of {name}' for name, share in shares.items())}")
    result = {
        "dry_run": True,
        "reachable": shares,
        "blocks": len(job.candidates.units) * job.candidates.size,
        "windows": len(job.text.windows),
        "tokens": job.text.windows.numel(),
        "evaluations": job.evaluations,
        "estimated_seconds": estimate,
        "dense_perplexity": dense,
    }
    print(to_json(result))


@contextlib.contextmanager
def stopped(args, job, searching=False):
    """Within this context a full GPU, or a step without a finite candidate, ends the program with one line."""
    import torch

    from lib.search import NoFiniteCandidate

    try:
        with ending.later() if searching and job.searched else contextlib.nullcontext():
            yield
    except ending.Stopped as stop:
        stop.kept = f"{len(job.order)} removals are in {job.path}"
        if searching and job.searched:
            stop.kept += ", what is known of the next beside it: the same command goes on from there"
        raise
    except NoFiniteCandidate as error:
        sys.exit(
            f"block_search.py: error: step {len(job.order) + 1}: {error}; the {len(job.order)} removals before it "
            f"are in {job.path}{flags.try_fp32(args)}"
        )
    except torch.OutOfMemoryError:
        greedy = searching and job.searched
        kept = len(job.order) if greedy else 0  # what is judged at once is kept at its end
        exact = args.search in ("cached", "exhaustive") and args.metric != "taylor"
        ways = ["a smaller --cache-gb"] * (greedy and args.search != "exhaustive")
        ways += ["--offload"] * (exact and not args.model_path.endswith(".gguf"))
        less = "--ppl-eval-seqlen" if searching and args.metric == "taylor" else "--ppl-eval-batch-size"
        ways.append(f"a smaller {less}" + (" (which starts anew, with --overwrite)" if kept else ""))
        where = f"; the {kept} removals before it are in {job.path} and are continued" if kept else ""
        sys.exit(
            f"block_search.py: error: step {len(job.order) + 1}: the GPU's memory is full{where}; less is needed with "
            f"{', or '.join(ways)}"
        )


def draw(job, missing=False):
    """Draw the candidates' scores and what went, beside the order; missing: only where one of them is not there.

    Where matplotlib or room for them is missing, say so.
    """
    from lib.files import NotWritten
    from lib.ranks import join
    from lib.report.pictures import draw_order, pictures_of

    if join()[0] or missing and all(path.exists() for path in pictures_of(job.path, job.meta)):
        return
    try:
        for picture in draw_order(job.path, job.order, job.meta):
            print(f"picture       {picture}")
    except NotWritten as error:
        print(f"note          no pictures: {error}; python -m scripts.report {job.path} draws them later")
    except ImportError:
        print(f"note          no pictures: pip install matplotlib, then python -m scripts.report {job.path}")


def print_summary(job):
    """Print the one line for machines: what the order file holds of these removals."""
    from lib.files import to_json
    from lib.job import summary

    print(to_json(summary(job)))


if __name__ == "__main__":
    ending.run(main)
