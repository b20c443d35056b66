#!/usr/bin/env python3
"""prepare.py: turns text, JSON and Parquet files into the token shards that train_gpt2 reads, and a tokenizer.bin for
sampling. Formats and examples: docs/data.md. Encodes in parallel; memory is a few megabytes per worker, plus the
largest document (64 MiB at most, of plain text 16 MiB). The same inputs and options give the same bytes, whatever the number of workers.
"""
import collections
import concurrent.futures.process
import contextlib
import ctypes
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time

from errors import DataError, OneLineParser, UsageError, run_main

import numpy as np

from compressed import COMPRESSIONS
from documents import find_inputs, kind_of, read_documents
from encoders import make_encoder
from faults import Faults
from text_documents import END_OF_TEXT, Separator, last_boundary
from token_files import MAX_SHARD_TOKENS, ShardWriter, write_tokenizer

BATCH_CHARACTERS = 1 << 20  # text given to a worker at a time
# The sequences that train_gpt2 trains on by default: GPT-2's, and on a CPU. A split of less than one and its last target
# cannot be used; a held-out one of the longer kind costs a small text too much.
WINDOWS = (1024 + 1, 256 + 1)
LARGEST_TAIL = 1 / 8  # of all tokens, held out for the sake of a window
MAX_WORKERS = 1024
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def is_validation(text, fraction):
    """Whether a document is held out: decided by its content alone, so neither order nor duplicates matter."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def encode_parts(encoder, parts):
    """Returns (training tokens, validation tokens) of (text, whether a document begins with it, whether it is held out);
    the end-of-text token goes before each document."""
    splits = ([np.zeros(0, np.uint16)], [np.zeros(0, np.uint16)])
    separator = np.array([encoder.end_of_text], dtype=np.uint16)
    for text, begins, held_out in parts:
        splits[held_out].extend((separator[: int(begins)], encoder.encode(text)))
    return tuple(np.concatenate(tokens) for tokens in splits)


_worker_encoder = None  # each worker process makes its own


def _start_worker(tokenizer, vocab_dir):
    global _worker_encoder
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # the main process gets them, too, and ends this one; if
        signal.signal(number, signal.SIG_IGN)  # this one died first, with the queue's lock, the main process would wait
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nor does it stay when the main process is killed
    except (OSError, AttributeError):
        pass  # not Linux
    _worker_encoder = make_encoder(tokenizer, vocab_dir)


def _encode_in_worker(parts):
    return encode_parts(_worker_encoder, parts)


def batches_of(documents, validation_fraction):
    """Lists of parts as encode_parts() takes them, of about BATCH_CHARACTERS together, from what read_documents() yields.

    A longer document is cut where no token of GPT-2's reaches across, and inside a word only if that is longer still.
    """
    batch, size, held_out = [], 0, False
    for text, begins in documents:
        if begins:  # decided by the first part of a document that comes in several
            held_out = is_validation(text, validation_fraction)
        while text:
            end = last_boundary(text, BATCH_CHARACTERS) if len(text) > BATCH_CHARACTERS else len(text)
            batch.append((text[:end], begins, held_out))
            size += end
            text, begins = text[end:], False
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode_all(batches, encoder, vocab_dir, workers):
    """Yields encode_parts() of one batch after another, in order, with at most 2 * workers of them in memory."""
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if workers <= 1 or len(first) < 2:  # not worth starting processes
        for batch in batches:
            yield encode_parts(encoder, batch)
        return
    pending = collections.deque()
    # From 3.14 on Python would start them by way of a server, which the signals of a terminal end, too.
    how = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, how, initializer=_start_worker, initargs=(encoder.name, vocab_dir)
    )
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process died, perhaps for lack of memory; try fewer with --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """A bar on stderr while it is a terminal; silent otherwise."""

    def __init__(self, total_bytes):
        self.total_bytes, self.bytes, self.tokens = max(total_bytes, 1), 0, 0
        self._start = time.monotonic()
        self._shown = 0.0
        self._terminal = sys.stderr.isatty()

    def show(self):
        now = time.monotonic()
        if not self._terminal or now - self._shown < 0.2:
            return
        self._shown = now
        part = min(self.bytes / self.total_bytes, 1.0)
        bar = ("=" * round(30 * part)).ljust(30)
        rate = self.tokens / max(now - self._start, 1e-9) / 1e6
        print(f"\r[{bar}] {100 * part:3.0f}%  {self.tokens / 1e6:.1f}M tokens  {rate:.1f}M/s ", end="", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._terminal and self._shown:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr)


def prepare(paths, out, name, encoder, *, vocab_dir=None, shard_tokens=100_000_000, validation_fraction=0.01,
            text_field="text", separator=None, faults=None, workers=1):
    """Writes the shards NAME_train_*.bin and NAME_val_*.bin and tokenizer.bin into the directory `out`.

    Where the documents held out are less than a window (too few of them), the last part of the tokens is held out instead,
    or nothing. Returns {"train": (paths, tokens), "val": (paths, tokens)}.
    """
    os.makedirs(out, exist_ok=True)
    sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}
    progress = Progress(sum(sizes.values()))
    literal = []  # files of documents that hold END_OF_TEXT as text

    def documents():
        done = 0
        for path in paths:

            def advance(position, done=done):
                progress.bytes = done + position

            for text, begins in read_documents(path, text_field, separator, faults, advance):
                if END_OF_TEXT in text:
                    literal.append(path)
                yield text, begins
            done += sizes[path]

    new_writer = functools.partial(ShardWriter, out, encoder.vocabulary, shard_tokens)
    with new_writer() as train, new_writer() as validation, progress:
        encoded = encode_all(batches_of(documents(), validation_fraction), encoder, vocab_dir, workers)
        with contextlib.closing(encoded):  # stops the workers when writing fails
            for train_tokens, validation_tokens in encoded:
                train.append(train_tokens)
                validation.append(validation_tokens)
                progress.tokens = train.total + validation.total
                progress.show()
        if progress.tokens < 4:
            reason = "".join(f"; {line}" for line in faults.summary()) if faults else ""
            raise DataError(f"no text in {', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}{reason}")
        if train.total < min(WINDOWS) and train.total < validation.total:
            train, validation = validation, train
        if validation.total < min(WINDOWS) and (validation.total or validation_fraction > 0):
            _hold_out_tail(train, validation, encoder, validation_fraction)
        write_tokenizer(os.path.join(out, "tokenizer.bin"), encoder.token_bytes(), encoder.end_of_text)
        if literal:
            print(f"warning: {END_OF_TEXT} stands in the text of documents ({len(literal):,}, the first of them in {literal[0]}): "
                  "ordinary characters there, not the token", file=sys.stderr)
        totals = {"train": train.total, "val": validation.total}
        return {"train": (train.commit(name, "train"), totals["train"]),
                "val": (validation.commit(name, "val"), totals["val"])}


def _hold_out_tail(train, validation, encoder, fraction):
    """Gives the little that is held out back, then holds out the last tokens: the fraction asked for or, where that is
    less than a window, a window, if it is a small part of all."""
    train.append(validation.take_all())
    windows = [window for window in WINDOWS if window <= LARGEST_TAIL * train.total]
    count = min(max(int(train.total * fraction), *windows[:1], 0), train.total - min(WINDOWS))
    if count < min(WINDOWS):
        print(f"no validation data: of {train.total:,} tokens none are held out, as {min(WINDOWS)} (a window of "
              f"{min(WINDOWS) - 1} and its last target) are too large a part", file=sys.stderr)
        return
    tail = train.take_tail(count)
    if tail[0] != encoder.end_of_text:
        validation.append(np.array([encoder.end_of_text], dtype=np.uint16))
    validation.append(tail)
    print(f"too few documents to hold one out: the last {len(tail):,} tokens validate", file=sys.stderr)


def report(result, out, name, encoder, faults=None):
    """What was skipped and, the last line, what was written and the flag that reads it."""
    for line in faults.summary() if faults else ():
        print(line, file=sys.stderr)
    parts = [f"{tokens:,} {split} tokens in {len(paths)} shard{'s' * (len(paths) != 1)}"
             for split, (paths, tokens) in result.items()]
    data = os.path.join(out, f"{name}_train_*.bin")
    print(f"{out}: {', '.join(parts)} ({encoder.name}); train with --data {shlex.quote(data)}", file=sys.stderr)


def default_name(path):
    """The input's own name, without directories and extensions."""
    name = os.path.basename(os.path.abspath(path))
    if name.lower().endswith(COMPRESSIONS):
        name = os.path.splitext(name)[0]
    if not os.path.isdir(path):
        name = os.path.splitext(name)[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.") or "data"


def add_tokenizer_arguments(parser):
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes", "auto"), default="auto",
                        help="auto: gpt2 where its vocabulary can be had, else bytes (default: %(default)s)")
    parser.add_argument("--vocab-dir", metavar="DIR", help="where GPT-2's encoder.json is, for use offline")


