"""GPT-2's byte-pair encoding, from the merges that travel with the package: no download, on any machine."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import resources

import numpy as np
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


Encode = Callable[[str], np.ndarray]

PIECE_CHARACTERS = 1 << 20  # longer texts are encoded piece by piece, to bound memory
LONGEST_WORD = 8 << 20  # characters that tiktoken may get at once; it needs some 50 bytes for each

# Where no token of SPLIT_PATTERN ever crosses: from anything into whitespace, from a letter into what is none, from a
# digit into what is none. Only characters whose class is the same in every version of Unicode take part.
BREAK = re.compile(
    r"(?<=\S)(?=[ \n\t\r])"
    r"|(?<=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[!-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1f])"
    r"|(?<=[0-9])(?=[!-/:-~])"
)


class UncuttableTextError(ValueError):
    """A text is too long to be encoded at once and offers no place to cut it."""


def encoder(library: str = "tiktoken") -> Encode:
    """A function from text to its tokens, (number of tokens,) uint16, by tiktoken or the quicker riptoken.

    Raises ValueError when riptoken is not installed.
    """
    if library == "tiktoken":
        to_numpy = encoding().encode_to_numpy
        return lambda text: _with_valid_unicode(
            lambda text: to_numpy(text, disallowed_special=()).astype(np.uint16), text
        )
    try:
        import riptoken
    except ImportError:
        raise ValueError("--encoder riptoken: it is not installed; pip install 'gpt2-pipeline[fast]'") from None
    to_list = riptoken.CoreBPE(mergeable_ranks(), {"<|endoftext|>": EOT}, SPLIT_PATTERN).encode_ordinary
    return lambda text: _with_valid_unicode(lambda text: np.array(to_list(text), np.uint16), text)


def _with_valid_unicode(encode: Encode, text: str) -> np.ndarray:
    """Lone surrogates, which JSON can spell, become U+FFFD, as in tiktoken's encode_ordinary."""
    try:
        return encode(text)
    except UnicodeEncodeError:
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def pieces(chunks: Iterable[str], size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The same text in pieces of about `size` characters whose tokens, end to end, are the tokens of the whole.

    Raises UncuttableTextError when LONGEST_WORD characters in a row offer no place to cut.
    """
    text = ""
    for chunk in chunks:
        searched = len(text)
        text += chunk
        if len(text) < size:
            continue
        if end := _last_cut(text, searched):
            yield text[:end]
            text = text[end:]
        elif len(text) > LONGEST_WORD:
            raise UncuttableTextError(
                f"it has more than {LONGEST_WORD:,} characters in a row without a break between words"
            )
    if text:
        yield text


def _last_cut(text: str, start: int) -> int:
    """The last place from `start` on where the text can be cut, 0 when there is none; looks from the end."""
    window = 4096
    while True:
        since = max(start, len(text) - window)
        if cut := max((match.start() for match in BREAK.finditer(text, since)), default=0):
            return cut
        if since == start:
            return 0
        window *= 16


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


@functools.cache
def token_bytes() -> np.ndarray:
    """How many bytes of text each token stands for, (50257,) int64; <|endoftext|> for none."""
    return np.array([*map(len, mergeable_ranks()), 0], np.int64)


def _tokens() -> list[str]:
    """All 50,256 ordinary tokens in rank order: the 256 bytes, then one for each merge."""
    merges = vocab_bpe().split("\n")[1:-1]  # the first line names the version, the last is empty
    return [*_printable_bytes().values(), *(merge.replace(" ", "") for merge in merges)]


def _printable_bytes() -> dict[int, str]:
    """GPT-2's stand-in character for each byte, in rank order: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
