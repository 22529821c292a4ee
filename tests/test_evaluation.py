"""coherent-ddrm evaluate: the same for all methods, resumable, shared out, and a report that a browser shows."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from browser import needs_browser, open_page
from PIL import Image
from tiny import RESOLUTION, make_picture, make_pipeline

from coherent_ddrm.cli import main
from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation import scores as scoring
from coherent_ddrm.evaluation.asked import parse_results
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Filled, Makers, Method
from coherent_ddrm.evaluation.scores import Scorer
from coherent_ddrm.evaluation.setting import Setting
from coherent_ddrm.evaluation.work import carry_out, records
from coherent_ddrm.images import fit, read_image
from coherent_ddrm.metrics import available

COUNT = 6
METHODS = "coherent,ddnm:steps=2,telea"
WITH_NETWORK = ["pd-clothing", "kid-clothing"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint, photographs (smooth, so that scores differ) and a finished report."""
    root = tmp_path_factory.mktemp("evaluation")
    make_pipeline().save_pretrained(root / "base")
    (root / "photos").mkdir()
    for i in range(COUNT):
        noise = np.asarray(make_picture(6, 5, seed=i))
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(root / "photos" / f"photo {i}.png")
    assert main(words(root)) == 0
    return root


def words(root, out="report", *more, methods=METHODS):
    more = ("--no-baselines", *more)
    data = ["evaluate", "--data", str(root / "photos"), "-o", str(root / out), "--checkpoint", str(root / "base")]
    return [*data, "--masks", "half,lama-thick", "--methods", methods, "--offline", "--batch-size", "4", *more]


def setting(root, **options):
    return Setting(**{"data": str(root / "photos"), "masks": ("half",), "size": 32, "count": 0, "seed": 0, **options})


def made(folder, wanted):
    """The gallery, its files written by two processes after one another."""
    gallery = Gallery(folder, wanted)
    gallery.begin()
    for rank in (1, 0):
        gallery.make(rank, 2)
    gallery.verify()
    return gallery


def scores(report):
    with open(report / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- pictures and holes ------------------------------------------------------------------------------------------------


def test_pictures_and_holes_lie_as_files(root, tmp_path):
    gallery = made(tmp_path, setting(root, masks=("half", "center-box"), count=3))
    assert gallery.keys == ["photo_0", "photo_2", "photo_5"]  # spread over all
    assert gallery.truth("photo_0").shape == (32, 32, 3) and gallery.hole("half", "photo_0").mean() == 0.5
    assert gallery.hole("center-box", "photo_2").mean() == 0.25
    hole = gallery.hole("half", "photo_2")
    assert (gallery.given("half", "photo_2")[hole] == 128).all()
    assert (gallery.given("half", "photo_2")[~hole] == gallery.truth("photo_2")[~hole]).all()
    made(tmp_path, setting(root, masks=("half", "center-box"), count=3))
    with pytest.raises(UserError, match="seed 0, not 1"):
        made(tmp_path, setting(root, masks=("half", "center-box"), count=3, seed=1))
    Image.fromarray(255 - gallery.truth("photo_2")).save(tmp_path / "truth" / "photo_2.png")
    with pytest.raises(UserError, match="changed since"):
        gallery.verify()


def test_a_hole_belongs_to_its_picture(root, tmp_path):
    """The same picture has the same hole, whichever others are scored with it; another seed, another hole."""
    holes = {}
    for name, options in {"all": {}, "few": {"count": 2}, "seed": {"seed": 1}}.items():
        gallery = made(tmp_path / name, setting(root, masks=("mat-large",), **options))
        holes[name] = gallery.hole("mat-large", "photo_0")
    assert (holes["all"] == holes["few"]).all() and (holes["all"] != holes["seed"]).any()


def test_masks_of_ones_own(root, tmp_path):
    (tmp_path / "masks").mkdir()
    hole = np.zeros((32, 32), np.uint8)
    hole[:, :8] = 255
    for i in range(COUNT):
        Image.fromarray(hole).save(tmp_path / "masks" / f"photo {i}.png")
    gallery = made(tmp_path / "out", setting(root, masks=(f"left={tmp_path / 'masks'}",)))
    assert (gallery.hole("left", "photo_3") == (hole > 0)).all()
    (tmp_path / "masks" / "photo 3.png").unlink()
    with pytest.raises(UserError, match="0 masks named 'photo 3'"):
        made(tmp_path / "out2", setting(root, masks=(f"left={tmp_path / 'masks'}",)))


@pytest.mark.parametrize("resize, shown", [("crop", (32, 32)), ("stretch", (32, 32)), ("pad", (16, 32))])
def test_a_protocols_rule_of_resizing_is_followed(tmp_path, resize, shown):
    """A photograph of 64 x 32, its left half hidden; pad leaves a white border, which is known."""
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    picture = Image.fromarray(np.asarray(make_picture(64, 64, seed=1))[:32])
    picture.save(tmp_path / "photos" / "a.png")
    hole = np.zeros((32, 64), np.uint8)
    hole[:, :32] = 255
    Image.fromarray(hole).save(tmp_path / "masks" / "a.png")
    gallery = made(tmp_path / "out", setting(tmp_path, masks=(f"left={tmp_path / 'masks'}",), resize=resize))
    assert (gallery.truth("a") == fit(np.asarray(picture), 32, resize)).all()
    rows = gallery.hole("left", "a").any(axis=1)
    assert rows.sum() == shown[0] and gallery.hole("left", "a")[rows].mean() == 0.5
    assert (gallery.truth("a")[~rows] == 255).all()
    Image.fromarray(hole[:, :50]).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="50 x 32; a mask has the size of its picture, here 64 x 32, or is a square"):
        made(tmp_path / "other", setting(tmp_path, masks=(f"left={tmp_path / 'masks'}",), resize=resize))