def check_tokenizer_arguments(args):
    if args.vocab_dir is not None and args.tokenizer == "bytes":
        raise UsageError("--vocab-dir is GPT-2's vocabulary, but --tokenizer bytes uses none; drop one of them")


def add_shard_arguments(parser):
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (default: 100_000_000)")


def check_shard_arguments(args):
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS * 10 // 11:  # a last shard of a tenth may be joined on
        raise UsageError(f"--shard-tokens must be from 1 to {MAX_SHARD_TOKENS * 10 // 11}, not {args.shard_tokens}")
    if not 1 <= args.workers <= MAX_WORKERS:
        raise UsageError(f"--workers must be from 1 to {MAX_WORKERS}, not {args.workers}")


def add_on_error_argument(parser):
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                        help="at a line of JSON, a row of Parquet, a document of text or a file that cannot be read; skip "
                             "passes over it and says at the end how many and where (default: %(default)s)")


def report_cuts(separator, given, paths):
    if given and not separator.cuts:
        texts = any(kind_of(path) == "text" for path in paths)
        what = "every text file is one document" if texts else "it is for plain text, and no input is"
        print(f"warning: --split-on {given!r} cut nothing: {what}", file=sys.stderr)
    if not given and separator.cuts:
        print(f"plain text is cut at each of its {separator.cuts:,} {separator.text}, which are left out", file=sys.stderr)


