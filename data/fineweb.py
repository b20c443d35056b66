#!/usr/bin/env python3
"""fineweb.py: downloads a sample of FineWeb (Penedo et al., 2024) from Hugging Face and makes token shards of it, or
downloads shards that others have made. A Parquet file is about 2 GB and 700 million tokens, a shard 200 MB and 100
million.
"""
import json
import os
import sys

from errors import DataError, OneLineParser, UsageError, run_main

from download import download, read_url
from encoders import Gpt2Encoder, make_encoder
from faults import Faults
from prepare import (
    add_on_error_argument, add_shard_arguments, add_tokenizer_arguments, check_shard_arguments, check_tokenizer_arguments,
    prepare, report,
)
from token_files import read_shard, write_tokenizer

HUB = "https://huggingface.co"
DATASET = "HuggingFaceFW/fineweb"
SAMPLES = {"10B": "sample/10BT", "100B": "sample/100BT"}
# llm.c format, GPT-2 tokens: (dataset, name of the files, number of training shards). The larger is FineWeb-Edu.
PRETOKENIZED = {
    "10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "100B": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", 1001),
}


def list_parquet(hub, folder):
    """Paths, sorted, of the Parquet files in a folder of the dataset, from the hub's listing."""
    url = f"{hub}/api/datasets/{DATASET}/tree/main/{folder}"
    try:
        paths = sorted(entry["path"] for entry in json.loads(read_url(url)) if entry["path"].endswith(".parquet"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{url}: the answer is not a listing of files") from None
    if not paths:
        raise DataError(f"{url}: no Parquet files are listed")
    return paths


def fetch(hub, dataset, path, directory):
    url = f"{hub}/datasets/{dataset}/resolve/main/{path}"
    return download(url, os.path.join(directory, path.replace("/", "_")))


def download_pretokenized(args):
    dataset, stem, available = PRETOKENIZED[args.version]
    if args.shards > available:
        raise UsageError(f"--shards {args.shards}: {dataset} has {available} training shards")
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{index:06d}.bin" for index in range(1, args.shards + 1)]
    result = {"val": ([], 0), "train": ([], 0)}
    for name in names:
        path = fetch(args.url, dataset, name, args.out)
        try:
            tokens = len(read_shard(path)[0])
        except ValueError as error:
            raise DataError(f"{error}; remove it and run again") from None
        split = "val" if "_val_" in name else "train"
        result[split] = (result[split][0] + [path], result[split][1] + tokens)
    try:
        encoder = Gpt2Encoder(args.vocab_dir)
        write_tokenizer(os.path.join(args.out, "tokenizer.bin"), encoder.token_bytes(), encoder.end_of_text)
    except DataError as error:
        print(f"no tokenizer.bin for sampling: {error}", file=sys.stderr)
    report(result, args.out, stem, Gpt2Encoder)


def download_and_prepare(args):
    listed = list_parquet(args.url, SAMPLES[args.version])
    if args.shards > len(listed):
        raise UsageError(f"--shards {args.shards}: the sample has {len(listed)} Parquet files")
    encoder = make_encoder(args.tokenizer, args.vocab_dir)
    paths = [fetch(args.url, DATASET, path, args.out) for path in listed[: args.shards]]
    faults = Faults(skip=args.on_error == "skip")
    result = prepare(paths, args.out, "fineweb", encoder, vocab_dir=args.vocab_dir, shard_tokens=args.shard_tokens,
                     validation_fraction=args.val_fraction, faults=faults, workers=args.workers)
    report(result, args.out, "fineweb", encoder, faults)


def main(argv):
    parser = OneLineParser(description="Downloads FineWeb and makes token shards of it.")
    parser.add_argument("--version", choices=tuple(SAMPLES), default="10B", help="tokens (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, metavar="N",
                        help="Parquet files, or training shards with --pretokenized (default: %(default)s)")
    parser.add_argument("--pretokenized", action="store_true",
                        help="shards of GPT-2 tokens instead of text; 100B is FineWeb-Edu")
    parser.add_argument("--out", default="data/fineweb", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--url", default=os.environ.get("HF_ENDPOINT", HUB), help="Hugging Face or a mirror of it")
    parser.add_argument("--val-fraction", type=float, default=0.001, help="default: %(default)s")
    add_on_error_argument(parser)
    add_tokenizer_arguments(parser)
    add_shard_arguments(parser)
    args = parser.parse_args(argv)
    check_tokenizer_arguments(args)
    check_shard_arguments(args)
    if args.shards < 1:
        raise UsageError(f"--shards must be at least 1, not {args.shards}")
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val-fraction must be from 0 to below 1, not {args.val_fraction}")
    args.url = args.url.rstrip("/")
    os.makedirs(args.out, exist_ok=True)
    (download_pretokenized if args.pretokenized else download_and_prepare)(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