def test_masks_and_pictures_of_any_name(tmp_path):
    """Folders, dots, other scripts; a mask belongs to the picture of the same name, not to one that begins so."""
    names = ("a", "a.b", "sub/a", "é", "ü", "写真")
    for i, name in enumerate(names):
        for folder in ("photos", "masks"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(32, 32, seed=i).save(tmp_path / "photos" / f"{name}.png")
        hole = np.zeros((32, 32), np.uint8)
        hole[i] = 255
        Image.fromarray(hole).save(tmp_path / "masks" / f"{name}.PNG")
    gallery = made(tmp_path / "out", setting(tmp_path, masks=(f"mine={tmp_path / 'masks'}",)))
    assert sorted(gallery.keys) == sorted(name.replace("/", "_") for name in names)
    for i, name in enumerate(names):
        key = name.replace("/", "_")
        assert (gallery.hole("mine", key).any(axis=1).nonzero()[0] == [i]).all()
        assert (gallery.truth(key) == np.asarray(make_picture(32, 32, seed=i))).all()
    make_picture(32, 32, seed=9).save(tmp_path / "photos" / "sub_a.png")
    with pytest.raises(UserError, match="'sub/a' and 'sub_a' would both be called 'sub_a'"):
        made(tmp_path / "other", setting(tmp_path))


# -- methods -----------------------------------------------------------------------------------------------------------


def pictures_and_holes():
    pictures = np.stack([np.asarray(make_picture(32, 32, seed=i)) for i in range(2)])
    holes = np.zeros((2, 32, 32), bool)
    holes[0, :, 20:], holes[1, 5:20] = True, True
    return pictures, holes


@pytest.mark.parametrize("text", ["coherent", "coherent:plan=none:steps=2", "repaint:steps=3:jump_samples=1", "telea"])
def test_methods_keep_what_is_known_and_see_nothing_else(root, text):
    """What lies under the hole has no effect, known pixels come back, and a result does not depend on its batch."""
    method = Makers(str(root / "base"), device()).make(text)
    pictures, holes = pictures_and_holes()
    other = np.where(holes[..., None], 255 - pictures, pictures)
    done, unseen = method.fill(pictures, holes, [3, 4]), method.fill(other, holes, [3, 4])
    assert (done.pictures == unseen.pictures).all()
    assert (done.pictures[~holes] == pictures[~holes]).all() and (done.pictures[holes] != pictures[holes]).any()
    alone = method.fill(pictures[1:], holes[1:], [4])
    assert np.abs(alone.pictures[0].astype(int) - done.pictures[1]).max() <= 1
    assert done.seconds > 0


def device():
    import torch

    return torch.device("cpu")


def test_telea_is_that_of_opencv():
    pictures, holes = pictures_and_holes()
    done = Makers("", device()).make("telea").fill(pictures, holes, [0, 0])
    expected = cv2.inpaint(
        np.where(holes[0][..., None], np.uint8(128), pictures[0]), holes[0].astype(np.uint8), 3, cv2.INPAINT_TELEA
    )
    assert (done.pictures[0] == expected).all() and done.nfe == 0


def test_evaluations_are_counted(root):
    makers, (pictures, holes) = Makers(str(root / "base"), device(), steps=4), pictures_and_holes()
    assert makers.make("coherent").fill(pictures, holes, [0, 1]).nfe == 5  # one of stage one
    assert makers.make("coherent:plan=none").fill(pictures, holes, [0, 1]).nfe == 4
    assert makers.make("ddnm:steps=7").fill(pictures, holes, [0, 1]).nfe == 7
    assert makers.make("ddnm:steps=7").label == "ddnm_steps-7"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lama", "unknown method 'lama'"),
        ("telea:steps=3", "telea has no options"),
        ("repaint:jumps=3", "no option 'jumps'"),
        ("coherent:plans=none", "no option 'plans'"),
        ("coherent:plan=mine", "plan is predicted or none"),
        ("ddnm:steps", "NAME=VALUE"),
        ("ddnm:plan=none", "no option 'plan'"),
        ("ddnm:steps=0", "steps of ddnm is 0"),
        ("coherent:eta=abc", "eta of coherent is 'abc'"),
    ],
)
def test_methods_that_there_are_not(root, text, words):
    with pytest.raises(UserError, match=words):
        Makers(str(root / "base"), device()).make(text)


