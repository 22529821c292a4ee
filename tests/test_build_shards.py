"""From folders of all sorts of pictures to shards: nothing crashes, nothing is lost, mistakes are explained."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_building import SAME, TOOLS, build, build_shards, contents, folder_of, is_sound, make_reference, photo

from coherent_ddrm.data import ShardDataset
from coherent_ddrm.images import encode
from coherent_ddrm.shards import key_of

# ---------------------------------------------------------------------------------------------- what goes in


def test_all_kinds_of_pictures_and_all_kinds_of_trouble(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    (images / "deep" / "er").mkdir(parents=True)
    good = Image.fromarray(photo(1))
    good.save(images / "deep" / "a.jpg")
    good.convert("L").save(images / "deep" / "er" / "grey.webp")
    good.convert("CMYK").save(images / "cmyk.tif")
    Image.fromarray(photo(2)[..., 0].astype(np.uint16) * 257).save(images / "deep16.png")
    good.convert("RGBA").save(images / "UPPER.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(images / "turned.jpg", exif=exif)
    (images / "no.picture.jpg").write_text("hello")
    (images / "cut.png").write_bytes(encode(photo(3), "PNG")[:-400])
    (images / "empty.png").write_bytes(b"")
    Image.new("1", (5000, 4000)).save(images / "bomb.png")
    Image.new("RGB", (200, 15)).save(images / "thin.png")
    (images / "notes.txt").write_text("not a picture")
    (images / "linked").symlink_to(images / "deep", target_is_directory=True)
    (images / "broken.png").symlink_to(tmp_path / "absent.png")
    manifest = build(images, tmp_path / "out", "--max-pixels", "1000000")
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(reasons) == {"no.picture.jpg", "cut.png", "empty.png", "bomb.png", "thin.png", "broken.png"}
    assert "5000 x 4000 is more pixels" in reasons["bomb.png"]
    assert "200 x 15 is smaller than --min-size 16" in reasons["thin.png"]
    assert "cannot be read" in reasons["broken.png"] and "cut short" in reasons["cut.png"]
    assert manifest["samples"] == 7 and manifest["inputs"]["pictures"] == 13
    assert manifest["inputs"]["other_files"] == 1
    assert manifest["inputs"]["folders_not_entered"] == ["linked (linked folder)"]
    assert is_sound(tmp_path / "out")
    infos = {sample.info["path"]: sample.info for sample in map(ShardDataset(tmp_path / "out").read, range(7))}
    assert infos["turned.jpg"]["size"] == [30, 24]


def test_keys_are_safe_and_unique():
    paths = ["a/b.png", "a_b.png", "a/b.jpg", "../b.png", "ä.png", "a.b.png", "x" * 300 + ".png", "\udcff.png"]
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 80 and not set(key) & set("./\\ ") and key.isascii() for key in keys)


def test_file_names_that_are_not_unicode(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    with open(os.fsencode(images) + b"/\xff\xfe.png", "wb") as file:
        file.write(encode(photo(5), "PNG"))
    build(images, tmp_path / "out")
    assert len(ShardDataset(tmp_path / "out")) == 2


@pytest.mark.parametrize("policy", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_fit_and_format(tmp_path, policy, format):
    out = tmp_path / "out"
    build(folder_of(tmp_path / "images", 2), out, "--fit", policy, "--format", format, "--segmentation", "none")
    assert is_sound(out)
    assert (ShardDataset(out).read(0).image[0, 0] > 245).all() == (policy == "pad")


# ---------------------------------------------------------------------------------------------- segmentation, classes


def test_saliency_with_classes(tmp_path):
    images = folder_of(tmp_path / "images", 4)
    (tmp_path / "c.csv").write_text(
        "image,label,caption\n00.png,Shirt,a shirt\n01.png,Hat,\n02.png,Shirt,\nx.png,Shoe,\n"
    )
    manifest = build(images, tmp_path / "out", "--classes", str(tmp_path / "c.csv"))
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["background", "Hat", "Shirt", "Shoe"] and dataset.class_names == [
        "Hat",
        "Shirt",
        "Shoe",
    ]
    assert manifest["class_counts"] == {"": 1, "Hat": 1, "Shirt": 2} and manifest["saliency"] == {"kept": 4}
    assert manifest["inputs"]["csv_rows_without_picture"] == 1
    for i, (class_id, caption) in enumerate([(1, "a shirt"), (0, None), (1, None), (-1, None)]):
        sample = dataset.read(i)
        assert (sample.class_id, sample.caption) == (class_id, caption)
        assert sample.segmentation[8, 8] == (255 if class_id < 0 else class_id + 1) and sample.segmentation[0, 0] == 0


def test_another_split_takes_the_first_ones_names(tmp_path):
    images = folder_of(tmp_path / "images", 2)
    (tmp_path / "c.csv").write_text("image,label\n00.png,Shirt\n01.png,Hat\n")
    build(images, tmp_path / "train", "--classes", str(tmp_path / "c.csv"))
    (tmp_path / "v.csv").write_text("image,label\n00.png,Shirt\n")
    names = ("--label-names", str(tmp_path / "train" / "manifest.json"))
    build(images, tmp_path / "val", "--classes", str(tmp_path / "v.csv"), *names)
    train, val = ShardDataset(tmp_path / "train"), ShardDataset(tmp_path / "val")
    assert val.label_names == train.label_names and val.class_id(0) == train.class_id(0) == 1
    (tmp_path / "v.csv").write_text("image,label\n00.png,Sock\n")
    build(images, tmp_path / "bad", "--classes", str(tmp_path / "v.csv"), *names, code=2)


def test_saliency_without_classes_and_a_refused_cut(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    Image.new("RGB", (40, 40), (90, 90, 90)).save(images / "flat.png")
    manifest = build(images, tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["background", "foreground"] and manifest["saliency"] == {"kept": 1, "refused": 1}
    assert set(np.unique(dataset.read(0).segmentation)) == {0, 1}
    assert set(np.unique(dataset.read(1).segmentation)) == {255}


def test_label_maps_beside_the_pictures(tmp_path):
    images, maps = folder_of(tmp_path / "images", 4), tmp_path / "maps"
    maps.mkdir()
    ids = np.zeros((24, 30), np.uint8)
    ids[:, 15:] = 2
    ids[:4] = 11
    for name in ("00.png", "01.png"):
        (maps / name).write_bytes(encode(ids, "PNG"))
    (maps / "02.png").write_bytes(encode(ids[:-1], "PNG"))
    manifest = build(images, tmp_path / "out", "--segmentation", f"labels:{maps}", "--ignore-label", "11")
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert "is (30, 23), its picture (30, 24)" in reasons["02.png"] and "no such file" in reasons["03.png"]
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["label 0", "label 1", "label 2"]
    assert set(np.unique(dataset.read(0).segmentation)) == {0, 2, 255}
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    named = ("--label-names", str(tmp_path / "names.txt"), "--ignore-label", "11")
    manifest = build(images, tmp_path / "named", "--segmentation", f"labels:{maps}", *named, code=1)
    assert "holds the id 2, but there are 2 label names" in manifest["skipped"][0]["reason"]


FAKE_TRANSFORMERS = """
import types, numpy, torch
class AutoConfig:
    @staticmethod
    def from_pretrained(name):
        if name != "toy": raise OSError(name + " is not a folder\\nand not a model")
        return types.SimpleNamespace(id2label={"0": "wall", "1": "thing"})
