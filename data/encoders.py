"""encoders.py: text to token ids: GPT-2's byte-pair encoding through tiktoken, or plain bytes, which need no
vocabulary.
"""
import json
import os
import sys

import numpy as np

from errors import DataError, UsageError

END_OF_TEXT = b"<|endoftext|>"
# GPT-2's pre-tokenization (Radford et al., 2019).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class ByteEncoder:
    name, vocabulary, end_of_text = "bytes", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self):
        return [bytes([byte]) for byte in range(256)] + [END_OF_TEXT]


def read_ranks(path):
    """The merge ranks {bytes: id} of GPT-2's encoder.json: its ids are in the order of the merges.

    (tiktoken's own reader of this file and vocab.bpe needs another package in some versions.)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
    others = [byte for byte in range(256) if byte not in printable]  # these are written as the characters from 256 on
    byte_of = {chr(byte): byte for byte in printable}
    byte_of.update({chr(256 + place): byte for place, byte in enumerate(others)})
    try:
        with open(path, encoding="utf-8") as file:
            ids = json.load(file)
        ranks = {bytes(byte_of[c] for c in text): rank for text, rank in ids.items() if text != END_OF_TEXT.decode()}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; --vocab-dir needs GPT-2's encoder.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not GPT-2's vocabulary ({type(error).__name__}: {error})") from None
    if sorted(ranks.values()) != list(range(Gpt2Encoder.end_of_text)):
        raise DataError(f"{path}: not GPT-2's vocabulary ({len(ranks)} tokens, expected {Gpt2Encoder.end_of_text})")
    return ranks


class Gpt2Encoder:
    name, vocabulary, end_of_text = "gpt2", 50257, 50256

    def __init__(self, vocab_dir=None):
        """From encoder.json in vocab_dir, else as tiktoken has it (its cache, or the network)."""
        try:
            import tiktoken
        except ImportError:
            raise DataError("GPT-2's tokenizer needs the package tiktoken: .venv/bin/pip install tiktoken") from None
        if vocab_dir is not None:
            self._encoding = tiktoken.Encoding(
                "gpt2",
                pat_str=GPT2_PATTERN,
                mergeable_ranks=read_ranks(os.path.join(vocab_dir, "encoder.json")),
                special_tokens={END_OF_TEXT.decode(): self.end_of_text},
                explicit_n_vocab=self.vocabulary,
            )
            return
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network and its library come up with
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"cannot load GPT-2's vocabulary ({type(error).__name__}: {reason}); "
                "pass --vocab-dir DIR with encoder.json, or --tokenizer bytes"
            ) from None

    def encode(self, text):
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def token_bytes(self):
        tokens = [self._encoding.decode_single_token_bytes(token) for token in range(self.end_of_text)]
        return tokens + [END_OF_TEXT]


def make_encoder(tokenizer, vocab_dir=None):
    """tokenizer: 'gpt2', 'bytes', or 'auto': GPT-2's where its vocabulary can be had, else bytes, saying so."""
    if tokenizer == "bytes":
        return ByteEncoder()
    if tokenizer == "gpt2" or vocab_dir is not None:
        return Gpt2Encoder(vocab_dir)
    try:
        return Gpt2Encoder()
    except DataError as error:
        print(f"tokenizing bytes (vocabulary 257): {error}", file=sys.stderr)
        return ByteEncoder()