# -- work --------------------------------------------------------------------------------------------------------------


def noisy(calls):
    """A method that fills with noise of its seeds, and notes how many pictures it was given."""

    def fill(pictures, holes, seeds):
        calls.append(len(seeds))
        noise = [np.random.default_rng(seed).integers(0, 256, pictures.shape[1:], np.uint8) for seed in seeds]
        return np.stack(noise), 1

    return Method("noise", fill, {})


def test_work_goes_on_where_it_was_cut_off(root, tmp_path):
    """Killed after four pictures, the fifth half written: the same files as one that was not, none made twice."""
    whole, cut = (made(tmp_path / name, setting(root)) for name in ("whole", "cut"))
    for gallery in (whole, cut):
        carry_out(gallery, noisy([]), 2, quiet=True)
    log = next((cut.folder / "results" / "noise" / "half").glob("record-*.jsonl"))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    cut.result("noise", "half", "photo_1").unlink()  # noted, but gone
    calls = []
    carry_out(cut, noisy(calls), 2, quiet=True)
    assert sum(calls) == 3 and set(records(cut, "noise", "half")) == set(cut.keys)
    for key in whole.keys:
        assert (read_image(whole.result("noise", "half", key)) == read_image(cut.result("noise", "half", key))).all()


def test_a_lost_candidate_is_made_again(root, tmp_path):
    gallery, calls = made(tmp_path / "lost", setting(root, candidates=2)), []
    carry_out(gallery, noisy([]), 6, quiet=True)
    lost = gallery.result("noise", "half", "photo_2", 1)
    before = read_image(lost)
    lost.unlink()
    carry_out(gallery, noisy(calls), 6, quiet=True)
    assert sum(calls) == 2 and (read_image(lost) == before).all()


def test_processes_share_the_work_and_change_nothing(root, tmp_path):
    one, two = (made(tmp_path / name, setting(root, candidates=2)) for name in ("one", "two"))
    calls = []
    carry_out(one, noisy([]), 6, quiet=True)
    for rank in range(2):
        carry_out(two, noisy(calls), 1, rank, 2, quiet=True)
    assert sum(calls) == 2 * COUNT and set(records(two, "noise", "half")) == set(one.keys)
    for key in one.keys:
        results = [[read_image(g.result("noise", "half", key, k)) for k in range(2)] for g in (one, two)]
        assert np.array_equal(*results) and (results[0][0] != results[0][1]).any()


