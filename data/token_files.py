"""token_files.py: the binary files of docs/data.md: token shards, tokenizer.bin and multiple-choice questions. Tokens are
streamed to disk, so memory does not grow with the size of a shard; a file gets its name only when it is complete.
"""
import contextlib
import glob
import os

from errors import DataError, names_the_file

import numpy as np

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
QUESTIONS_MAGIC, QUESTIONS_VERSION = 20240522, 1
QUESTION_BEGINS = 2**16 - 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_SHARD_TOKENS = 2**31 - 1


def read_shard(path):
    """Returns (tokens as a uint16 array, vocabulary) of an llm.c shard; ValueError when it is not a whole one."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not an llm.c token shard")
    tokens = np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)
    if len(tokens) != header[2]:
        raise ValueError(f"{path}: the header says {header[2]} tokens, the file has {len(tokens)}")
    return tokens, int(header[3]) or 50257


def _header(words):
    header = np.zeros(256, dtype="<i4")
    header[: len(words)] = words
    return header.tobytes()


@contextlib.contextmanager
def _written_whole(path):
    """Yields a file that gets the name `path` when all has been written."""
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with names_the_file(path), open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_tokenizer(path, tokens, end_of_text):
    """Writes llm.c's tokenizer.bin, version 2. tokens: the bytes (at most 255) of each id."""
    with _written_whole(path) as file:
        file.write(_header([TOKENIZER_MAGIC, TOKENIZER_VERSION, len(tokens), end_of_text]))
        for token in tokens:
            file.write(bytes([len(token)]) + token)


def write_questions(path, questions, vocabulary):
    """Writes llm.c's file of multiple-choice questions. questions: (context, endings, the index of the right ending), the
    context and each ending an array of token ids. DataError for what the format's 16-bit numbers cannot hold."""
    if not 1 <= len(questions) <= 2**16:
        raise DataError(f"{path}: the format holds 1 to {2**16:,} questions, not {len(questions):,}")
    parts, longest = [], 0
    for index, (context, endings, right) in enumerate(questions):
        words = [QUESTION_BEGINS, 0, index, right, len(endings)]
        for tokens in (context, *endings):
            words += [len(tokens), *tokens]
        words[1] = len(words) * TOKEN_BYTES
        if words[1] >= 2**16:
            raise DataError(f"{path}: question {index} has {len(words):,} tokens, the format holds {2**15 - 1:,}")
        parts.append(np.array(words, dtype="<u2"))
        longest = max(longest, words[1])
    with _written_whole(path) as file:
        file.write(_header([QUESTIONS_MAGIC, QUESTIONS_VERSION, len(questions), longest, vocabulary]))
        file.write(np.concatenate(parts).tobytes())


class ShardWriter:
    """Collects the tokens of one split in temporary files of shard_tokens each, named by commit() all at once.

    Use as a context manager: what was not committed is removed on the way out.
    """

    def __init__(self, directory, vocabulary, shard_tokens):
        self.directory, self.vocabulary, self.shard_tokens = directory, vocabulary, shard_tokens
        self.lengths = []  # tokens in each temporary file
        self._open = None
        self._stem = os.path.join(directory, f".shard.tmp.{os.getpid()}.{id(self):x}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._close()
        finally:
            self._remove_temporaries()

    @property
    def total(self):
        return sum(self.lengths)

    def append(self, tokens):
        """tokens: a uint16 array."""
        tokens = np.ascontiguousarray(tokens, dtype="<u2")
        while len(tokens):
            if self._open is None or self.lengths[-1] == self.shard_tokens:
                self._next_file()
            part = tokens[: self.shard_tokens - self.lengths[-1]]
            with names_the_file(self._temporary(len(self.lengths) - 1)):
                self._open.write(part.tobytes())
            self.lengths[-1] += len(part)
            tokens = tokens[len(part) :]

    def take_tail(self, count):
        """Removes and returns the last `count` tokens, or fewer: one at least stays."""
        self._close()
        while len(self.lengths) > 1 and self.lengths[-1] <= count:
            self._join_last()
        count = min(count, self.lengths[-1] - 1)
        with open(self._temporary(len(self.lengths) - 1), "r+b") as file:
            cut = HEADER_BYTES + (self.lengths[-1] - count) * TOKEN_BYTES
            file.seek(cut)
            tail = np.frombuffer(file.read(), dtype="<u2")
            file.truncate(cut)
        self.lengths[-1] -= count
        return tail

    def take_all(self):
        """Removes and returns all tokens, of a split that is small."""
        self._close()
        parts = [np.fromfile(self._temporary(index), "<u2", offset=HEADER_BYTES) for index in range(len(self.lengths))]
        self._remove_temporaries()
        return np.concatenate([np.zeros(0, "<u2"), *parts])

    def commit(self, name, split):
        """Names the files NAME_SPLIT_000000.bin and so on; removes older ones of that name with higher numbers.

        A last shard of less than a tenth of shard_tokens joins the one before, so that none is too short to be read.
        Returns the paths.
        """
        self._close()
        if len(self.lengths) > 1 and self.lengths[-1] * 10 < self.shard_tokens:
            self._join_last()
        paths = []
        for index, length in enumerate(self.lengths):
            with names_the_file(self._temporary(index)), open(self._temporary(index), "r+b") as file:
                file.write(_header([SHARD_MAGIC, SHARD_VERSION, length, self.vocabulary]))
                file.flush()
                os.fsync(file.fileno())
            paths.append(os.path.join(self.directory, f"{name}_{split}_{index:06d}.bin"))
        for index, path in enumerate(paths):
            os.replace(self._temporary(index), path)
        pattern = os.path.join(glob.escape(self.directory), f"{glob.escape(name)}_{split}_" + "[0-9]" * 6 + ".bin")
        for stale in set(glob.glob(pattern)) - set(paths):
            os.remove(stale)
        self.lengths = []
        return paths

    def _temporary(self, index):
        return f"{self._stem}.{index}"

    def _remove_temporaries(self):
        for index in range(len(self.lengths)):
            if os.path.exists(self._temporary(index)):
                os.remove(self._temporary(index))
        self.lengths = []

    def _next_file(self):
        self._close()
        self.lengths.append(0)
        self._open = open(self._temporary(len(self.lengths) - 1), "wb")
        self._open.write(bytes(HEADER_BYTES))

    def _close(self):
        if self._open is not None:
            file, self._open = self._open, None
            with names_the_file(self._temporary(len(self.lengths) - 1)):
                file.close()

    def _join_last(self):
        with open(self._temporary(len(self.lengths) - 1), "rb") as file:
            file.seek(HEADER_BYTES)
            tail = file.read()
        with open(self._temporary(len(self.lengths) - 2), "ab") as file:
            file.write(tail)
        os.remove(self._temporary(len(self.lengths) - 1))
        last = self.lengths.pop()
        self.lengths[-1] += last
