#!/usr/bin/env python3
"""hellaswag.py: downloads the validation set of HellaSwag (Zellers et al., 2019: 10,042 questions, 12 MB) and makes of it
the file that `train_gpt2 eval --hellaswag` reads, the same as llm.c's. The text is the data set's own: the context as it
is, and each ending after a space.
"""
import json
import os
import sys

from errors import DataError, OneLineParser, UsageError, run_main

from compressed import check_regular, open_plain
from download import download
from encoders import make_encoder
from faults import Fault
from prepare import add_tokenizer_arguments, check_tokenizer_arguments
from token_files import write_questions

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
MAX_LINE_BYTES = 1 << 20


def read_questions(path):
    """Yields (context, endings, the index of the right one) of each line."""
    try:
        check_regular(path)
        with open_plain(path) as (file, _):
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if line.strip():
                    yield _question(line, f"{path}:{number}")
    except Fault as fault:
        raise DataError(f"{path}: {fault}") from None


def _question(line, place):
    try:
        record = json.loads(line)
        context, endings, label = record["ctx"], record["endings"], record["label"]
        if label in (None, ""):
            raise DataError(f"{place}: no label: the test set's answers are not public; use the validation set")
        right = int(label)
        texts = [context, *endings]
    except (ValueError, KeyError, TypeError, RecursionError):
        texts = []
    if not all(isinstance(text, str) and text for text in texts) or len(texts) < 3 or not 0 <= right < len(endings):
        raise DataError(f"{place}: not a question of HellaSwag, a JSON object with the text 'ctx', the texts 'endings' and "
                        "the number of the right one, 'label'")
    return context, endings, right


def main(argv):
    parser = OneLineParser(description="Makes the file of HellaSwag's validation set for train_gpt2 eval --hellaswag.")
    parser.add_argument("--input", metavar="FILE", help="the .jsonl (also .gz, .zst) instead of downloading it")
    parser.add_argument("--out", default="data/hellaswag", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--url", default=URL, help="of the .jsonl (default: %(default)s)")
    add_tokenizer_arguments(parser)
    args = parser.parse_args(argv)
    check_tokenizer_arguments(args)
    if args.input is not None and not os.path.exists(args.input):
        raise UsageError(f"--input: {args.input}: no such file")
    os.makedirs(args.out, exist_ok=True)
    path = args.input
    if path is None:
        sha256 = SHA256 if args.url == URL else None
        path = download(args.url, os.path.join(args.out, "hellaswag_val.jsonl"), sha256=sha256)
    encoder = make_encoder(args.tokenizer, args.vocab_dir)
    questions = [(encoder.encode(context), [encoder.encode(" " + ending) for ending in endings], right)
                 for context, endings, right in read_questions(path)]
    if not questions:
        raise DataError(f"{path}: holds no question")
    out = os.path.join(args.out, "hellaswag_val.bin")
    write_questions(out, questions, encoder.vocabulary)
    print(f"{out}: {len(questions):,} questions ({encoder.name}); ./train_gpt2 eval --model DIR --hellaswag {out}",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
