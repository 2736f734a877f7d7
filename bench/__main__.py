"""``python -m bench``: show and compare the results of ``pytest --benchmark`` and of bench/ten_minutes.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.harness import commands
from prfl.commands.options import add_command, print_any_name
from prfl.utils.errors import PrflError

EXAMPLES = """\
  pytest --benchmark --benchmark-json=a.json
      measure (bench/README.md): this writes the files
  python -m bench report a.json b.json --page report.html
      tables here, and a page with plots
  python -m bench report --update docs/results.md
      the tables between a page's bench comments, from their files
  python -m bench compare a.json b.json
      what became slower or larger from a to b
  python -m bench golden configs/wan2.1-1.3b/vader*.yaml
      scores of public rewards with their real weights, beside the stored ones
"""


def main(arguments: list[str] | None = None) -> int:
    print_any_name()
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except PrflError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench", description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = top.add_subparsers(required=True, metavar="ACTION")

    action = add_command(actions, "report", "show results as tables and as a page", EXAMPLES)
    action.set_defaults(command=report)
    action.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of pytest-benchmark (--benchmark-json)")
    action.add_argument("--page", type=Path, metavar="FILE.html", help="write a self-contained page")
    action.add_argument("--plot", type=Path, metavar="FILE.png", help="write the plot of costs against size")
    action.add_argument("--markdown", action="store_true", help="print the tables of a page instead")
    action.add_argument("--update", type=Path, metavar="PAGE", help="write the tables of a page from their files")

    action = add_command(actions, "compare", "show what changed between two results", EXAMPLES)
    action.set_defaults(command=compare)
    action.add_argument("before", type=Path, metavar="A")
    action.add_argument("after", type=Path, metavar="B")

    action = add_command(actions, "golden", "score two fixed videos with the public rewards of configs", EXAMPLES)
    action.set_defaults(command=golden)
    action.add_argument(
        "configs", nargs="+", type=Path, metavar="CONFIG", help="they follow public rewards, as vader-hps.yaml"
    )
    action.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME")
    action.add_argument("--write", action="store_true", help="store the scores in place of comparing them")
    return top


def golden(options: argparse.Namespace) -> None:
    from bench import golden as scores

    for config in options.configs:
        print("\n".join(scores.golden(config, options.device, options.write)), flush=True)


def report(options: argparse.Namespace) -> None:
    if not options.files and not options.update:
        raise PrflError("no files", where="python -m bench report", fix="give results, or --update PAGE")
    commands.report(
        options.files, page=options.page, plot=options.plot, as_markdown=options.markdown, marked=options.update
    )


def compare(options: argparse.Namespace) -> None:
    commands.compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
