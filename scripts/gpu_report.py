#!/usr/bin/env python3
"""gpu_report.py: measures everything there is to know about train_gpt2 on a GPU, and writes it down.

    make gpu-report                          builds what it needs, then: scripts/gpu_report.py
    scripts/gpu_report.py --parts "tests kernels" --time-limit 600
    scripts/gpu_report.py --dry-run --out /tmp/report      all of it at toy size, without a GPU
    scripts/gpu_report.py --render           makes the page anew from the result file

Every part ends within nine minutes. A part that fails or finds no time says so, and the others go on. Results are added
to docs/results/<gpu>.json, item by item; docs/results/<gpu>.md is made from it. Each item holds the command that
reproduces it. Needs no Python package; PyTorch, llm.c (--llmc), matplotlib and pytest are used where they are.
The exit code is 1 when an item failed, 2 when the call was wrong.
"""
import argparse
import signal
import sys
from pathlib import Path

from gpu_measurements import correctness, kernels, learning, machine, memory, parallel, render, steps, streaming, training
from gpu_measurements.results import Results, ResultsError, read
from gpu_measurements.session import Session, asked_to_end, end_if_asked, say
from gpu_measurements.sizes import DRY, REAL


def parts_of(session, sizes):
    """Every part by name, in the order of a whole report: a function that returns its items."""
    parts = {
        "tests": lambda: correctness.tests(session, sizes.tests),
        "right": lambda: correctness.right(session),
        "kernels": lambda: kernels.items(session),
    }
    for model in sizes.models:
        parts[f"steps-{model.name}"] = lambda model=model: steps.items(session, model)
    parts["memory"] = lambda: memory.items(session)
    parts["streaming"] = lambda: streaming.items(session)
    parts["parallel"] = lambda: parallel.items(session)
    parts["learning"] = lambda: learning.items(session)
    parts["sanitizer"] = lambda: correctness.tests(session, sizes.sanitizer)
    return parts


def chosen(names, parts):
    """The parts that were named, in their order; `steps` stands for one part per model; without names all but the
    sanitizer, which takes long."""
    if not names:
        return [part for part in parts if part != "sanitizer"]
    groups = {"steps": [part for part in parts if part.startswith("steps-")], "all": list(parts)}
    wanted = set()
    for name in names:
        if name not in parts and name not in groups:
            raise ResultsError(f"there is no part {name!r}; there are {', '.join(parts)}, and steps for all of these")
        wanted.update(groups.get(name, [name]))
    return [part for part in parts if part in wanted]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"gpu_report: {message}\n")


def seconds(text):
    """A number, or None of the empty text that a variable of make may be."""
    return float(text) if text else None


def parse_arguments():
    parser = Parser(description="Measures everything on a GPU: right, fast, small, and beside its peers.")
    parser.add_argument("--parts", default="", metavar='"A B"', help="of tests right kernels steps (or steps-124M ...) "
                        "memory streaming parallel learning sanitizer; default: all but sanitizer")
    parser.add_argument("--time-limit", type=seconds, default=None, metavar="SECONDS", help="of this call; what would "
                        "not fit is skipped (default: none; each part has nine minutes)")
    parser.add_argument("--spent", type=seconds, default=None, metavar="SECONDS", help="what the build before this call "
                        "took: counts as part of the limit and of the first part")
    parser.add_argument("--data", default="", metavar="PATH", help="training shards for `learning`: a folder or a glob")
    parser.add_argument("--llmc", default="", metavar="PATH", help="a checkout of llm.c to measure beside")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without a GPU; needs --out")
    parser.add_argument("--out", default="", metavar="FOLDER", help="of the result files (default: docs/results)")
    parser.add_argument("--missing", action="store_true", help="keep what was measured at this very commit")
    parser.add_argument("--render", action="store_true", help="only make the pages from the result files")
    parser.add_argument("--write-shard", default="", metavar="FILE", help="only write the random tokens of `steps`")
    arguments = parser.parse_args()
    if arguments.time_limit is not None and not arguments.time_limit > 0:
        parser.error(f"--time-limit is a number of seconds above 0, not {arguments.time_limit:g}")
    if arguments.dry_run and not arguments.out and not arguments.write_shard:
        parser.error("--dry-run needs --out FOLDER: its figures do not belong into docs/results")
    return arguments


def folder_of(arguments):
    return Path(arguments.out).resolve() if arguments.out else machine.ROOT / "docs/results"


def write_page(path):
    page = path.with_suffix(".md")
    content = read(path)
    page.write_text(render.page(content, DRY if content.get("dry_run") else REAL, path.stem))
    return page


def render_all(folder):
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ResultsError(f"{folder} holds no result file")
    for path in paths:
        say(f"wrote {write_page(path)}")


def measure(arguments):
    sizes = DRY if arguments.dry_run else REAL
    description = machine.describe(arguments.dry_run)
    names = arguments.parts.replace(",", " ").split()
    chosen(names, parts_of(None, sizes))  # complains before anything is written
    if not description["gpu"]:
        raise ResultsError("nvidia-smi names no GPU; --dry-run --out FOLDER runs the report without one")
    path = folder_of(arguments) / f"{machine.file_name(description['gpu'])}.json"
    results = Results(path, description, arguments.dry_run)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())
    data = ",".join(str(Path(glob).absolute()) for glob in arguments.data.split(",") if glob)
    session = Session(sizes, results, dry_run=arguments.dry_run, time_limit=arguments.time_limit, data=data,
                      llmc=str(Path(arguments.llmc).resolve()) if arguments.llmc else "", missing=arguments.missing,
                      spent=arguments.spent or 0.0)
    try:
        parts = parts_of(session, sizes)
        for part in chosen(names, parts):
            session.run_part(part, parts[part]())
            write_page(path)
        end_if_asked()
    finally:
        session.close()
        if path.exists():
            say(f"wrote {path} and {write_page(path)}")
    return 1 if session.failed else 0


def main():
    arguments = parse_arguments()
    try:
        if arguments.write_shard:
            sizes = DRY if arguments.dry_run else REAL
            training.write_shard(arguments.write_shard, sizes.shard_tokens, sizes.vocabulary)
            return 0
        if arguments.render:
            render_all(folder_of(arguments))
            return 0
        return measure(arguments)
    except (ResultsError, OSError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_report: interrupted; what was measured is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
