"""encoders.py: text to token ids: GPT-2's byte-pair encoding through tiktoken, or plain bytes, which need no
vocabulary.
"""
import heapq
import json
import os
import sys

import numpy as np

from errors import DataError, UsageError

from compressed import check_regular
from faults import Fault

END_OF_TEXT = b"<|endoftext|>"
# GPT-2's pre-tokenization (Radford et al., 2019).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


# tiktoken takes the square of a piece's length, and its stack overflows on a million spaces: longer ones are merged here.
LONG_PIECE = 2048


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
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            ids = json.load(file)
        ranks = {bytes(byte_of[c] for c in text): rank for text, rank in ids.items() if text != END_OF_TEXT.decode()}
        whole = sorted(ranks.values()) == list(range(Gpt2Encoder.end_of_text))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; --vocab-dir needs GPT-2's encoder.json") from None
    except Fault as fault:
        raise UsageError(f"{path}: {fault}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not GPT-2's vocabulary ({type(error).__name__}: {error})") from None
    if not whole:
        raise DataError(f"{path}: not GPT-2's vocabulary ({len(ranks)} tokens, expected {Gpt2Encoder.end_of_text})")
    return ranks


def merge_bytes(piece, ranks):
    """The token ids of a piece of text (bytes) by byte-pair encoding: the pair of the lowest rank, of these the first one,
    is merged again and again. The same ids as tiktoken's, in time n log n for n bytes."""
    parts = [piece[place : place + 1] for place in range(len(piece))] + [None]
    following, previous = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    queue = []

    def offer(left, right):
        rank = ranks.get(parts[left] + parts[right]) if right < len(piece) else None
        if rank is not None:
            heapq.heappush(queue, rank << 40 | left)

    for place in range(len(piece)):
        offer(place, place + 1)
    while queue:
        rank, left = queue[0] >> 40, heapq.heappop(queue) & (1 << 40) - 1
        right = following[left]
        if parts[left] is None or right >= len(piece) or ranks.get(parts[left] + parts[right]) != rank:
            continue  # one of the two has been merged since
        parts[left], parts[right] = parts[left] + parts[right], None
        following[left] = following[right]
        previous[following[left]] = left
        offer(left, following[left])
        if previous[left] >= 0:
            offer(previous[left], left)
    return [ranks[part] for part in parts if part is not None]


def _has_long_piece(text):
    """Whether there may be a piece of more than LONG_PIECE bytes; false only where there is none."""
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    spaces = (data == 0x20) | (data == 0x0A)
    ends = np.flatnonzero(spaces[1:] & (data[:-1] > 0x20) & (data[:-1] < 0x80))  # a piece ends before such a space
    return bool(len(data)) and np.diff(ends, prepend=-1, append=len(data) - 1).max() > LONG_PIECE


class Gpt2Encoder:
    name, vocabulary, end_of_text = "gpt2", 50257, 50256

    def __init__(self, vocab_dir=None):
        """From encoder.json in vocab_dir, else as tiktoken has it (its cache, or the network)."""
        try:
            import tiktoken
        except ImportError:
            raise DataError("GPT-2's tokenizer needs the package tiktoken: .venv/bin/pip install tiktoken") from None
        if vocab_dir is not None:
            self._ranks = read_ranks(os.path.join(vocab_dir, "encoder.json"))
            self._encoding = tiktoken.Encoding(
                "gpt2",
                pat_str=GPT2_PATTERN,
                mergeable_ranks=self._ranks,
                special_tokens={END_OF_TEXT.decode(): self.end_of_text},
                explicit_n_vocab=self.vocabulary,
            )
            return
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
            self._ranks = self._encoding._mergeable_ranks
        except Exception as error:  # whatever the network and its library come up with
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"cannot load GPT-2's vocabulary ({type(error).__name__}: {reason}); "
                "pass --vocab-dir DIR with encoder.json, or --tokenizer bytes"
            ) from None

    def encode(self, text):
        ids = self._encode_around_long_pieces(text) if _has_long_piece(text) else self._encoding.encode_ordinary(text)
        return np.array(ids, dtype=np.uint16)

    def _encode_around_long_pieces(self, text):
        import regex  # comes with tiktoken

        encode, ids, done, safe, after = self._encoding.encode_ordinary, [], 0, 0, []
        for piece in regex.finditer(GPT2_PATTERN, text):
            start, end = piece.span()
            if start == done or not text[start - 1].isspace():  # how white space is cut depends on what follows it
                safe, after = start, []
            if end - start > LONG_PIECE // 4:  # characters, of up to four bytes
                ids += encode(text[done:safe])
                for short in after:
                    ids += encode(short)
                ids += merge_bytes(piece[0].encode("utf-8"), self._ranks)
                done = end
            else:
                after.append(piece[0])
        return ids + encode(text[done:])

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
