"""The command line: files in, files out, exact known pixels; every mistake is one line and exit code 2."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LABELS, RESOLUTION, difference, make_hole, make_mask, make_picture, make_pipeline

from coherent_ddrm.cli import SAMPLER_NAMES, main
from coherent_ddrm.export import default_checkpoint, write_manifest
from coherent_ddrm.scene import SAMPLERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def inpaint(checkpoint, tmp_path, monkeypatch):
    """inpaint(...) runs the verb in an empty folder with the tiny checkpoint and seed 0; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: main(["inpaint", "--checkpoint", str(checkpoint), "--seed", "0", *map(str, args)])


def write_pair(folder, height=32, width=32, mode="RGB", name="a.png", seed=0):
    """A picture and its mask as files; returns (picture, hole)."""
    picture, hole = make_picture(height, width, mode, seed), make_hole(height, width)
    folder.mkdir(exist_ok=True)
    picture.save(folder / name)
    make_mask(hole).save(folder / "mask.png")
    return picture, hole


@pytest.mark.parametrize("height, width", [(32, 32), (60, 45), (200, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_known_pixels_of_a_png(inpaint, tmp_path, capsys, mode, height, width):
    picture, hole = write_pair(tmp_path, height, width, mode)
    assert inpaint("a.png", "mask.png", "-o", "out.png") == 0
    result = Image.open("out.png")
    gap = difference(result, picture)
    assert (result.mode, result.size) == (mode, picture.size)
    assert (gap[~hole] == 0).all() and (gap[hole] > 0).mean() > 0.9
    if mode in ("RGBA", "LA"):
        assert (np.asarray(result)[..., -1] == np.asarray(picture)[..., -1]).all()
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "out.png" in line and "nfe 3" in line and "seconds" in line


@pytest.mark.parametrize("suffix", ["webp", "tiff", "bmp", "ppm"])
def test_other_lossless_formats(inpaint, tmp_path, suffix):
    picture, hole = write_pair(tmp_path, name="a.bmp")
    picture.save(f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert inpaint(f"a.{suffix}", "mask.png", "-o", "results/") == 0
    result = Image.open(f"results/a.{suffix}")
    assert result.format == Image.open(f"a.{suffix}").format and (difference(result, picture)[~hole] == 0).all()


def test_sixteen_bit_palette_and_profile(inpaint, tmp_path):
    hole = make_hole(32, 32)
    make_mask(hole).save(tmp_path / "mask.png")
    levels = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert inpaint("deep.png", "mask.png", "-o", "out.png") == 0
    result = np.asarray(Image.open("out.png"))
    assert result.max() > 255 and (result[~hole] == levels[~hole]).all()
    flat = make_picture(32, 32).quantize(16)
    flat.save(tmp_path / "flat.png", icc_profile=b"profile")
    assert inpaint("flat.png", "mask.png", "-o", "out.png") == 0
    result = Image.open("out.png")
    assert result.info["icc_profile"] == b"profile" and (difference(result, flat.convert("RGB"))[~hole] == 0).all()


def test_erased_hole_becomes_visible(inpaint, tmp_path):
    picture, hole = write_pair(tmp_path, mode="RGBA")
    pixels = np.array(picture)
    pixels[hole, 3] = 0
    Image.fromarray(pixels).save("a.png")
    assert inpaint("a.png", "mask.png", "-o", "out.png") == 0
    result = np.asarray(Image.open("out.png"))
    assert (result[hole, 3] == 255).all() and (result[~hole] == pixels[~hole]).all()


def test_jpeg_in_jpeg_out_with_a_warning(inpaint, tmp_path, capsys):
    write_pair(tmp_path, name="a.jpg")
    assert inpaint("a.jpg", "mask.png", "-o", "out.jpg") == 0
    assert Image.open("out.jpg").format == "JPEG" and not json.loads((tmp_path / "out.json").read_text())["lossless"]
    assert capsys.readouterr().err.count("warning: out.jpg: JPEG is lossy") == 1
    assert inpaint("a.jpg", "mask.png", "-o", "out.png") == 0
    decoded, hole = Image.open("a.jpg"), make_hole(32, 32)
    assert (difference(Image.open("out.png"), decoded)[~hole] == 0).all()


def test_record_beside_the_result(inpaint, tmp_path):
    write_pair(tmp_path, 120, 90)
    assert inpaint("a.png", "mask.png", "-o", "out.png", "--steps", 2) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["seed"], record["steps"], record["nfe"], record["structure_nfe"]) == (0, 2, 2, 1)
    assert record["lossless"] and record["seconds"] > 0 and len(record["checkpoint_sha256"]) == 64
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_candidates_and_seed(inpaint, tmp_path):
    write_pair(tmp_path)
    assert inpaint("a.png", "mask.png", "-o", "k.png", "--candidates", 3) == 0
    results = [np.asarray(Image.open(f"k-{k}.png")) for k in (1, 2, 3)]
    assert not (tmp_path / "k.png").exists() and (tmp_path / "k-3.json").exists()
    assert (results[0] != results[1]).any() and (results[1] != results[2]).any()
    assert inpaint("a.png", "mask.png", "-o", "again.png", "--batch-size", 1) == 0
    assert difference(Image.open("again.png"), results[0]).max() <= 1


def test_sampler(inpaint, tmp_path):
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    picture, hole = write_pair(tmp_path)
    assert inpaint("a.png", "mask.png", "-o", "out.png", "--sampler", "ddnm") == 0
    assert (difference(Image.open("out.png"), picture)[~hole] == 0).all()
    assert json.loads((tmp_path / "out.json").read_text())["sampler"] == "ddnm"


def test_structure_out_and_in(inpaint, tmp_path):
    _, hole = write_pair(tmp_path, 90, 70)
    assert inpaint("a.png", "mask.png", "-o", "out.png", "--save-structure", "plan/edges.png") == 0
    edges, ids = Image.open("plan/edges.png"), Image.open("plan/edges.segmentation.png")
    assert (edges.mode, ids.mode, edges.size) == ("L", "P", (RESOLUTION, RESOLUTION))
    assert np.asarray(ids).max() < LABELS
    Image.fromarray(255 - np.asarray(edges)).save("edited.png")
    assert inpaint("a.png", "mask.png", "-o", "edited-out.png", "--structure", "edited.png") == 0
    gap = difference(Image.open("out.png"), Image.open("edited-out.png"))
    assert (gap[~hole] == 0).all() and gap[hole].mean() > 0.5
    before = Image.open("edited-out.png").copy()
    Image.fromarray((np.asarray(ids) + 1) % LABELS).save("edited.segmentation.png")  # lies beside: is used too
    assert inpaint("a.png", "mask.png", "-o", "edited-out.png", "--structure", "edited.png") == 0
    assert difference(before, Image.open("edited-out.png"))[hole].mean() > 0.5


def test_plans_per_candidate(inpaint, tmp_path):
    write_pair(tmp_path)
    command = ["a.png", "mask.png", "-o", "o.png", "--candidates", 2, "--save-structure", "p.png"]
    assert inpaint(*command) == 0
    assert (tmp_path / "p.png").exists() and not (tmp_path / "p-1.png").exists()  # one plan for both
    assert inpaint(*command, "--structure-steps", 2) == 0
    assert difference(Image.open("p-1.png"), Image.open("p-2.png")).max() > 0


def test_folders(inpaint, tmp_path, capsys):
    """Matched by stem, each result in its own name, size and format, the same as alone."""
    pictures, sizes = {}, {"one": (32, 32), "two": (50, 90), "three": (32, 40)}
    (tmp_path / "masks").mkdir()
    for i, (name, size) in enumerate(sizes.items()):
        pictures[name] = write_pair(tmp_path / "in", *size, name=f"{name}.png", seed=i)
        shutil.move(tmp_path / "in" / "mask.png", tmp_path / "masks" / f"{name}.png")
    assert inpaint("in", "masks", "-o", "out", "--batch-size", 2, "--save-structure", "plans") == 0
    assert "3 pictures in out" in capsys.readouterr().out
    for name, (picture, hole) in pictures.items():
        result = Image.open(f"out/{name}.png")
        assert (difference(result, picture)[~hole] == 0).all() and (tmp_path / "out" / f"{name}.json").exists()
        assert (tmp_path / "plans" / f"{name}.segmentation.png").exists()
        assert inpaint(f"in/{name}.png", f"masks/{name}.png", "-o", "alone.png") == 0
        assert difference(Image.open("alone.png"), result).max() <= 1
    assert inpaint("in", "masks", "-o", "again", "--structure", "plans") == 0
    assert difference(Image.open("again/two.png"), Image.open("out/two.png")).max() <= 2  # plans rounded to 8 bits


def test_demo(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path / "p", 64, 80, name="shoe.jpg")
    shutil.move(tmp_path / "p" / "mask.png", tmp_path / "p" / "shoe.hole.png")
    assert main(["demo", "--checkpoint", str(checkpoint), "--pictures", "p"]) == 0
    sheet = Image.open(tmp_path / "demo" / "sheet.png")
    assert sheet.width > 4 * 190 and "sheet.png" in capsys.readouterr().out
    assert main(["demo", "--checkpoint", str(checkpoint), "--pictures", "empty"]) == 2


def test_another_process(checkpoint, inpaint, tmp_path):
    """The export works where nothing but the package is there, and gives the picture that it gives here."""
    write_pair(tmp_path, 70, 50)
    assert inpaint("a.png", "mask.png", "-o", "here.png") == 0
    command = ["inpaint", "a.png", "mask.png", "-o", "there.png", "--seed", "0", "--checkpoint", str(checkpoint)]
    run = subprocess.run(
        [sys.executable, "-m", "coherent_ddrm.cli", *command, "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "there.png" in run.stdout, run.stderr
    if not torch.cuda.is_available():
        assert (difference(Image.open("here.png"), Image.open("there.png")) == 0).all()


def test_complaints_do_not_wait_for_torch(checkpoint, tmp_path):
    code = (
        "import sys; from coherent_ddrm.cli import main\n"
        f"codes = [main(['inpaint', 'no.png', 'no.png', '-o', 'x.png', '--checkpoint', {str(checkpoint)!r}]),"
        " main(['inpaint']), main(['inpaint', 'a', 'b', '-o', 'c', '--sampler', 'euler'])]\n"
        "assert codes == [2, 2, 2] and 'torch' not in sys.modules\n"
        "main(['inpaint', '--help'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "white = fill" in run.stdout, run.stderr
    assert run.stderr.count("\n") == 3


# -- mistakes ----------------------------------------------------------------------------------------------------------

BASE = ["a.png", "mask.png", "-o", "out.png"]
MISTAKES = {  # arguments, what the line says
    "no verb": (None, "VERB"),
    "no output": (["a.png", "mask.png"], "-o/--output"),
    "unknown option": ([*BASE, "--setps", "3"], "--setps"),
    "steps": ([*BASE, "--steps", "0"], "'0'"),
    "candidates": ([*BASE, "--candidates", "two"], "'two'"),
    "seed": ([*BASE, "--seed", "-1"], "'-1'"),
    "unknown sampler": ([*BASE, "--sampler", "euler"], "coherent, ddnm"),
    "plan of a method without": ([*BASE, "--sampler", "ddnm", "--save-structure", "p.png"], "ddnm takes no plan"),
    "missing picture": (["no.png", "mask.png", "-o", "out.png"], "no.png"),
    "missing mask": (["a.png", "no.png", "-o", "out.png"], "no.png"),
    "not a picture": (["text.png", "mask.png", "-o", "out.png"], "text.png"),
    "cut picture": (["cut.png", "mask.png", "-o", "out.png"], "cut.png"),
    "sizes differ": (["a.png", "wide.png", "-o", "out.png"], "33 x 32"),
    "empty mask": (["a.png", "black.png", "-o", "out.png"], "nothing to fill"),
    "all hole": (["a.png", "white.png", "-o", "out.png"], "white everywhere"),
    "folder and file": (["folder", "mask.png", "-o", "out"], "folder"),
    "folder without match": (["folder", "masks", "-o", "out"], "'lonely'"),
    "empty folder": (["masks", "masks", "-o", "out"], "no pictures"),
    "output suffix": (["a.png", "mask.png", "-o", "out.xyz"], ".xyz"),
    "gif": (["a.png", "mask.png", "-o", "out.gif"], "256"),
    "alpha into jpeg": (["alpha.png", "mask.png", "-o", "out.jpg"], "transparency"),
    "parent is a file": (["a.png", "mask.png", "-o", "text.png/out.png"], "text.png is not a folder"),
    "overwrites the input": (["a.png", "mask.png", "-o", "a.png"], "a.png is an input"),
    "structure size": ([*BASE, "--structure", "wide.png"], "33 x 32"),
    "structure missing": ([*BASE, "--structure", "no.png"], "no.png"),
    "structure folder": ([*BASE, "--structure", "folder"], "folder"),
    "segmentation label": ([*BASE, "--structure", "plan.png"], "label 200"),
    "device": ([*BASE, "--device", "abacus"], "abacus"),
    "checkpoint missing": ([*BASE, "--checkpoint", "nowhere"], "nowhere"),
    "checkpoint hub-like": ([*BASE, "--checkpoint", "org/name"], "org/name"),
}


@pytest.fixture
def mistakes_folder(tmp_path):
    write_pair(tmp_path)
    make_picture(32, 32, "RGBA").save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:1500])
    make_mask(make_hole(32, 33)).save(tmp_path / "wide.png")
    make_mask(np.zeros((32, 32), bool)).save(tmp_path / "black.png")
    make_mask(np.ones((32, 32), bool)).save(tmp_path / "white.png")
    make_mask(make_hole(32, 32)).save(tmp_path / "plan.png")
    Image.new("L", (32, 32), 200).save(tmp_path / "plan.segmentation.png")
    write_pair(tmp_path / "folder", name="lonely.png")
    (tmp_path / "folder" / "mask.png").unlink()
    (tmp_path / "masks").mkdir()
    return tmp_path


def assert_one_line(capsys, message):
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(mistakes_folder, inpaint, capsys, case):
    arguments, message = MISTAKES[case]
    before = sorted(mistakes_folder.rglob("*"))
    assert (main([]) if arguments is None else inpaint(*arguments)) == 2
    assert_one_line(capsys, message)
    assert sorted(mistakes_folder.rglob("*")) == before  # nothing written, nothing half-written


def damage_nothing(folder):
    """Weights that are not numbers, exported with care."""
    pipe = make_pipeline(planner=False)
    pipe.transformer.final.weight.data[0, 0] = torch.nan
    pipe.save_pretrained(folder)


def damage_byte(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_config(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "colour": 1}))
    write_manifest(folder)


def damage_index(folder):
    (folder / "model_index.json").write_text("{")
    write_manifest(folder)


def damage_header(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    write_manifest(folder)


def no_export(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    damage_nothing: "not finite",
    damage_byte: "safetensors: damaged",
    damage_config: "colour",
    damage_index: "model_index.json",
    damage_header: "cannot be loaded",
    no_export: "manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unreadable_checkpoints(checkpoint, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    shutil.copytree(checkpoint, "bad")
    damage(tmp_path / "bad")
    capsys.readouterr()
    assert main(["inpaint", "a.png", "mask.png", "-o", "out.png", "--checkpoint", "bad"]) == 2
    assert_one_line(capsys, DAMAGES[damage])
    assert not list(tmp_path.glob("out*"))


def test_one_bad_picture_stops_a_folder_before_it_starts(inpaint, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for i, name in enumerate(("a", "b")):
        write_pair(tmp_path / "in", name=f"{name}.png", seed=i)
        shutil.move(tmp_path / "in" / "mask.png", tmp_path / "masks" / f"{name}.png")
    make_mask(np.zeros((32, 32), bool)).save(tmp_path / "masks" / "b.png")
    assert inpaint("in", "masks", "-o", "out", "--batch-size", 1) == 2
    assert_one_line(capsys, "b.png")
    assert not (tmp_path / "out").exists()


def test_results_that_would_collide(inpaint, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for name in ("a", "a-1"):
        write_pair(tmp_path / "in", name=f"{name}.png")
        shutil.copy(tmp_path / "in" / "mask.png", tmp_path / "masks" / f"{name}.png")
    (tmp_path / "in" / "mask.png").unlink()
    assert inpaint("in", "masks", "-o", "in", "--batch-size", 1) == 2
    assert_one_line(capsys, "is an input")
    make_picture(32, 32).save(tmp_path / "in" / "a.bmp")
    assert inpaint("in", "masks", "-o", "out") == 2
    assert_one_line(capsys, "a.bmp")


def test_programming_errors_keep_their_traceback(inpaint, tmp_path, monkeypatch):
    write_pair(tmp_path)
    monkeypatch.setitem(SAMPLERS, "coherent", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inpaint("a.png", "mask.png", "-o", "out.png")


def test_default_checkpoint_is_named_when_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("coherent_ddrm.export.__file__", str(tmp_path / "coherent_ddrm" / "export.py"))
    with pytest.raises(ValueError, match="--checkpoint DIR"):
        default_checkpoint()