def test_processes_share_the_scoring_and_change_nothing(root, tmp_path, monkeypatch):
    """Two processes, played one after the other: the second one's part waits until the first one gathers."""
    gallery = made(tmp_path / "shared", setting(root, count=5, candidates=2))
    carry_out(gallery, noisy([]), 6, quiet=True)
    networks, _ = available(WITH_NETWORK, download=False)
    scorer = Scorer(gallery, networks, WITH_NETWORK, torch.device("cpu"))
    sent = []
    kept = lambda mine: [part for part in mine if isinstance(part, scoring.Part)]  # noqa: E731
    monkeypatch.setattr(scoring, "gather_object", lambda mine: sent.extend(kept(mine)) or mine)
    assert Scorer(gallery, networks, WITH_NETWORK, torch.device("cpu")).score("half", ["noise"], 1, 2) == {}
    assert [len(part.rows) for part in sent] == [2, 2]
    parts = iter(sent)  # of the second process: the truth, then the method
    monkeypatch.setattr(scoring, "gather_object", lambda mine: [*mine, next(parts)] if kept(mine) else mine)
    shared = scorer.score("half", ["noise"], 0, 2)
    (gallery.folder / "results" / "noise" / "half" / "scores.json").unlink()
    alone = scorer.score("half", ["noise"])
    assert [row["key"] for row in alone["noise"].rows] == [key for key in gallery.keys for _ in range(2)]
    assert [row["candidate"] for row in alone["noise"].rows] == [0, 1] * 5
    for label in alone:
        for one, two in zip(alone[label].rows, shared[label].rows, strict=True):
            numbers = [{k: v for k, v in row.items() if isinstance(v, float)} for row in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5) and numbers[0]
            assert {k: v for k, v in one.items() if k not in numbers[0]}.items() <= two.items()
    assert alone["noise"].sets == pytest.approx(shared["noise"].sets, rel=1e-3, abs=1e-6) != {}
    assert scorer.score("half", ["noise"])["noise"] == alone["noise"]  # read back


def test_truths_are_kept_while_there_is_room(root, tmp_path, monkeypatch):
    gallery = made(tmp_path / "room", setting(root))
    carry_out(gallery, noisy([]), 6, quiet=True)
    networks, _ = available(["pd-clothing"], download=False)
    monkeypatch.setattr(scoring, "BATCH", 2)
    rows, size = [], 2**30
    for room, kept in ((1.0, 3), (1.5, 1), (0.0, 0)):  # times what one batch of truths takes, in the end
        room *= size
        monkeypatch.setattr(scoring, "ROOM", room)
        scorer = Scorer(gallery, networks, ["pd-clothing"], torch.device("cpu"))
        rows.append(scorer.score("half", ["noise"])["noise"].rows)
        sizes = [truth.nbytes for truth in scorer._truths.values()]
        assert len(sizes) == kept and sum(sizes) <= room
        size = min(size, *sizes, size)
        (gallery.folder / "results" / "noise" / "half" / "scores.json").unlink()
    assert rows[0] == rows[1] == rows[2]


def test_labels_of_another_stage_one_are_seen_anew(root, tmp_path):
    gallery = made(tmp_path / "stage one", setting(root))
    carry_out(gallery, noisy([]), 6, quiet=True)
    other = make_pipeline()
    for weight in other.structure.parameters():
        weight.data.neg_()
    other.save_pretrained(root / "other")
    makers = [Makers(str(root / name), device()) for name in ("base", "other")]
    planned = [(maker.pipeline.structure, maker.identity) for maker in makers]
    found = [Scorer(gallery, {}, ["segmentation_iou"], device(), None, *of).score("half", ["noise"]) for of in planned]
    values = [[row["segmentation_iou"] for row in of["noise"].rows] for of in found]
    assert values[0] != values[1]


def test_parts_of_other_networks_are_not_merged():
    part = scoring.Part([[{}]], {"clothing": torch.zeros(1, 4)})
    with pytest.raises(RuntimeError, match="other networks"):
        scoring._merged([part, scoring.Part([[{}]], {})])
    assert scoring._merged([part, scoring.Part([], {})]).features["clothing"].shape == (1, 4)


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_every_result_is_scored(root):
    rows = scores(root / "report")
    assert len(rows) == 3 * 2 * COUNT and {row["method"] for row in rows} == {"coherent", "ddnm_steps-2", "telea"}
    assert all(float(row["changed"]) == 0 for row in rows)
    gallery = Gallery(root / "report", setting(root, masks=("half", "lama-thick")))
    row = next(row for row in rows if row["method"] == "telea" and row["key"] == "photo_1" and row["mask"] == "half")
    hole, truth = gallery.hole("half", "photo_1"), gallery.truth("photo_1").astype(float)
    error = ((read_image(gallery.result("telea", "half", "photo_1")) - truth)[hole] / 255) ** 2
    assert float(row["psnr_hole"]) == pytest.approx(-10 * np.log10(error.mean()), abs=1e-4)
    assert float(row["hole_share"]) == hole.mean() == 0.5 and row["area"] == "40-50"
    assert len({row["hole_hash"] for row in rows if row["key"] == "photo_1"}) == 2


