"""The tokenizer is OpenAI's, byte for byte and token for token."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core.tokenizer import (
    ENCODER_JSON_SHA256,
    EOT,
    PIECE_CHARACTERS,
    VOCAB_BPE_SHA256,
    UncuttableTextError,
    encoder,
    encoder_json,
    encoding,
    mergeable_ranks,
    pieces,
    vocab_bpe,
)

SHAKESPEARE = Path(__file__).parents[1] / "data" / "sample" / "tinyshakespeare.txt"

# Where tiktoken's own gpt2 takes its files from; it keeps them under the sha1 of these addresses.
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"

TEXTS = [
    "",
    " ",
    "Hello, world",
    "I'll say it's what they've done, we'd don't I'm you're HE'LL",
    "naïve café — “quotes” … Ærøskøbing Straße",
    "Привет, мир! Γειά Κόσμε",
    "日本語のテキスト、中文文本, 한국어 텍스트",
    "مرحبا بالعالم שלום עולם नमस्ते",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇩🇪 e\u0301 combining \u200b zero width \ufeff mark",
    "a  b   c\t\td\n\n\ne \r\n f   ",
    "\n\n\n",
    "\u00a0\u2003\u3000 odd spaces \u2028 line",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0x1F}  # 3.14e-10\n\tpass\n",
    "1234567890 12,345.67 ½ ² Ⅷ ٣",
    "<|endoftext|>",
    "before<|endoftext|>after",
    "\x00\x01\x7f control",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def test_the_files_are_openais_own():
    published = (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    assert published == (VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    assert hashlib.sha256(vocab_bpe().encode("utf-8")).hexdigest() == VOCAB_BPE_SHA256
    assert hashlib.sha256(encoder_json().encode("utf-8")).hexdigest() == ENCODER_JSON_SHA256


def test_every_text_gets_the_tokens_of_tiktokens_own_gpt2(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, content in (("vocab.bpe", vocab_bpe()), ("encoder.json", encoder_json())):
        (cache / hashlib.sha1(f"{OPENAI}/{name}".encode()).hexdigest()).write_bytes(content.encode("utf-8"))
    texts = [*TEXTS, SHAKESPEARE.read_text(encoding="utf-8")]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, pathlib, tiktoken\n"
        "gpt2 = tiktoken.get_encoding('gpt2')\n"
        "texts = json.loads(pathlib.Path('texts.json').read_text())\n"
        "print(json.dumps([gpt2.n_vocab, gpt2.eot_token, [gpt2.encode_ordinary(text) for text in texts]]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"TIKTOKEN_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    n_vocab, eot, theirs = json.loads(answer.stdout)
    assert (encoding().n_vocab, EOT, encoding().eot_token) == (n_vocab, eot, eot) == (50257, 50256, 50256)
    for text, expected in zip(texts, theirs, strict=True):
        assert encoding().encode_ordinary(text) == expected, text[:80]
    assert len(theirs[-1]) == 338_025  # Tiny Shakespeare, as nanoGPT's data/shakespeare reports train + val


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text):
    assert encoding().decode(encoding().encode_ordinary(text)) == text


def test_endoftext_written_in_a_text_is_text():
    tokens = encoding().encode_ordinary("a<|endoftext|>b")
    assert EOT not in tokens
    assert encoding().decode(tokens) == "a<|endoftext|>b"
    assert encoding().decode([EOT]) == "<|endoftext|>"


def test_the_ranks_are_all_ids_below_endoftext():
    ranks = mergeable_ranks()
    assert sorted(ranks.values()) == list(range(50256))
    assert {bytes([byte]) for byte in range(256)} <= ranks.keys()
    vocabulary = json.loads(encoder_json())
    assert len(vocabulary) == 50257
    assert vocabulary["<|endoftext|>"] == EOT


# --- long texts, piece by piece ----------------------------------------------------------------------------------------

# What the split pattern tells apart, and what Unicode's and Python's notions of a space disagree on.
ALPHABET = "aZ'sé日。가07²_-!  \n\r\t\x0b\x1c\x1f\x85\xa0\u2003\u3000\u0301🙂<|>"


@given(st.text(alphabet=ALPHABET, max_size=60), st.integers(1, 20), st.integers(1, 7))
@settings(max_examples=1500, deadline=None)
def test_the_pieces_of_a_text_have_its_tokens(text, size, chunk):
    cut = list(pieces((text[at : at + chunk] for at in range(0, len(text), chunk)), size))
    assert "".join(cut) == text
    tokens = [id for piece in cut for id in encoding().encode_ordinary(piece)]
    assert tokens == encoding().encode_ordinary(text)


def test_long_texts_come_in_pieces_that_bound_memory():
    for word in ("word ", "base64+", "12-", "line\n", "日本語。"):
        text = word * (3 * PIECE_CHARACTERS // len(word))
        cut = list(pieces([text[at : at + 10_000] for at in range(0, len(text), 10_000)]))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= PIECE_CHARACTERS + 10_000


def test_a_word_too_long_to_encode_is_refused(monkeypatch):
    monkeypatch.setattr("gpt2core.tokenizer.LONGEST_WORD", 1000)
    with pytest.raises(UncuttableTextError, match="more than 1,000 characters in a row"):
        list(pieces(["a" * 100] * 20, 50))
    assert list(pieces(["a" * 100] * 9, 50)) == ["a" * 900]


@pytest.mark.parametrize("library", ["tiktoken", "riptoken"])
def test_both_libraries_give_the_tokens_of_encode_ordinary(library):
    encode = encoder(library)
    shakespeare = SHAKESPEARE.read_text(encoding="utf-8")
    for text in ["", " ", "\0\0 null\0", "<|endoftext|>", "lone \ud83d surrogate", ALPHABET * 3, shakespeare]:
        tokens = encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == encoding().encode_ordinary(text)
