"""Who is asked what: the study's design, and the sheet of questions of each rater.

The comparisons (pair of methods, picture) stand in one fixed cycle. Rater r takes the next `questions` of them, so over
all raters every pair of methods, and every comparison, is asked equally often, give or take one. A comparison swaps its
sides each time the cycle comes round, and the uses of a pair within a cycle alternate. Then the rater's own order is
drawn and catch trials are strewn in.

"Random" means sorted by a hash of (seed, rater, what): the same on every machine and with every library version, so a
sheet can be made again whenever it is needed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coherent_ddrm.errors import UserError

FILE = "study.json"
PICTURES = "pictures"
PictureId = Annotated[str, Field(pattern=r"^[0-9a-f]{24}$")]  # random: tells nothing of picture or method


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Catch(_Strict):
    """A question with a known answer: the truth against a broken hole."""

    truth: PictureId  # the same picture as the reference under another id, so the id does not give it away
    broken: PictureId


class Picture(_Strict):
    """One picture of the study; each id is a file in `pictures/`."""

    name: str
    truth: PictureId
    input: PictureId  # the truth with a transparent hole
    results: list[PictureId]  # in the order of the study's methods
    catch: Catch | None = None


class Study(_Strict):
    """study.json: all that is asked, and the key to who made what. Raters see none of the names in it."""

    version: int = Field(default=1, ge=1, le=1)
    id: PictureId
    title: str
    prompt: str
    seed: int = Field(ge=0)
    questions: int = Field(ge=1)
    catches: int = Field(ge=0)
    methods: list[str] = Field(min_length=2)
    pictures: list[Picture] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        if any(len(picture.results) != len(self.methods) for picture in self.pictures):
            raise ValueError("a picture has not one result per method")
        if self.questions > len(self.pairs) * len(self.pictures):
            raise ValueError(f"questions: {self.questions}, but there are only {len(self.pairs) * len(self.pictures)}")
        if self.catches and not any(picture.catch for picture in self.pictures):
            raise ValueError("catches are asked for, but no picture has one")
        return self

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of methods, by index."""
        return list(combinations(range(len(self.methods)), 2))


@dataclass(frozen=True)
class Question:
    """Two pictures side by side, under the truth and the input, all by id."""

    truth: str
    input: str
    left: str
    right: str

    def public(self) -> dict[str, str]:
        """What a rater's browser may know."""
        return {"truth": self.truth, "input": self.input, "left": self.left, "right": self.right}


def load(folder: Path) -> Study:
    """The study in a folder. UserError when there is none, or it is damaged."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no study here; make one with coherent-ddrm study create")
    try:
        return Study.model_validate_json((folder / FILE).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{folder / FILE}: {where}: {first['msg']}; create the study again") from error


def sheet(study: Study, rater: int) -> list[Question]:
    """The questions of rater number `rater`, in the order they are asked."""
    start = rater * study.questions
    asked = [_comparison(study, start + i) for i in range(study.questions)]
    order = _shuffled(len(asked), study.seed, "order", rater)
    return _strewn([asked[i] for i in order], _catches(study, rater), study.seed, rater)


def draw(seed: int, *words: int | str) -> int:
    """A number from 0 to 2^64 - 1 that looks random and is always the same for the same words."""
    digest = hashlib.blake2b(json.dumps([seed, *words]).encode(), digest_size=8).digest()
    return int.from_bytes(digest)


@lru_cache(maxsize=1024)
def _shuffled(count: int, seed: int, *words: int | str) -> tuple[int, ...]:
    """0 to count - 1 in an order drawn from the seed and the words."""
    return tuple(sorted(range(count), key=lambda i: draw(seed, *words, i)))


def _comparison(study: Study, slot: int) -> Question:
    """Comparison number `slot` of the endless cycle: blocks of one comparison per pair, on pictures far apart."""
    pairs, count = study.pairs, len(study.pictures)
    block, within = divmod(slot, len(pairs))
    turn, place = divmod(block, count)
    pair = _shuffled(len(pairs), study.seed, "pairs", place)[within]
    offset = pair * count // len(pairs)  # a rater who asks no more than there are pictures seldom meets one twice
    picture = study.pictures[_shuffled(count, study.seed, "pictures")[(place + offset) % count]]
    first, second = (picture.results[method] for method in pairs[pair])
    if (place + turn + draw(study.seed, "side", pair)) % 2:
        first, second = second, first
    return Question(picture.truth, picture.input, first, second)


def _catches(study: Study, rater: int) -> list[Question]:
    """The rater's catch trials; half of them with the truth on the left, give or take one."""
    usable = [picture for picture in study.pictures if picture.catch]
    if not study.catches:
        return []
    order = _shuffled(len(usable), study.seed, "catch", rater)
    sides = _shuffled(study.catches, study.seed, "catch side", rater)
    extra = draw(study.seed, "catch first", rater)
    found = []
    for i in range(study.catches):
        picture = usable[order[i % len(order)]]
        good, bad = picture.catch.truth, picture.catch.broken
        left, right = (good, bad) if (sides[i] + extra) % 2 else (bad, good)
        found.append(Question(picture.truth, picture.input, left, right))
    return found


def _strewn(asked: list[Question], catches: list[Question], seed: int, rater: int) -> list[Question]:
    """One catch trial at a drawn place of each equal part of the sheet."""
    total = len(asked) + len(catches)
    edges = [i * total // max(1, len(catches)) for i in range(len(catches) + 1)]
    places = {
        low + draw(seed, "place", rater, i) % (high - low): catches[i] for i, (low, high) in enumerate(pairwise(edges))
    }
    rest = iter(asked)
    return [places[i] if i in places else next(rest) for i in range(total)]
