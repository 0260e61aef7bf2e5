"""Draw result files: pictures of searches and results, and one self-contained page with tables and settings.

Takes order files of block_search.py (or of the paper's scripts), results of eval.py --output-path, compare.json of
scripts.compare, and the .csv table of angular distances. Files of several models get sections of their own, and the
page says so. Needs matplotlib; neither torch nor a display.

    python -m scripts.report ppls/*_order_list.json results/*.json --output-dir results/report
    python -m scripts.report docs/results/smollm2.json --picture docs/quality.svg
"""

from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="+", metavar="RESULT", help="order, result, compare.json or distance file")
    parser.add_argument("--output-dir", default="results/report", help="folder of index.html and the .png files")
    parser.add_argument(
        "--picture", default=None, metavar="FILE", help="draw perplexity against size only: a .svg, .pdf or .png file"
    )
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.files import to_json
    from lib.report.page import write_quality, write_report

    with parser.user_errors():
        flags.check_folder(args.output_dir, "--output-dir")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("pictures need matplotlib: pip install matplotlib") from None
        if args.picture:
            suffix = next((end for end in (".svg", ".pdf", ".png") if args.picture.endswith(end)), None)
            if not suffix:
                raise ValueError(f"--picture {args.picture}: give a name that ends in .svg, .pdf or .png")
            flags.check_file(args.picture, "--picture", suffix)
            write_quality(args.results, args.picture)
            print(to_json({"picture": args.picture}))
            return
        page, pictures, notices = write_report(args.results, args.output_dir)
    for notice in notices:
        print(f"note          {notice}")
    for path in pictures:
        print(f"picture       {path}")
    print(f"page          {page}")
    print(to_json({"page": str(page), "pictures": [str(p) for p in pictures], "notices": notices}))


if __name__ == "__main__":
    ending.run(main)
