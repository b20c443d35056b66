#!/usr/bin/env python3
"""tinyshakespeare.py: downloads Karpathy's tiny Shakespeare (1.1 MB) and makes its shards: every speech is a document,
and the first tokens are held out, 32,768 of them with GPT-2's tokenizer, exactly as in llm.c.
"""
import os
import sys

from errors import DataError, OneLineParser, run_main

from download import download
from encoders import make_encoder
from prepare import (
    add_shard_arguments, add_tokenizer_arguments, check_shard_arguments, check_tokenizer_arguments, encode_parts, report,
)
from token_files import ShardWriter, write_tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VALIDATION_TOKENS = {"gpt2": 32_768, "bytes": 111_540}  # about a tenth of the text


def read_speeches(path):
    """Each with the empty line after it, which llm.c leaves in the text."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8, so not the text expected; remove it and run again") from None
    speeches = [speech + "\n\n" for speech in text.split("\n\n")]
    speeches[-1] = speeches[-1][:-2]
    return [speech for speech in speeches if not speech.isspace() and speech]


def main(argv):
    parser = OneLineParser(description="Downloads tiny Shakespeare and makes token shards of it.")
    parser.add_argument("--out", default="data/tinyshakespeare", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--url", default=URL, help="of the text (default: %(default)s)")
    add_tokenizer_arguments(parser)
    add_shard_arguments(parser)
    args = parser.parse_args(argv)
    check_tokenizer_arguments(args)
    check_shard_arguments(args)
    os.makedirs(args.out, exist_ok=True)
    sha256 = SHA256 if args.url == URL else None
    path = download(args.url, os.path.join(args.out, "tinyshakespeare.txt"), sha256=sha256)
    encoder = make_encoder(args.tokenizer, args.vocab_dir)
    tokens, _ = encode_parts(encoder, ((speech, True, False) for speech in read_speeches(path)))
    held_out = min(VALIDATION_TOKENS[encoder.name], len(tokens) // 2)
    result = {}
    for split, part in (("val", tokens[:held_out]), ("train", tokens[held_out:])):
        with ShardWriter(args.out, encoder.vocabulary, args.shard_tokens) as writer:
            writer.append(part)
            result[split] = (writer.commit("tinyshakespeare", split), len(part))
    write_tokenizer(os.path.join(args.out, "tokenizer.bin"), encoder.token_bytes(), encoder.end_of_text)
    report(result, args.out, "tinyshakespeare", encoder)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
