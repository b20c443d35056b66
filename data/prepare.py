#!/usr/bin/env python3
"""prepare.py: turns text, JSONL and Parquet files into the token shards that train_gpt2 reads, and a tokenizer.bin for
sampling. Formats and examples: docs/data.md. Encodes in parallel; memory is a few megabytes per worker, plus the
largest plain text file. The same inputs and options give the same bytes, whatever the number of workers.
"""
import collections
import concurrent.futures.process
import contextlib
import functools
import hashlib
import itertools
import os
import re
import sys
import time

from errors import DataError, OneLineParser, UsageError, run_main

import numpy as np

from documents import COMPRESSIONS, find_inputs, read_documents
from encoders import make_encoder
from token_files import MAX_SHARD_TOKENS, ShardWriter, write_tokenizer

BATCH_CHARACTERS = 1 << 20  # text given to a worker at a time


def is_validation(text, fraction):
    """Whether a document is held out: decided by its content alone, so neither order nor duplicates matter."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def encode_documents(encoder, documents, validation_fraction):
    """Returns (training tokens, validation tokens) of some documents, the end-of-text token before each."""
    splits = ([np.zeros(0, np.uint16)], [np.zeros(0, np.uint16)])
    separator = np.array([encoder.end_of_text], dtype=np.uint16)
    for text in documents:
        splits[is_validation(text, validation_fraction)].extend((separator, encoder.encode(text)))
    return tuple(np.concatenate(parts) for parts in splits)


_worker_encoder = None  # each worker process makes its own


def _start_worker(tokenizer, vocab_dir):
    global _worker_encoder
    _worker_encoder = make_encoder(tokenizer, vocab_dir)


def _encode_in_worker(documents, validation_fraction):
    return encode_documents(_worker_encoder, documents, validation_fraction)


def batches_of(documents):
    """Lists of documents of about BATCH_CHARACTERS together."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents, encoder, vocab_dir, validation_fraction, workers):
    """Yields encode_documents() of one batch after another, in order, with at most 2 * workers of them in memory."""
    batches = batches_of(documents)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if workers <= 1 or len(first) < 2:  # not worth starting processes
        for batch in batches:
            yield encode_documents(encoder, batch, validation_fraction)
        return
    pending = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, initializer=_start_worker, initargs=(encoder.name, vocab_dir)
    )
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch, validation_fraction))
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
            text_field="text", split_on=None, workers=1):
    """Writes the shards NAME_train_*.bin and NAME_val_*.bin and tokenizer.bin into the directory `out`.

    Where a split would get no document (too few of them), it gets the last part of the tokens instead. Returns
    {"train": (paths, tokens), "val": (paths, tokens)}.
    """
    os.makedirs(out, exist_ok=True)
    progress = Progress(sum(os.path.getsize(path) for path in paths))

    def documents():
        done = 0
        for path in paths:

            def advance(position, done=done):
                progress.bytes = done + position

            yield from read_documents(path, text_field, split_on, advance)
            done += os.path.getsize(path)

    new_writer = functools.partial(ShardWriter, out, encoder.vocabulary, shard_tokens)
    with new_writer() as train, new_writer() as validation, progress:
        encoded = encode_all(documents(), encoder, vocab_dir, validation_fraction, workers)
        with contextlib.closing(encoded):  # stops the workers when writing fails
            for train_tokens, validation_tokens in encoded:
                train.append(train_tokens)
                validation.append(validation_tokens)
                progress.tokens = train.total + validation.total
                progress.show()
        if progress.tokens < 4:
            raise DataError(f"no text in {', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}")
        if train.total == 0:
            train, validation = validation, train
        if validation.total == 0 and validation_fraction > 0:
            _hold_out_tail(train, validation, encoder, validation_fraction)
        write_tokenizer(os.path.join(out, "tokenizer.bin"), encoder.token_bytes(), encoder.end_of_text)
        totals = {"train": train.total, "val": validation.total}
        return {"train": (train.commit(name, "train"), totals["train"]),
                "val": (validation.commit(name, "val"), totals["val"])}


def _hold_out_tail(train, validation, encoder, fraction):
    tail = train.take_tail(max(1, int(train.total * fraction)))
    if tail[0] != encoder.end_of_text:
        validation.append(np.array([encoder.end_of_text], dtype=np.uint16))
    validation.append(tail)
    print(f"too few documents to hold one out: the last {len(tail):,} tokens validate", file=sys.stderr)


def report(result, out, name, encoder):
    """The last line: what was written, and the flag that reads it."""
    parts = [f"{tokens:,} {split} tokens in {len(paths)} shard{'s' * (len(paths) != 1)}"
             for split, (paths, tokens) in result.items()]
    data = os.path.join(out, f"{name}_train_*.bin")
    print(f"{out}: {', '.join(parts)} ({encoder.name}); train with --data '{data}'", file=sys.stderr)


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
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (default: 100_000_000)")


def check_tokenizer_arguments(args):
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS * 10 // 11:  # a last shard of a tenth may be joined on
        raise UsageError(f"--shard-tokens must be from 1 to {MAX_SHARD_TOKENS * 10 // 11}, not {args.shard_tokens}")
    if args.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {args.workers}")
    if args.vocab_dir is not None and args.tokenizer == "bytes":
        raise UsageError("--vocab-dir is GPT-2's vocabulary, but --tokenizer bytes uses none; drop one of them")


def main(argv):
    parser = OneLineParser(description="Turns text, JSONL and Parquet files into token shards for train_gpt2.")
    parser.add_argument("input", nargs="+", help="files, directories or globs; .txt, .md, .jsonl[.gz|.zst], .parquet")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the shards and tokenizer.bin go")
    parser.add_argument("--name", help="of the shards (default: of the first input)")
    parser.add_argument("--val-fraction", type=float, default=0.01,
                        help="part of the documents held out, by the hash of their text (default: %(default)s)")
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column (default: %(default)s)")
    parser.add_argument("--split-on", metavar="SEPARATOR",
                        help=r"cut plain text into documents after this, for instance '\n\n'; \n and \t are understood")
    add_tokenizer_arguments(parser)
    args = parser.parse_args(argv)
    check_tokenizer_arguments(args)
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val-fraction must be from 0 to below 1, not {args.val_fraction}")
    name = default_name(args.input[0]) if args.name is None else args.name
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(f"--name may hold letters, digits and . _ - only, not '{name}'")
    if args.split_on is not None:
        args.split_on = args.split_on.replace(r"\n", "\n").replace(r"\t", "\t")
        if not args.split_on:
            raise UsageError("--split-on needs a separator that is not empty")

    paths = find_inputs(args.input)
    encoder = make_encoder(args.tokenizer, args.vocab_dir)
    result = prepare(paths, args.out, name, encoder, vocab_dir=args.vocab_dir, shard_tokens=args.shard_tokens,
                     validation_fraction=args.val_fraction, text_field=args.text_field, split_on=args.split_on,
                     workers=args.workers)
    report(result, args.out, name, encoder)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
