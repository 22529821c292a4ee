"""Who is asked what: balanced, random, reproducible; and what a study's folder gives away."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from study_raters import make_sources, make_study

from coherent_ddrm.cli import main
from coherent_ddrm.errors import UserError
from coherent_ddrm.study.create import parse_results
from coherent_ddrm.study.questions import FILE, Catch, Picture, Study, load, sheet


def paper_study(methods=4, pictures=10, questions=12, catches=3, seed=0):
    """A study without files: id k is just the number k."""
    numbers = iter(range(10_000))

    def new():
        return f"{next(numbers):024x}"

    made = [
        Picture(
            name=str(i),
            truth=new(),
            input=new(),
            results=[new() for _ in range(methods)],
            catch=Catch(truth=new(), broken=new()) if i % 2 else None,
        )
        for i in range(pictures)
    ]
    return Study(
        id=new(),
        title="t",
        prompt="p",
        seed=seed,
        questions=questions,
        catches=catches,
        methods=[f"m{i}" for i in range(methods)],
        pictures=made,
    )


def decode(study, raters):
    """For each question of the raters: (picture, left method, right method), or None for a catch trial."""
    maker = {name: (i, m) for i, p in enumerate(study.pictures) for m, name in enumerate(p.results)}
    sheets = [sheet(study, rater) for rater in raters]
    return [
        [(maker[q.left][0], maker[q.left][1], maker[q.right][1]) if q.left in maker else None for q in one]
        for one in sheets
    ]


@pytest.mark.parametrize("methods, pictures, questions", [(2, 7, 5), (3, 5, 4), (4, 10, 12), (4, 9, 20), (5, 20, 17)])
def test_balance_of_pairs_comparisons_and_sides(methods, pictures, questions):
    study = paper_study(methods, pictures, questions)
    pairs, sides, cells = Counter(), Counter(), Counter()
    for questions_of_one in decode(study, range(30)):
        for asked in filter(None, questions_of_one):
            picture, left, right = asked
            pairs[frozenset((left, right))] += 1
            sides[left, right] += 1
            cells[picture, min(left, right), max(left, right)] += 1
    assert len(pairs) == len(study.pairs) and max(pairs.values()) - min(pairs.values()) <= 1
    everything = len(study.pairs) * pictures
    assert len(cells) == min(everything, 30 * questions)
    assert max(cells.values()) - min(cells.values()) <= 1 or 30 * questions < everything
    assert all(abs(sides[a, b] - sides[b, a]) <= 2 + 30 * questions // everything for a, b in study.pairs)


def test_no_rater_meets_a_comparison_twice_and_few_pictures():
    study = paper_study(4, 24, 18)
    for questions in decode(study, range(40)):
        cells = [(picture, frozenset(pair)) for picture, *pair in filter(None, questions)]
        assert len(set(cells)) == len(cells) == 18
        assert len({picture for picture, _ in cells}) >= 16


def test_same_seed_same_sheets_other_seed_other_sheets():
    study = paper_study()
    assert [sheet(study, r) for r in range(5)] == [sheet(paper_study(), r) for r in range(5)]
    assert sheet(study, 0) != sheet(study, 1)
    other = decode(paper_study(seed=1), range(5))
    assert decode(study, range(5)) != other


def test_the_order_is_pinned():
    """Files of answers count positions: an order that changed with a version would spoil exports that are out."""
    assert decode(paper_study(2, 4, 4, 0), range(2)) == [
        [(2, 1, 0), (0, 0, 1), (3, 1, 0), (1, 0, 1)],
        [(0, 1, 0), (3, 0, 1), (1, 1, 0), (2, 0, 1)],
    ]


def test_catch_trials_are_strewn_with_balanced_sides():
    study = paper_study(catches=4, questions=12)
    places, left = Counter(), Counter()
    good = {p.catch.truth for p in study.pictures if p.catch}
    for rater in range(60):
        questions = sheet(study, rater)
        caught = [i for i, q in enumerate(questions) if {q.left, q.right} & good]
        assert [i // 4 for i in caught] == [0, 1, 2, 3]  # one in each quarter of the 16
        places.update(caught)
        lefts = sum(questions[i].left in good for i in caught)
        left[lefts] += 1
        for i in caught:  # the truth to choose has another id than the truth that is shown
            assert questions[i].truth not in (questions[i].left, questions[i].right)
    assert set(left) == {2} and len(places) == 16


def test_order_tells_nothing_of_the_method():
    """Over many raters each method stands at each place about equally often."""
    study = paper_study(3, 30, 10, 0)
    counts = np.zeros((10, 3))
    for questions in decode(study, range(600)):
        for place, (_, left, right) in enumerate(questions):
            counts[place, [left, right]] += 1
    assert abs(counts / 1200 - 1 / 3).max() < 0.05


# -- the folder --------------------------------------------------------------------------------------------------------


def test_folder_holds_pictures_under_random_names(tmp_path):
    sources = make_sources(tmp_path, ["ours", "theirs"])
    picture = Image.open(tmp_path / "by-ours" / "picture-0.png")
    picture.save(tmp_path / "by-ours" / "picture-0.png", pnginfo=_comment("made by ours"))
    command = ["study", "create", "--truth", str(sources.truth), "--masks", str(sources.masks), "-o"]
    named = [f"--results={name}={folder}" for name, folder in sources.results.items()]
    assert main([*command, str(tmp_path / "s"), *named, "--questions", "3", "--catch", "2"]) == 0
    study = load(tmp_path / "s")
    files = sorted((tmp_path / "s" / "pictures").iterdir())
    assert len(files) == 6 * 4 + 3 * 2 and all(len(file.stem) == 24 for file in files)
    assert not any(b"ours" in file.read_bytes() for file in files)
    shown = Image.open(tmp_path / "s" / "pictures" / f"{study.pictures[0].results[0]}.png")
    assert (np.asarray(shown) == np.asarray(picture)).all()
    hole = np.asarray(Image.open(tmp_path / "s" / "pictures" / f"{study.pictures[0].input}.png"))
    inside = hole[..., 3] == 0
    assert inside.sum() == 64 and (hole[inside, :3] == 128).all()


def _comment(text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", text)
    return info


def test_the_broken_picture_is_far_from_every_other(tmp_path):
    study = make_study(tmp_path, questions=3, catches=1)

    def read(name):
        return np.asarray(Image.open(tmp_path / "study" / "pictures" / f"{name}.png")).astype(float)

    for picture in study.pictures:
        if picture.catch:
            gap = abs(read(picture.catch.broken) - read(picture.truth))
            assert gap[4:12, 4:12].mean() > 50 and gap.sum() == gap[4:12, 4:12].sum()


MISTAKES = {  # what to do to the sources, more arguments, what the line says
    "one method": (None, ["--results=a=by-A"], "at least two methods"),
    "no name": (None, ["--results=by-A", "--results=b=by-B"], "NAME=FOLDER"),
    "same name": (None, ["--results=a=by-A", "--results=a=by-B"], "two folders are called 'a'"),
    "missing folder": (None, ["--results=a=by-A", "--results=b=nowhere"], "nowhere"),
    "missing picture": (lambda f: (f / "by-B" / "picture-2.png").unlink(), [], "no picture called 'picture-2'"),
    "missing mask": (lambda f: (f / "masks" / "picture-2.png").unlink(), [], "no picture called 'picture-2'"),
    "other size": (lambda f: Image.new("RGB", (9, 8)).save(f / "by-B" / "picture-2.png"), [], "9 x 8"),
    "no hole": (lambda f: Image.new("L", (16, 16)).save(f / "masks" / "picture-2.png"), [], "nothing is white"),
    "no picture": (lambda f: (f / "by-B" / "picture-2.png").write_text("text"), [], "picture-2.png"),
    "the folder one is in": (None, ["-o", "."], "is not empty"),
    "too many questions": (None, ["--questions", "7"], "only 6 comparisons"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, case):
    change, more, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "AB")
    if change:
        change(tmp_path)
    results = [] if any("results" in word for word in more) else ["--results=a=by-A", "--results=b=by-B"]
    questions = [] if "--questions" in more else ["--questions", "3"]
    arguments = ["study", "create", "--truth", "truth", "--masks", "masks", "-o", "s", *results, *questions, *more]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.tmp*"))


def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch, capsys):
    make_study(tmp_path, questions=3)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["study", "export", str(tmp_path / "study"), "-o", "."]) == 2
    assert "the folder you are in" in capsys.readouterr().err


def test_an_old_study_is_not_overwritten_and_a_damaged_one_not_read(tmp_path, capsys):
    make_study(tmp_path, questions=3)
    with pytest.raises(UserError, match="not empty"):
        make_study(tmp_path, questions=3)
    file = tmp_path / "study" / FILE
    damaged = json.loads(file.read_text())
    for change in ({"seed": "x"}, {"colour": 1}, {"questions": 99}, {"methods": ["A", "B"]}):
        file.write_text(json.dumps({**damaged, **change}))
        with pytest.raises(UserError, match="create the study again"):
            load(tmp_path / "study")
    assert main(["study", "serve", str(tmp_path)]) == 2
    assert "no study here" in capsys.readouterr().err


def test_results_are_named():
    assert list(parse_results(["ours = a=b", "LaMa (big)=c"])) == ["ours", "LaMa (big)"]
    with pytest.raises(UserError):
        parse_results(["bad\nname=a", "b=b"])
