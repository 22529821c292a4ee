"""Answers that raters of the static export send as files: untrusted, checked to the last field, then merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coherent_ddrm.errors import UserError
from coherent_ddrm.study.answers import Answer, Answers, Choice
from coherent_ddrm.study.questions import PictureId, Question, load, sheet

LARGEST = 4_000_000  # bytes; 100 answers take less than 10,000
SHEETS = 100_000


class AnswerFile(BaseModel):
    """What the page lets a rater download."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=1)
    study: PictureId
    rater: str = Field(pattern=r"^[0-9a-f]{32}$")
    sheet: int = Field(ge=0, lt=SHEETS)
    answers: list[Choice] = Field(min_length=1)


def import_files(folder: Path, files: Sequence[Path]) -> int:
    """Merge answer files into the study; returns how many answers are new. UserError names a file that cannot be.

    A file may be given again, or again with more answers. All files are read and checked before any is merged.
    """
    study = load(folder)
    read = [(file, _read(file, study.id)) for file in files]
    checked = [(file, given, _answers(file, given, sheet(study, given.sheet))) for file, given in read]
    new, answers = 0, Answers(folder)
    for file, given, found in checked:
        try:
            new += answers.merge(given.rater, given.sheet, found)
        except ValueError as error:
            raise UserError(f"{file}: {error}; nothing of this file was taken") from error
    return new


def _read(file: Path, study: str) -> AnswerFile:
    size = file.stat().st_size
    if size > LARGEST:
        raise UserError(f"{file}: {size} bytes are too many for a file of answers")
    try:
        given = AnswerFile.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{file}: no file of answers: {where}: {first['msg']}") from error
    if given.study != study:
        raise UserError(f"{file}: answers to another study")
    return given


def _answers(file: Path, given: AnswerFile, asked: Sequence[Question]) -> list[Answer]:
    if [choice.position for choice in given.answers] != list(range(len(given.answers))):
        raise UserError(f"{file}: the answers are not to questions 1, 2, 3, ... in turn")
    if len(given.answers) > len(asked):
        raise UserError(f"{file}: {len(given.answers)} answers, but a sheet has {len(asked)} questions")
    return [
        Answer(given.position, question.left, question.right, given.choice, given.milliseconds)
        for given, question in zip(given.answers, asked, strict=False)
    ]
