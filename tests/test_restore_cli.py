"""`coherent-ddrm restore` and `methods`: files in, files out, one line for each mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import RESOLUTION, make_hole, make_mask, make_picture, make_pipeline

from coherent_ddrm.classifier import make_classifier
from coherent_ddrm.cli import main
from coherent_ddrm.methods import page
from coherent_ddrm.operators import OPERATORS
from coherent_ddrm.restore_jobs import parse_options
from coherent_ddrm.samplers import PLAIN, RESTORERS


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior") / "checkpoint"
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def restore(prior, tmp_path, capsys):
    make_picture(40, 50).save(tmp_path / "in.png")

    def call(*words, image="in.png", out="out.png"):
        words = [str(tmp_path / image), "-o", str(tmp_path / out), "--prior", prior, "--steps", "2", *words]
        code = main(["restore", *words])
        return code, capsys.readouterr()

    return call


def test_a_clean_picture_is_degraded_and_restored(restore, tmp_path):
    code, said = restore("--operator", "super_resolution:4", "--degrade", "--seed", "3", "--option", "eta=0.2")
    assert code == 0 and "nfe 2, seed 3" in said.out
    assert Image.open(tmp_path / "out.png").size == (RESOLUTION, RESOLUTION)
    assert Image.open(tmp_path / "out.y.png").size == (RESOLUTION // 4, RESOLUTION // 4)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["options"] == {"eta": 0.2} and record["residual"] < 1e-4 and record["sampler"] == "ddnm"


def test_y_alone_and_the_same_seed(restore, tmp_path):
    make_picture(8, 8).save(tmp_path / "small.png")
    for out in ("a.png", "b.png"):
        assert restore("--operator", "super_resolution:4", "--seed", "1", image="small.png", out=out)[0] == 0
    results = [np.asarray(Image.open(tmp_path / out)) for out in ("a.png", "b.png")]
    assert np.array_equal(*results) and results[0].shape == (RESOLUTION, RESOLUTION, 3)
    means = results[0].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert np.abs(means - np.asarray(Image.open(tmp_path / "small.png"))).max() < 60  # clipped to 8 bits, not exact
    assert not (tmp_path / "a.y.png").exists()


def test_a_folder_with_masks(restore, tmp_path):
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        make_picture(RESOLUTION, RESOLUTION, seed=i).save(tmp_path / "pictures" / f"{i}.png")
        make_mask(make_hole(RESOLUTION, RESOLUTION)).save(tmp_path / "masks" / f"{i}.png")
    words = ("--operator", "inpainting", "--sampler", "coherent", "--mask", str(tmp_path / "masks"))
    code, said = restore(*words, "--candidates", "2", image="pictures", out="done")
    assert code == 0 and "2 pictures" in said.out, said.err
    hole = make_hole(RESOLUTION, RESOLUTION)
    for name in ("0-1.png", "0-2.png", "1-1.png"):
        before = np.asarray(Image.open(tmp_path / "pictures" / f"{name[0]}.png"))
        assert (np.asarray(Image.open(tmp_path / "done" / name)) == before)[~hole].all()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "export"
    make_classifier("tiny", 2, class_names=["Dress", "Hat"]).save_pretrained(folder)
    return str(folder)


def test_what_is_hidden_shall_be_a_dress(restore, tmp_path, classifier):
    for name, box in (("mask", (0.2, 0.3, 0.7, 0.8)), ("top", (0.0, 0.0, 0.5, 1.0))):
        make_mask(make_hole(40, 50, box)).save(tmp_path / f"{name}.png")
    words = ["--operator", "inpainting", "--sampler", "guidpaint", "--option", "clean=true", "--degrade"]
    words += ["--mask", str(tmp_path / "mask.png"), "--seed", "0"]
    assert restore(*words, out="plain.png")[0] == 0
    words += ["--classifier", classifier, "--guidance-scale", "2000", "--show", "Dress"]
    assert restore(*words, "--show", f"Hat={tmp_path / 'top.png'}", out="guided.png")[0] == 0
    plain, guided = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "guided"))
    assert (plain != guided).any()
    record = json.loads((tmp_path / "guided.json").read_text())
    assert record["show"][0] == "Dress" and record["guidance_scale"] == 2000 and record["residual"] == 0
    code, said = restore(*words, "--show", "Sock")
    assert code == 2 and "unknown class 'Sock': choose one of Dress, Hat, 0 to 1" in said.err


MISTAKES = {
    "classifier": (["--operator", "denoising", "--show", "Dress", "--classifier", "/no/where"], "neither a folder"),
    "show what": (["--operator", "denoising", "--classifier", "resnet18"], "go together"),
    "operator": (["--operator", "blurr"], "unknown operator 'blurr'"),
    "sampler": (["--operator", "denoising", "--sampler", "best"], "unknown sampler 'best'"),
    "option": (["--operator", "denoising", "--option", "eta"], "NAME=VALUE"),
    "unknown option": (["--operator", "denoising", "--option", "zeta=1"], "no option 'zeta'"),
    "steps": (["--operator", "denoising", "--steps", "0"], "whole number from 1"),
    "prior": (["--operator", "denoising", "--prior", "/nowhere/at/all"], "/nowhere/at/all"),
    "mask": (["--operator", "inpainting", "--mask", "/no/mask.png"], "no such file"),
    "needs a mask": (["--operator", "inpainting", "--degrade"], "needs a hole"),
    "refused": (["--operator", "super_resolution:4", "--sampler", "repaint", "--degrade"], "RePaint inpaints"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(restore, tmp_path, name):
    words, message = MISTAKES[name]
    code, said = restore(*words)
    assert code == 2 and message in said.err and said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"in.png"}


def test_an_input_is_never_overwritten(restore):
    code, said = restore("--operator", "denoising", out="in.png")
    assert code == 2 and "is an input" in said.err


def test_options_are_numbers_words_and_switches():
    given = ["eta=0.5", "repeats=2", "renoise=marginal", "clip=false"]
    assert parse_options(given) == {"eta": 0.5, "repeats": 2, "renoise": "marginal", "clip": False}


def test_methods_lists_everything(capsys):
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in [*PLAIN, *RESTORERS, *OPERATORS])


def test_the_page_is_current():
    committed = Path(__file__).parent.parent / "docs" / "methods.md"
    assert committed.read_text() == page(), "write it anew: coherent-ddrm methods --markdown > docs/methods.md"