class AutoImageProcessor:
    from_pretrained = classmethod(lambda cls, name: cls())
    def __call__(self, images, return_tensors):
        class Inputs(dict):
            def to(self, device): return self
        return Inputs(pixel_values=torch.from_numpy(images.copy()))
    def post_process_semantic_segmentation(self, outputs, target_sizes):
        assert tuple(outputs.shape) == tuple(target_sizes[0])
        return [outputs]
class AutoModelForSemanticSegmentation:
    from_pretrained = classmethod(lambda cls, name, use_safetensors: cls())
    def to(self, device): return self
    def eval(self): return self
    def __call__(self, pixel_values): return (pixel_values.float().mean(-1) < 128).long()
"""


def test_a_segmentation_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "transformers.py").write_text(FAKE_TRANSFORMERS)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    images = folder_of(tmp_path / "images", 2)
    try:
        build(images, tmp_path / "out", "--segmentation", "model:toy")
        build(images, tmp_path / "bad", "--segmentation", "model:other", code=2)
    finally:
        sys.modules.pop("transformers", None)
    assert "model:other: other is not a folder and not a model" in capsys.readouterr().err
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["wall", "thing"]
    assert dataset.read(0).segmentation[8, 8] == 1 and dataset.read(0).segmentation[0, 0] == 0


# ---------------------------------------------------------------------------------------------- the user's mistakes


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    "options,message",
    [
        (("--size", "32"), "options.size: 16 then, 32 now"),
        (("--segmentation", "none"), "options.segmentation: 'saliency' then, 'none' now"),
        (("--segmentation", "magic"), "use labels:DIR, saliency, model:NAME or none"),
        (("--segmentation", "labels:"), "use labels:DIR"),
        (("--segmentation", "labels:/does/not/exist"), "no such folder"),
        (("--classes", "/does/not/exist.csv"), "/does/not/exist.csv"),
        (("--rank", "2", "--world", "2"), "ranks count from 0 to 1"),
        (("--rank", "0"), "belong together"),
        (("--overwrite", "--rank", "0", "--world", "2"), "one would delete what another wrote"),
    ],
)
def test_mistakes_are_one_clear_line(reference, options, message, capsys):
    images, out = reference
    before = contents(out)
    build(images, out, *SAME, *options, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("build_shards: ")
    assert contents(out) == before


def test_other_pictures_in_the_same_folder_are_refused_until_overwrite(tmp_path, capsys):
    images, out = folder_of(tmp_path / "images", 2), tmp_path / "out"
    build(images, out)
    folder_of(images, 3)
    before = contents(out)
    build(images, out, code=2)
    assert "inputs.pictures: 2 then, 3 now" in capsys.readouterr().err and contents(out) == before
    (out / "mine.txt").write_text("not the tool's")
    assert build(images, out, "--overwrite")["samples"] == 3
    assert (out / "mine.txt").exists() and is_sound(out)


def test_csv_mistakes(tmp_path, capsys):
    images = folder_of(tmp_path / "images", 1)
    table = tmp_path / "c.csv"
    for text, message in (
        ("file,class\n00.png,a\n", "lacks the column 'image'"),
        ("image,label\n00.png,a\n00.png,b\n", "line 3: '00.png' was 'a'"),
        (b"image,label\n\xff\xfe,a\n", "not a readable UTF-8 CSV"),
    ):
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        build(images, tmp_path / "out", "--classes", str(table), code=2)
        assert message in capsys.readouterr().err
    table.write_text("\ufefffile,class\n./00.png,a\n", encoding="utf-8")
    columns = ("--image-column", "file", "--label-column", "class")
    assert build(images, tmp_path / "out", "--classes", str(table), *columns)["class_names"] == ["a"]


def test_empty_missing_and_nested_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", tmp_path / "out", code=2)
    assert "no picture in this folder" in capsys.readouterr().err
    build(tmp_path / "absent", tmp_path / "out", code=2)
    assert "no such folder" in capsys.readouterr().err
    images = folder_of(tmp_path / "images", 1)
    build(images, images / "out", code=2)
    assert "lies inside" in capsys.readouterr().err


def test_only_bad_pictures_is_a_failure_with_a_manifest(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    (images / "00.png").write_bytes(b"bad")
    assert build(images, tmp_path / "out", code=1)["skipped_count"] == 1
    assert is_sound(tmp_path / "out")


def test_help_does_not_load_torch():
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import build_shards\n"
    code += "try: build_shards.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'kornia', 'cv2', 'transformers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4)),
        # an array job's tasks carry SLURM_PROCID too
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (2, 3)),
    ],
)
def test_ranks_from_the_launcher(monkeypatch, environment, expected):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build_shards.rank_and_world(build_shards.parser().parse_args(["a", "b"])) == expected
