"""GPT-2's byte-pair encoding, from the merges that travel with the package: no download, on any machine."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
from importlib import resources

import tiktoken

EOT = 50256  # <|endoftext|>, in front of every document

# The files that OpenAI released and tiktoken itself checks (tiktoken_ext/openai_public.py, gpt2()).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# GPT-2's split into words, in the equivalent spelling without backtracking that tiktoken uses for its own gpt2.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def encoding() -> tiktoken.Encoding:
    """tiktoken's `gpt2` encoding; text that reads <|endoftext|> is text to `encode_ordinary`, never token 50256."""
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=mergeable_ranks(),
        special_tokens={"<|endoftext|>": EOT},
    )


@functools.cache
def vocab_bpe() -> str:
    """The text of OpenAI's vocab.bpe, one merge a line, checked against its published hash."""
    content = lzma.decompress(resources.files("gpt2core").joinpath("assets/vocab.bpe.xz").read_bytes())
    if hashlib.sha256(content).hexdigest() != VOCAB_BPE_SHA256:
        raise ValueError("gpt2core/assets/vocab.bpe.xz is damaged: install the package again")
    return content.decode("utf-8")


def encoder_json() -> str:
    """The text of OpenAI's encoder.json (token to id), rebuilt from the merges byte for byte."""
    return json.dumps({token: rank for rank, token in enumerate([*_tokens(), "<|endoftext|>"])})


def mergeable_ranks() -> dict[bytes, int]:
    """Each token's bytes with its rank, as tiktoken wants them."""
    byte_of = {character: byte for byte, character in _printable_bytes().items()}
    return {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(_tokens())}


def _tokens() -> list[str]:
    """All 50,256 ordinary tokens in rank order: the 256 bytes, then one for each merge."""
    merges = vocab_bpe().split("\n")[1:-1]  # the first line names the version, the last is empty
    return [*_printable_bytes().values(), *(merge.replace(" ", "") for merge in merges)]


def _printable_bytes() -> dict[int, str]:
    """GPT-2's stand-in character for each byte, in rank order: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