def test_results_and_tables_agree(root):
    results = json.loads((root / "report" / "results.json").read_text())
    rows = scores(root / "report")
    assert results["summary"][0]["method"] == "the truth"
    for summary in [row for row in results["summary"] if row["method"] != "the truth"]:
        own = [float(r["l1_hole"]) for r in rows if (r["method"], r["mask"]) == (summary["method"], summary["mask"])]
        assert summary["scores"]["l1_hole"]["mean"] == pytest.approx(np.mean(own))
        assert summary["scores"]["l1_hole"]["low"] <= np.mean(own) <= summary["scores"]["l1_hole"]["high"]
    assert {row["method"] for row in results["differences"]} == {"ddnm_steps-2", "telea"}
    assert any(note.startswith("left out: lpips_alex") for note in results["notes"])
    command = results["facts"]["command"]
    assert command.startswith("coherent-ddrm evaluate --data ") and f"--methods {METHODS}" in command
    text = (root / "report" / "results.md").read_text()
    assert text.count("| telea |") == 2 and "**lama-thick**, 6 pictures" in text


def test_the_same_command_again_makes_nothing_anew(root, monkeypatch):
    before = (root / "report" / "scores.csv").read_bytes()
    monkeypatch.setattr(Method, "fill", lambda *a: pytest.fail("nothing is left to fill"))
    assert main(words(root)) == 0
    assert (root / "report" / "scores.csv").read_bytes() == before


def test_results_made_otherwise_are_not_mixed(root, tmp_path, capsys):
    """Other steps, another program under a method's name: refused. Better pictures of the same program: scored anew."""
    assert main(words(root, "mixed", "--steps", "1", "--count", "2", methods="ddnm")) == 0
    assert main(words(root, "mixed", "--steps", "2", "--count", "2", methods="ddnm")) == 2
    assert "num_inference_steps 1, not 2" in capsys.readouterr().err
    for kind in ("half", "lama-thick"):
        shutil.copytree(root / "mixed" / "given" / kind, tmp_path / "mine" / kind)
    assert main(words(root, "mixed", "--count", "2", "--results", f"ddnm={tmp_path / 'mine'}", methods="")) == 2
    assert "made_by 'coherent-ddrm'" in capsys.readouterr().err
    assert main(words(root, "mixed", "--count", "2", "--results", str(tmp_path / "mine"), methods="")) == 0
    first = [float(row["psnr"]) for row in scores(root / "mixed")]
    for kind in ("half", "lama-thick"):
        shutil.copytree(root / "mixed" / "truth", tmp_path / "mine" / kind, dirs_exist_ok=True)
    assert main(words(root, "mixed", "--count", "2", "--results", str(tmp_path / "mine"), methods="")) == 0
    assert max(first) < 40 and {float(row["psnr"]) for row in scores(root / "mixed")} == {100.0}


def test_pictures_of_another_program(root, tmp_path, capsys, monkeypatch):
    """The truth itself is perfect; one known value that was changed is counted, and given back; what is missing is
    named before any work."""
    shutil.copytree(root / "report" / "truth", tmp_path / "perfect" / "half")
    shutil.copytree(root / "report" / "truth", tmp_path / "perfect" / "lama-thick")
    gallery = Gallery(root / "report", setting(root, masks=("half", "lama-thick")))
    file = tmp_path / "perfect" / "half" / "photo_2.png"
    spoiled = read_image(file).copy()
    y, x = np.argwhere(~gallery.hole("half", "photo_2"))[0]
    spoiled[y, x, 0] ^= 1
    Image.fromarray(spoiled).save(file)
    results = ["--results", str(tmp_path / "perfect")]
    assert main(words(root, "other", *results, methods="")) == 0
    rows = {(row["mask"], row["key"]): row for row in scores(root / "other")}
    assert float(rows["half", "photo_2"]["changed"]) == 1 and float(rows["half", "photo_1"]["changed"]) == 0
    assert float(rows["half", "photo_2"]["measurement_error"]) == pytest.approx(1 / 127.5, abs=1e-5)
    assert all(float(row["l1"]) == 0 for row in rows.values())
    assert {round(float(row["ssim_hole"]), 6) for row in rows.values() if row["ssim_hole"]} == {1.0}
    file.unlink()
    monkeypatch.setattr(Method, "fill", lambda *a: pytest.fail("work was begun"))
    assert main(words(root, "third", *results, methods="telea")) == 2
    assert "nothing for 'photo_2'" in capsys.readouterr().err
    Image.fromarray(spoiled).save(file.with_suffix(".jpg"))
    assert main(words(root, "third", *results, methods="")) == 2
    assert "photo_2.jpg, which is not lossless" in capsys.readouterr().err


