"""43 million characters of English technical prose from four of Debian's packages, as one .jsonl.

    apt-get download linux-doc-6.1 anarchism perl-doc debian-handbook
    python assets/recipes/text.py *.deb --output prose.jsonl

It takes .rst and .pod files as they are, and .html without its tags. Of the handbook it takes the
English edition, of the kernel's and Perl's documents all but the translations. The kernel's .html is
made from its .rst and left out. It cuts every file between paragraphs into pieces of about 8,000
characters and shuffles the pieces of all files: in the order of the files, a million tokens would
come from one book. It prints how much there is, and the SHA-256 of the result.
"""

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import tempfile
from pathlib import Path

LENGTH = 8000  # characters of a piece, or a paragraph more
NOT_ENGLISH = ("perlcn.pod", "perljp.pod", "perlko.pod", "perltw.pod")


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
    if "translations" in path.parts or name in NOT_ENGLISH:  # the folder is the kernel's
        return False
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="+", help="Debian packages, .deb")
    parser.add_argument("--output", required=True, help="a .jsonl file that does not exist yet")
    given = parser.parse_args()
    if Path(given.output).exists():
        parser.error(f"{given.output} exists; name another --output")

    pieces = []
    with tempfile.TemporaryDirectory() as place:
        for package in given.packages:
            subprocess.run(["dpkg-deb", "-x", package, place], check=True)
        files = [path for path in Path(place).rglob("*") if path.is_file() and is_wanted(path)]
        for path in sorted(files):
            if not path.is_symlink():
                pieces.extend(pieces_of(text_of(path)))
    pieces = sorted(set(pieces))  # each once
    random.Random(0).shuffle(pieces)

    lines = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    Path(given.output).write_text(lines)
    print(f"{len(pieces):,} pieces, {sum(map(len, pieces)):,} characters")
    print("SHA-256", hashlib.sha256(lines.encode()).hexdigest())


if __name__ == "__main__":
    main()