def main(argv):
    parser = OneLineParser(description="Turns text, JSON and Parquet files into token shards for train_gpt2.")
    parser.add_argument("input", nargs="+", help="files, directories or globs; .txt, .md, .jsonl, .json (these also with .gz "
                                                 "or .zst), .parquet")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the shards and tokenizer.bin go")
    parser.add_argument("--name", help="of the shards (default: of the first input)")
    parser.add_argument("--val-fraction", type=float, default=0.01,
                        help="part of the documents held out, by the hash of their text; where these are less than a "
                             "window of 256 tokens, the last part of the tokens, or none (default: %(default)s)")
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column (default: %(default)s)")
    parser.add_argument("--split-on", metavar="SEPARATOR",
                        help=r"cut plain text into documents at this, for instance '\n\n' (which finds \r\n\r\n, too); the "
                             r"separator and the line ends beside it are left out; \n, \r and \t are understood (default: "
                             + END_OF_TEXT + ")")
    add_on_error_argument(parser)
    add_tokenizer_arguments(parser)
    add_shard_arguments(parser)
    args = parser.parse_args(argv)
    check_tokenizer_arguments(args)
    check_shard_arguments(args)
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val-fraction must be from 0 to below 1, not {args.val_fraction}")
    name = default_name(args.input[0]) if args.name is None else args.name
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(f"--name may hold letters, digits and . _ - only, not '{name}'")
    given = args.split_on and args.split_on.replace(r"\n", "\n").replace(r"\r", "\r").replace(r"\t", "\t")

    paths = find_inputs(args.input)
    encoder = make_encoder(args.tokenizer, args.vocab_dir)
    separator, faults = Separator(given or END_OF_TEXT), Faults(skip=args.on_error == "skip")
    result = prepare(paths, args.out, name, encoder, vocab_dir=args.vocab_dir, shard_tokens=args.shard_tokens,
                     validation_fraction=args.val_fraction, text_field=args.text_field, separator=separator, faults=faults,
                     workers=args.workers)
    report_cuts(separator, given, paths)
    report(result, args.out, name, encoder, faults)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