def test_pictures_put_into_the_report_itself(root, capsys):
    """They stay, and are scored once; one of a wrong size is named."""
    for kind in ("half", "lama-thick"):
        shutil.copytree(root / "report" / "given" / kind, root / "inside" / "results" / "grey" / kind)
    folder = root / "inside" / "results" / "grey"
    more = ["--results", str(folder)]
    for _ in range(2):
        assert main(words(root, "inside", *more, methods="")) == 0
        assert len(list((folder / "half").glob("*.png"))) == COUNT
    written = (folder / "half" / "scores.json").stat().st_mtime_ns
    assert main(words(root, "inside", *more, methods="")) == 0
    assert (folder / "half" / "scores.json").stat().st_mtime_ns == written
    assert main(words(root, "telea", "--count", "2", methods="telea")) == 0
    Image.new("RGB", (20, 20)).save(root / "telea" / "results" / "telea" / "half" / "photo_0.png")
    capsys.readouterr()
    assert main(words(root, "telea", "--count", "2", methods="telea")) == 2
    assert "20 x 20, not 32 px" in capsys.readouterr().err


def test_baselines_are_always_there(root):
    more = ["--results", str(root / "report" / "truth"), "--masks", "half", "--count", "2"]
    more = [word for word in words(root, "baselines", *more, methods="") if word != "--no-baselines"]
    assert main(more) == 0
    results = json.loads((root / "baselines" / "results.json").read_text())
    assert [row["method"] for row in results["summary"]] == ["the truth", "truth", "telea", "navier-stokes"]
    assert {row["against"] for row in results["differences"]} == {"truth"}
    more[more.index("--results") + 1] = f"telea={root / 'report' / 'truth'}"
    more[more.index("-o") + 1] = str(root / "own telea")
    assert main(more) == 0
    results = json.loads((root / "own telea" / "results.json").read_text())
    assert [row["method"] for row in results["summary"]] == ["the truth", "telea", "navier-stokes"]


