"""Emoji data for the text-to-image teacher: read the shard, split it without a leak, write the captions that ship.

    python tools/emoji_data.py --data ../shared/data/emoji --out assets/emoji

The images are Google's Noto Emoji, 64×64 on white. The split is by *base emoji*: skin tones, genders and directions of
one emoji are one base and fall on one side. A base is held out only if each word of its captions is left in the captions
of at least three training bases: a held-out caption is a new sentence made of known words ("orange heart"), and not
a word that the teacher has never read, of which nothing could be expected.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HELD_OUT_PART = 10  #: at most one base in ten is held out
KNOWN_IN = 3  #: training bases that must have each word of a held-out caption

# code points that make a variant of one emoji: five skin tones, joiner, variation selector, two genders, direction
_VARIANT = re.compile("1f3f[b-f]|200d|fe0f|2640|2642|27a1")
# emoji that Unicode encodes apart though they differ in gender only; the first of a line stands for all of it
_SAME = (
    "1f9d1 1f468 1f469", "1f9d2 1f466 1f467", "1f9d3 1f474 1f475", "1fac5 1f934 1f478", "1f57a 1f483",
    "1f385 1f936", "1f930 1fac3 1fac4", "1f46d 1f46b 1f46c",
)  # fmt: skip
_STANDS_FOR = {code: line.split()[0] for line in _SAME for code in line.split()}
_PERSON, _CHILD, _FAMILY = "1f9d1", "1f9d2", "1f46a"
_WORD = re.compile("[a-z]+|[0-9]")


def base_emoji(code: str) -> str:
    """What an emoji is a variant of: its code points without skin tone, gender and direction.

    >>> base_emoji("1f469-1f3fc-200d-1f52c") == base_emoji("1f9d1-200d-1f52c")  # woman scientist, scientist
    True
    """
    parts = [_STANDS_FOR.get(part, part) for part in code.split("-") if not _VARIANT.fullmatch(part)]
    people = [part in (_PERSON, _CHILD, _FAMILY) for part in parts]
    if not parts:
        return code
    if _PERSON in parts and "1f48b" in parts:  # two people and a kiss mark
        return "1f48f"
    if _PERSON in parts and "2764" in parts:  # two people and a heart
        return "1f491"
    if parts == [_PERSON, "1f91d", _PERSON]:  # holding hands
        return "1f46d"
    if parts == ["1faf1", "1faf2"]:  # two hands of two skin tones
        return "1f91d"
    if parts == [_PERSON, "1f384"]:  # the third Father Christmas
        return "1f385"
    if all(people) and (len(parts) > 1 or parts == [_FAMILY]):
        return _FAMILY
    return "-".join(parts)


def caption_words(row: Mapping[str, str]) -> set[str]:
    """The words and digits of a row's caption."""
    return set(_WORD.findall(row["caption"].lower()))


def held_out_bases(rows: Sequence[Mapping[str, str]]) -> set[str]:
    """The bases to hold out, walked in the order of their SHA-256: the same on every machine."""
    words: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        words[row["base"]] |= caption_words(row)
    bases_with = Counter(word for known in words.values() for word in known)
    held_out: set[str] = set()
    for base in sorted(words, key=lambda b: hashlib.sha256(b.encode()).hexdigest()):
        if len(held_out) < len(words) // HELD_OUT_PART and all(bases_with[word] > KNOWN_IN for word in words[base]):
            held_out.add(base)
            bases_with.subtract(words[base])
    return held_out


def read_rows(data: Path) -> list[dict[str, str]]:
    """The lines of captions.jsonl with ``base`` and ``split`` added."""
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        mistaken = re.fullmatch("flag of ([A-Z]{2}[A-Z ]+)", row["caption"])  # "flag of WHITE" is a white flag
        row["caption"] = f"{mistaken[1].lower()} flag" if mistaken else row["caption"].lower()
        row["base"] = base_emoji(row["code"])
    held_out = held_out_bases(rows)
    for row in rows:
        row["split"] = "heldout" if row["base"] in held_out else "train"
    return rows


def read_images(data: Path, rows: Sequence[Mapping[str, str]]) -> Tensor:
    """(N, 3, 64, 64) uint8 images of the rows, in their order."""
    images = {}
    with tarfile.open(data / "emoji64.tar") as archive:
        for member in archive:
            if member.name.endswith(".webp"):
                file = archive.extractfile(member)
                assert file is not None
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                images[Path(member.name).stem] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return torch.stack([images[row["key"]] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/emoji"), help="folder with captions.jsonl and emoji64.tar")
    parser.add_argument("--out", type=Path, default=Path("assets/emoji"), help="folder to write")
    arguments = parser.parse_args()
    rows = read_rows(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        part = [row for row in rows if row["split"] == split]
        kept = ("key", "caption", "short", "category", "code", "base")
        lines = [json.dumps({name: row[name] for name in kept}, ensure_ascii=False) for row in part]
        (arguments.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{split}: {len(part)} images of {len({row['base'] for row in part})} bases")


if __name__ == "__main__":
    main()
