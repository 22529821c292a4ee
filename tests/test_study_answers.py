"""The database with many writers; answer files that nobody may trust."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
from study_raters import make_study

from coherent_ddrm.cli import main
from coherent_ddrm.errors import UserError
from coherent_ddrm.study.answer_files import import_files
from coherent_ddrm.study.answers import Answer, Answers, OutOfTurn, Replaced, TooManyRaters

RATERS, EACH = 6, 10


def given(position, choice="left", milliseconds=900):
    return Answer(position, "1" * 24, "2" * 24, choice, milliseconds)


def take_part(folder):
    """One rater from first to last question; returns the number of the sheet."""
    answers = Answers(folder)
    rater = answers.rater(answers.admit(1000))
    for position in range(EACH):
        assert answers.add(rater, given(position)) == position + 1
    return rater.sheet


def half_an_hour_later(folder):
    with sqlite3.connect(folder / "answers.sqlite") as database:
        database.execute("UPDATE raters SET came = came - 1801")


def check_all(folder, sheets):
    everything = Answers(folder).all()
    assert sorted(sheets) == list(range(RATERS)) == sorted(rater.sheet for rater in everything)
    assert all([a.position for a in answers] == list(range(EACH)) for answers in everything.values())


def test_threads(tmp_path):
    with ThreadPoolExecutor(RATERS) as pool:
        check_all(tmp_path, list(pool.map(take_part, [tmp_path] * RATERS)))


def test_processes(tmp_path):
    with get_context("spawn").Pool(2) as pool:
        check_all(tmp_path, pool.map(take_part, [tmp_path] * RATERS, chunksize=1))


def test_one_rater_from_many_windows_answers_each_question_once(tmp_path):
    answers = Answers(tmp_path)
    rater = answers.rater(answers.admit(1))

    def press(choice):
        try:
            return answers.add(rater, given(0, choice))
        except OutOfTurn:
            return None

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(press, ["left", "right"] * 8))
    assert kept.count(1) == 1 and kept.count(None) == 15 and answers.count(rater) == 1


def test_tokens_and_limits(tmp_path):
    answers = Answers(tmp_path)
    token = answers.admit(1)
    assert answers.rater(token).sheet == 0 and answers.rater("0" * 32) is None
    answers.add(answers.rater(token), given(0))
    with pytest.raises(TooManyRaters, match="no more raters"):
        answers.admit(1)
    assert token.encode() not in (tmp_path / "answers.sqlite").read_bytes()


def test_sheets_without_an_answer_go_to_others(tmp_path):
    """Those who leave at once use up neither sheets nor raters, and no answer goes astray."""
    answers = Answers(tmp_path)
    stayed, left, slow = (answers.admit(3) for _ in range(3))
    answers.add(answers.rater(stayed), given(0))
    assert answers.rater(answers.admit(3)).sheet == 3  # nobody is late yet
    half_an_hour_later(tmp_path)
    gone = answers.rater(left)
    assert gone.sheet == 1  # still theirs while nobody needs it
    answers.add(answers.rater(slow), given(0))
    heir = answers.rater(answers.admit(3))
    assert heir.sheet == 1 and answers.rater(left) is None
    with pytest.raises(Replaced):
        answers.add(gone, given(0))
    assert answers.count(heir) == 0 and answers.add(heir, given(0, "right")) == 1
    with pytest.raises(TooManyRaters):
        answers.admit(3)
    assert answers.rater(answers.admit(4)).sheet == 3 and answers.rater(answers.admit(4)).sheet == 4
    assert {rater.sheet: len(kept) for rater, kept in answers.all().items()} == {0: 1, 1: 1, 2: 1, 3: 0, 4: 0}


def test_a_script_that_only_begins_is_stopped_and_uses_nothing_up(tmp_path):
    answers = Answers(tmp_path)
    for _ in range(3):
        assert [answers.rater(answers.admit(1000, most_open=5)).sheet for _ in range(5)] == list(range(5))
        with pytest.raises(TooManyRaters, match="some minutes"):
            answers.admit(1000, most_open=5)
        half_an_hour_later(tmp_path)


@pytest.mark.parametrize("bad", [given(0, "both"), given(0, milliseconds=-1), given(0, milliseconds="slow")])
def test_the_database_itself_refuses_nonsense(tmp_path, bad):
    answers = Answers(tmp_path)
    rater = answers.rater(answers.admit(1))
    with pytest.raises(sqlite3.IntegrityError):
        answers.add(rater, bad)
    assert answers.count(rater) == 0


def test_a_damaged_database_is_one_line(tmp_path, capsys):
    make_study(tmp_path, "AB", questions=3)
    (tmp_path / "study" / "answers.sqlite").write_bytes(b"no database" * 100)
    assert main(["study", "analyse", str(tmp_path / "study")]) == 2
    assert "not a database" in capsys.readouterr().err


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, "AB", questions=4, catches=1)


def content(made, count=5, **changes):
    answers = [{"position": i, "choice": "left", "milliseconds": 800} for i in range(count)]
    return {"version": 1, "study": made.id, "rater": "ab" * 16, "sheet": 3, "answers": answers, **changes}


def write(folder, *contents):
    files = [folder / f"{i}.json" for i in range(len(contents))]
    for file, one in zip(files, contents, strict=True):
        file.write_text(one if isinstance(one, str) else json.dumps(one))
    return files


def test_files_may_come_again_and_grow(tmp_path, study):
    folder = tmp_path / "study"
    assert import_files(folder, write(tmp_path, content(study, 2))) == 2
    assert import_files(folder, write(tmp_path, content(study, 5), content(study, 5))) == 3
    ((rater, answers),) = Answers(folder).all().items()
    assert rater.sheet == 3 and len(answers) == 5
    token = Answers(folder).admit(10)
    assert Answers(folder).rater(token).sheet == 0  # files do not move the sheets of those who use the server


def answer(**changes):
    return {"position": 0, "choice": "left", "milliseconds": 800, **changes}


BAD = {
    "not JSON": (lambda s: "{", "JSON"),
    "a list": (lambda s: "[]", "content"),
    "other study": (lambda s: content(s, study="0" * 24), "another study"),
    "version": (lambda s: content(s, version=2), "version"),
    "field too many": (lambda s: content(s, colour=1), "colour"),
    "no rater": (lambda s: {k: v for k, v in content(s).items() if k != "rater"}, "rater"),
    "rater": (lambda s: content(s, rater="../../etc/passwd"), "rater"),
    "sheet": (lambda s: content(s, sheet=-1), "sheet"),
    "huge sheet": (lambda s: content(s, sheet=10**30), "sheet"),
    "no answers": (lambda s: content(s, answers=[]), "answers"),
    "too many answers": (lambda s: content(s, 6), "a sheet has 5"),
    "gap": (lambda s: content(s, answers=[answer(position=1)]), "in turn"),
    "twice": (lambda s: content(s, answers=[answer(), answer()]), "in turn"),
    "choice": (lambda s: content(s, answers=[answer(choice="up")]), "answers.0.choice"),
    "choice with a newline": (lambda s: content(s, answers=[answer(choice="left\n")]), "answers.0.choice"),
    "time": (lambda s: content(s, answers=[answer(milliseconds=-5)]), "milliseconds"),
    "time as text": (lambda s: content(s, answers=[answer(milliseconds="5")]), "milliseconds"),
    "time not whole": (lambda s: content(s, answers=[answer(milliseconds=0.5)]), "milliseconds"),
    "infinite": (lambda s: json.dumps(content(s)).replace("800", "Infinity"), "milliseconds"),
    "huge": (lambda s: " " * 5_000_000, "too many"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path, study, capsys, case):
    make, message = BAD[case]
    good = content(study, rater="cd" * 16)
    files = write(tmp_path, good, make(study))
    assert main(["study", "import", str(tmp_path / "study"), *map(str, files)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err and "1.json" in captured.err
    assert Answers(tmp_path / "study").all() == {}  # nor was the good one taken


def test_contradicting_files_are_refused(tmp_path, study):
    folder = tmp_path / "study"
    import_files(folder, write(tmp_path, content(study, 2)))
    for changes, message in (({"sheet": 4}, "another sheet"), ({"answers": [answer(choice="right")]}, "otherwise")):
        with pytest.raises(UserError, match=message):
            import_files(folder, write(tmp_path, content(study, **changes)))
    assert [len(answers) for answers in Answers(folder).all().values()] == [2]
