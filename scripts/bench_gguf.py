"""Time .gguf files against each other in llama.cpp: prefill and decode tokens/s, and the size of the KV cache.

The files take turns, so that a busy machine slows all of them: medians, of the ratios within a round too.
Needs `pip install xllamacpp`.

    python -m scripts.bench_gguf dense/model.gguf pruned/model.gguf --threads 1
"""

from statistics import median

from lib.export import runtimes as llamacpp
from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help=".gguf files; ratios are to the first")
    parser.add_argument("--prompt", type=flags.positive, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=flags.positive, default=64, help="tokens decoded behind it")
    parser.add_argument("--n-ctx", type=flags.positive, default=8192, help="positions of the KV cache (fp16)")
    parser.add_argument("--threads", type=flags.positive, default=1, help="threads of llama.cpp")
    parser.add_argument("--repeats", type=flags.positive, default=5, help="timed rounds, after one that is not")
    args = parser.parse_args(argv)
    if args.prompt + args.new > args.n_ctx:
        parser.error(f"--n-ctx {args.n_ctx}: less than --prompt {args.prompt} + --new {args.new}")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    import contextlib

    from lib.files import to_json

    ids = [32 + i * 37 % 200 for i in range(args.prompt)]  # what they mean does not matter to the clock
    with parser.user_errors(), contextlib.ExitStack() as stack:
        servers = [stack.enter_context(llamacpp.Server(file, args.n_ctx, threads=args.threads)) for file in args.files]
        caches = [server.cache_line for server in servers]
        sizes = [server.cache_mib for server in servers]
        rounds = [[server.speed(ids, args.new) for server in servers] for _ in range(1 + args.repeats)][1:]
    rows, results = [["", "prefill tokens/s", "", "decode tokens/s", "", "KV cache MiB", ""]], []
    for i, file in enumerate(args.files):
        result, cells = {"file": file}, []
        for j, key in enumerate(("prefill", "decode")):
            speeds = [turn[i][j] for turn in rounds]
            gain = median(turn[i][j] / turn[0][j] for turn in rounds)  # of the same round: both were as busy
            result |= {key: median(speeds), f"{key}_gain": gain, f"{key}_all": speeds}
            cells += [f"{median(speeds):.2f}", f"x{gain:.3f}"]
        results.append(result | {"cache_mib": sizes[i], "cache": caches[i]})
        rows.append([file, *cells, f"{sizes[i]:.2f}", f"x{sizes[i] / sizes[0]:.3f}"])
    print(f"prompt {args.prompt}, new {args.new}, threads {args.threads}, median of {args.repeats}, in turns")
    flags.print_aligned(rows)
    for result in results:
        spans = [f"{k} {min(result[f'{k}_all']):.2f}..{max(result[f'{k}_all']):.2f}" for k in ("prefill", "decode")]
        print(f"{result['file']}: {', '.join(spans)}; llama.cpp: {result['cache']}")
    print(to_json({"prompt": args.prompt, "new": args.new, "threads": args.threads, "results": results}))


if __name__ == "__main__":
    ending.run(main)