def test_two_processes_by_torchrun(root):
    """The same scores as one."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["--no-python", str(Path(sys.executable).parent / "coherent-ddrm")]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, *words(root, "two", methods="telea")]
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made_by = [(root / "two" / "results" / "telea" / "half" / f"record-{rank}.jsonl").read_text() for rank in (0, 1)]
    assert [text.count("\n") for text in made_by] == [COUNT / 2] * 2
    ours = [row for row in scores(root / "report") if row["method"] == "telea"]
    for one, two in zip(ours, scores(root / "two"), strict=True):
        assert (one["key"], one["mask"], one["hole_hash"]) == (two["key"], two["mask"], two["hole_hash"])
        assert [float(one[name]) for name in ("psnr", "pd-clothing_hole", "edge_f1")] == pytest.approx(
            [float(two[name]) for name in ("psnr", "pd-clothing_hole", "edge_f1")], rel=1e-4
        )


def test_slow_scores_and_candidates(root):
    """Telea again from its own fill; two candidates of noise-free Telea are alike, of coherent they are not."""
    slow = "foreground_iou,segmentation_iou,reinpaint_known,reinpaint_invented"
    more = ["--scores", slow, "--reinpaint", "telea", "--candidates", "2", "--count", "2", "--masks", "center-box"]
    assert main([*words(root, "slow", methods="coherent,telea"), *more]) == 0
    rows = scores(root / "slow")
    assert len(rows) == 2 * 2 * 2 and all(row["reinpaint_known"] and row["reinpaint_invented"] for row in rows)
    assert all(0 <= float(row["segmentation_iou"]) <= 1 for row in rows)
    spread = {m: [float(r["diversity"]) for r in rows if r["method"] == m] for m in ("coherent", "telea")}
    assert max(spread["telea"]) == 0 < min(spread["coherent"])
    again = {m: np.mean([float(r["reinpaint_invented"]) for r in rows if r["method"] == m]) for m in spread}
    assert again["telea"] < again["coherent"]  # smooth fills are what Telea would make


@pytest.mark.parametrize(
    ("more", "words_of_error"),
    [
        (["--masks", "lama-think"], "unknown kind of hole 'lama-think'"),
        (["--methods", "coherent,coherent"], "two methods are called 'coherent'"),
        (["--protocol", "places2-lama"], "places2-lama-512"),
        (["--data", "nowhere", "-o", "new"], "no such folder"),
        (["--seed", "5"], "seed 0, not 5"),
        (["--scores", "lpips"], "unknown score 'lpips'"),
        (["--scores", "psnr"], "it is there always"),
        (["--size", "8"], "scored from 16 px"),
        (["--masks", "half,half"], "one name"),
        (["--results", "a|b=."], "a name of letters"),
    ],
)
def test_mistakes_are_one_line(root, capsys, monkeypatch, tmp_path, more, words_of_error):
    monkeypatch.chdir(tmp_path)
    assert main([*words(root), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words_of_error in error


def test_results_are_called_by_name_or_folder(tmp_path):
    (tmp_path / "lama").mkdir()
    assert parse_results([f"other={tmp_path / 'lama'}", str(tmp_path / "lama")]).keys() == {"other", "lama"}
    with pytest.raises(UserError, match="two folders"):
        parse_results([str(tmp_path / "lama")] * 2)


@pytest.mark.parametrize("size", [256, RESOLUTION])
def test_a_protocol_says_what_papers_report(root, size):
    """At its own size; at another one it says that nothing is comparable, and shows no number."""
    out = f"protocol-{size}"
    more = ["--protocol", "repaint-6masks", "--size", str(size), "--masks", "repaint-half", "--count", "3"]
    assert main([*words(root, out, methods="telea"), *more]) == 0
    results = json.loads((root / out / "results.json").read_text())
    assert {row["mask"] for row in results["published"]["rows"]} == ({"repaint-half"} if size == 256 else set())
    assert ("no number of the papers is comparable" in " ".join(results["notes"])) == (size != 256)
    notes = " ".join(results["notes"])
    assert "3 pictures, repaint-6masks has" in notes and "RePaint" in results["published"]["text"]
    page = (root / out / "report.html").read_text()
    assert "What papers report" in page and ("measured here" in page) == (size == 256)


@needs_browser
def test_the_report_in_a_real_browser(root):
    """One file: nothing is fetched, all pictures show, every method is in every table."""
    with open_page() as visit:
        visit.page.goto((root / "report" / "report.html").as_uri())
        assert visit.page.locator("h2", has_text="lama-thick").count() >= 1
        widths = visit.page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
        assert len(widths) == 6 + 2 + 3 and min(widths) > 100  # plots, kinds of holes, methods
        tables = visit.page.locator("table")
        assert tables.nth(0).locator("tr").count() == 5 and "the truth" in tables.nth(0).inner_text()
        assert visit.page.locator("td.best").count() > 4
        assert "left out: lpips_alex" in visit.page.inner_text("body")
        visit.page.set_viewport_size({"width": 420, "height": 800})  # wide tables scroll, the page does not
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        visit.check()


def test_memory_that_cannot_be_told_is_not_made_up(monkeypatch):
    """Without leave to set the mark anew it would be that of all that ran before."""

    def no_leave(file, *args, **options):
        if file == "/proc/self/clear_refs":
            raise PermissionError(file)
        return open(file, *args, **options)

    monkeypatch.setattr("coherent_ddrm.evaluation.methods.open", no_leave, raising=False)
    assert noisy([]).fill(*pictures_and_holes(), [0, 0]).memory is None


def test_memory_is_what_a_method_needs_above_what_was_there():
    gc.collect()  # what other tests left would otherwise go while it is measured, and hide what is needed
    before = np.ones(2**24)  # 128 MiB
    held = []

    def fill(pictures, holes, seeds):
        held.append(np.ones(2**23).sum() + before[0])  # 64 MiB, for a moment
        return pictures, 0

    filled = Method("hungry", fill, {}).fill(*pictures_and_holes(), [0, 0])
    assert isinstance(filled, Filled) and (filled.memory is None or 60 < filled.memory < 80)
