"""44 million characters of technical prose from four of Debian's packages, as one .jsonl.

    apt-get download linux-doc-6.1 anarchism perl-doc debian-handbook
    python assets/recipes/text.py *.deb prose.jsonl

.rst and .pod files as they are, and .html less its tags (of the handbook in English only; the
kernel's is made from its .rst). 3 % of the characters, and 8 % of SmolLM2's tokens, are of the
kernel's documents in Chinese, Japanese and other languages. Every file is cut between paragraphs
into pieces of about 8,000 characters, and the pieces of all files are shuffled: in the order of the
files, a million tokens would be of one book. It prints how much there is, and the SHA-256 of the
result.
"""

import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTH = 8000  # characters of a piece, or a paragraph more


def text_of(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode("utf-8", "replace")
    if path.name.endswith(".html"):
        text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", text)
        text = re.sub(r"(?i)</?(p|div|h\d|li|ul|ol|tr|table|pre|br|dt|dd)\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        text = "\n".join(line.strip() for line in text.splitlines())
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def is_wanted(path):
    name = path.name.removesuffix(".gz")
    if name.endswith(".html"):
        folder = str(path.parent)
        other_language = "handbook" in folder and not folder.endswith("en-US")
        return "linux-doc" not in folder and not other_language
    return name.endswith((".rst", ".pod"))


def pieces_of(text):
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= LENGTH:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def main(*packages, output):
    pieces = []
    with tempfile.TemporaryDirectory() as place:
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, place], check=True)
        files = [path for path in Path(place).rglob("*") if path.is_file() and is_wanted(path)]
        for path in sorted(files):
            if not path.is_symlink():
                pieces.extend(pieces_of(text_of(path)))
    pieces = sorted(set(pieces))  # each once
    random.Random(0).shuffle(pieces)

    lines = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    Path(output).write_text(lines)
    print(f"{len(pieces):,} pieces, {sum(map(len, pieces)):,} characters")
    print("SHA-256", hashlib.sha256(lines.encode()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:-1], output=sys.argv[-1])
