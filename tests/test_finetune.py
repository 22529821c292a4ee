"""Fine-tuning: from a folder of pictures to a checkpoint that inpaints; adapters; resume; mistakes in one line."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from shard_building import folder_of
from tiny import RESOLUTION, difference, make_hole, make_mask, make_picture, make_pipeline

from coherent_ddrm import finetune as finetuning
from coherent_ddrm import lora, own_pictures
from coherent_ddrm.checkpoints import read_checkpoint
from coherent_ddrm.cli import main
from coherent_ddrm.dataset import ShardDataset
from coherent_ddrm.errors import CheckpointError, UserError
from coherent_ddrm.export import COMPONENTS, sha256, verify_manifest
from coherent_ddrm.finetune import FineTune, carry_out, examine
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.shards import write_json
from coherent_ddrm.tasks import diffusion

NAMES = ["background", "cup", "hat"]
RANK = 4


def labelled_pipeline(names=NAMES):
    pipe = make_pipeline()
    pipe.register_to_config(label_names=names)
    return pipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a checkpoint, 12 pictures and one that is none, and out/, a finished fine-tuning of 2 steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    root = tmp_path_factory.mktemp("finetune")
    labelled_pipeline().save_pretrained(root / "base")
    for path in folder_of(root / "pictures", 12).iterdir():
        Image.open(path).resize((45, 36)).save(path)
    (root / "pictures" / "odd.jpg").write_bytes(b"no picture")
    assert main(["finetune", *words(root), "--steps", "2"]) == 0
    return root


def words(root: Path, out: str = "out") -> list[str]:
    return [str(root / "pictures"), "-o", str(root / out), "--checkpoint", str(root / "base"), "--label", "cup"]


def ask(root: Path, out: str = "out", **options) -> FineTune:
    return FineTune(
        root / "pictures", root / out, **{"checkpoint": root / "base", "label": "cup", "steps": 2, **options}
    )


def borrow_shards(root: Path, wanted: FineTune):
    """The checked job, with the finished one's shards: they do not depend on what learns."""
    job = examine(wanted)
    shutil.copytree(root / "out" / "run" / "shards", job.shards)
    shutil.copy(root / "out" / "run" / "prepared.json", job.run)
    write_json(job.run / "settings.json", job.settings())
    return job


def weights(folder: Path, name: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def inputs(count: int = 2):
    torch.manual_seed(1)
    x = torch.rand(count, 3, RESOLUTION, RESOLUTION) * 2 - 1
    hole = torch.from_numpy(make_hole(RESOLUTION, RESOLUTION)).float()[None, None].expand(count, 1, -1, -1)
    return x, torch.full((count,), 0.7), hole


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_checkpoint_that_inpaints(work, tmp_path, monkeypatch):
    verify_manifest(work / "out")
    for name in COMPONENTS:
        before, after = weights(work / "base", name), weights(work / "out", name)
        assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    monkeypatch.chdir(tmp_path)
    picture, hole = make_picture(50, 40), make_hole(50, 40)
    picture.save("a.png")
    make_mask(hole).save("mask.png")
    assert main(["inpaint", "a.png", "mask.png", "-o", "b.png", "--checkpoint", str(work / "out"), "--seed", "0"]) == 0
    gap = difference(Image.open("b.png"), picture)
    assert (gap[~hole] == 0).all() and (gap[hole] > 0).mean() > 0.9


def test_the_best_of_the_looks_is_kept(work, monkeypatch):
    """Each look is worse than the one before, so the first counts, not the last."""
    worse = iter(range(1000))
    real = diffusion.Validation.scores
    monkeypatch.setattr(diffusion.Validation, "scores", lambda self, net: real(self, net) | {"val_loss": next(worse)})
    job = borrow_shards(work, ask(work, "best", steps=3))
    carry_out(job, "cpu")
    first, last = (read_checkpoint(job.run / "diffusion" / "checkpoints" / f"step-{i:08d}")[0]["ema"] for i in (1, 3))
    kept = weights(job.out)
    assert all(torch.equal(kept[key], first[key]) for key in first)
    assert any(not torch.equal(kept[key], last[key]) for key in last)


def test_maps_of_ones_own(work):
    """--segmentation labels:DIR, from the maps of half of each picture to a checkpoint."""
    (work / "maps").mkdir()
    for path in (work / "pictures").glob("*.png"):
        ids = np.zeros(np.asarray(Image.open(path)).shape[:2], np.uint8)
        ids[:, 20:] = 2
        Image.fromarray(ids).save(work / "maps" / path.name)
    wanted = FineTune(work / "pictures", work / "mapped", checkpoint=work / "base", steps=1)
    wanted.segmentation = f"labels:{work / 'maps'}"
    job = examine(wanted)
    report = carry_out(job, "cpu")
    batch = ShardDataset(job.shards / "train").batch(np.array([0]))
    assert set(np.unique(batch["segmentation"])) == {0, 2}
    assert report["result_sha256"] == verify_manifest(work / "mapped")


def test_what_is_told_of_it(work):
    report = json.loads((work / "out" / "finetune.json").read_text())
    assert report["pictures"]["trained_on"] + report["pictures"]["held_out"] == 12
    assert list(report["pictures"]["left_out"]) == ["odd.jpg"]
    assert report["checkpoint_sha256"] == verify_manifest(work / "base")
    assert report["result_sha256"] == verify_manifest(work / "out")
    assert str(work) not in json.dumps(report)
    loss = report["scores"]["transformer"]
    assert loss["before"]["val_loss"] != loss["after"]["val_loss"]
    assert "val_loss" in finetuning.table(report) and "held-out" in finetuning.table(report)
    sheets = {path.name: np.asarray(Image.open(path)) for path in (work / "out" / "sheets").iterdir()}
    for name in COMPONENTS:
        before, after = sheets[f"{name}-before.png"], sheets[f"{name}-after.png"]
        assert before.shape == after.shape and (before != after).any()


def test_the_pictures_carry_the_label(work):
    from coherent_ddrm.data import open_dataset

    source = open_dataset(work / "out" / "run" / "shards" / "train")
    assert source.label_names == NAMES
    assert set(np.unique(source.batch(np.arange(len(source)))["segmentation"])) <= {0, 1, 255}


def test_the_same_command_goes_on(work, monkeypatch):
    """Stopped after stage one, then started again: the same weights as the run that was not stopped."""
    from coherent_ddrm import finetune_stages

    AcceleratorState._reset_state(reset_partial_state=True)
    job, train = borrow_shards(work, ask(work, "again")), finetune_stages.train

    def stop(job, stage, device):
        if stage == "diffusion":
            raise SystemExit(143)
        train(job, stage, device)

    monkeypatch.setattr(finetune_stages, "train", stop)
    with pytest.raises(SystemExit):
        carry_out(job, "cpu")
    assert not (job.out / "model_index.json").exists()
    monkeypatch.setattr(finetune_stages, "train", train)
    carry_out(examine(ask(work, "again")), "cpu")
    for name in COMPONENTS:
        once, twice = weights(work / "out", name), weights(work / "again", name)
        assert all(torch.equal(once[key], twice[key]) for key in once)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    net = lora.add_adapter(make_pipeline().transformer, RANK)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return net


@pytest.mark.parametrize("name", COMPONENTS)
def test_only_adapters_learn_and_their_number_is_right(name):
    net = getattr(make_pipeline(), name)
    layers = {key: layer for key, layer in net.named_modules() if key in lora.targets(net, RANK)}
    expected = 0
    for layer in layers.values():
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        kernel = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1  # of A, beside rank x in
        expected += RANK * (columns // kernel * kernel + rows)
    lora.add_adapter(net, RANK)
    learning = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in key for key in learning)
    assert sum(p.numel() for p in learning.values()) == expected
    assert all(RANK in (p.shape[0], p.shape[1]) for p in learning.values())


def test_a_new_adapter_changes_nothing_and_a_learned_one_does(adapted):
    plain, fresh = make_pipeline().transformer, lora.add_adapter(make_pipeline().transformer, RANK)
    with torch.no_grad():
        assert torch.equal(plain(*inputs()), fresh(*inputs()))
        assert (plain(*inputs()) - adapted(*inputs())).abs().max() > 1e-2


def test_merged_equals_unmerged(adapted):
    x, t, hole = inputs()
    with torch.no_grad():
        unmerged = adapted(x, t, hole)
        cached = adapted.denoise(x, t, adapted.context(x, hole))
        merged = lora.merge(copy.deepcopy(adapted))
        assert (merged(x, t, hole) - unmerged).abs().max() < 1e-5
        assert (merged.denoise(x, t, merged.context(x, hole)) - cached).abs().max() < 1e-5
    assert merged.state_dict().keys() == make_pipeline().transformer.state_dict().keys()
    assert not any(isinstance(layer, BaseTunerLayer) for layer in merged.modules())


def test_adapter_round_trip(adapted, tmp_path):
    lora.save_adapter(adapted, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    restored = lora.restore_adapter(make_pipeline().transformer, tmp_path)
    one, other = adapted.state_dict(), restored.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        assert (adapted(*inputs()) - restored(*inputs())).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="does not fit"):
        lora.restore_adapter(make_pipeline().structure, tmp_path)


def test_rank_wider_than_every_layer():
    with pytest.raises(ValueError, match="take a smaller one"):
        lora.add_adapter(make_pipeline().transformer, 4096)


def test_finetune_with_adapters(work):
    """Apart: OUT is the old checkpoint, and old checkpoint + adapters = OUT of the same call with merging."""
    AcceleratorState._reset_state(reset_partial_state=True)
    job = borrow_shards(work, ask(work, "apart", lora=RANK, merge=False))
    report = carry_out(job, "cpu")
    apart, last = work / "apart", job.run / "diffusion" / "checkpoints" / "step-00000002"
    state, learned = load_file(last / "net.safetensors"), load_file(last / "ema.safetensors")
    assert verify_manifest(apart) == verify_manifest(work / "base")
    base = weights(work / "base")
    frozen = {key.replace(".base_layer", ""): value for key, value in state.items() if "lora_" not in key}
    assert frozen.keys() == base.keys() and all(torch.equal(frozen[key], base[key]) for key in base)
    assert any(value.any() for key, value in state.items() if "lora_B" in key)
    assert learned and all("lora_" in key for key in learned)
    assert report["adapter_parameters"] == sum(lora.count_parameters(apart / "lora" / name) for name in COMPONENTS)

    pipe = lora.load_adapter(CoherentInpaintPipeline.from_pretrained(apart), apart / "lora")
    carry_out(examine(ask(work, "apart", lora=RANK)), "cpu")  # the same work, merged
    merged = CoherentInpaintPipeline.from_pretrained(apart)
    for name in COMPONENTS:
        one, other = getattr(pipe, name).state_dict(), getattr(merged, name).state_dict()
        assert all((one[key] - other[key]).abs().max() < 1e-6 for key in other)
    with pytest.raises(CheckpointError, match="belongs to checkpoint"):
        lora.load_adapter(merged, apart / "lora")
    file = apart / "lora" / "transformer" / lora.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\x00" * 2)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        lora.load_adapter(CoherentInpaintPipeline.from_pretrained(work / "base"), apart / "lora")


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_split_depends_on_content_alone(tmp_path):
    folder = folder_of(tmp_path / "a", 20)
    split = own_pictures.split_pictures(folder, 0.2)
    assert len(split.val) == 4 and not set(split.val) & set(split.train) and len(split.train) == 16
    held_out = {sha256(folder / name) for name in split.val}
    for i, name in enumerate(split.val):  # renamed, copied
        shutil.copy(folder / name, folder / f"copy{i}.png")
        (folder / name).rename(folder / f"z{i}.png")
    again = own_pictures.split_pictures(folder, 0.2)
    assert {sha256(folder / name) for name in again.val} == held_out
    assert not held_out & {sha256(folder / name) for name in again.train} and again.digest != split.digest


def test_the_checkpoint_says_what_it_sees(work):
    from coherent_ddrm.finetune_stages import guess_labels

    job = examine(ask(work, "unused", label=None))
    names = [*job.pictures.train, *job.pictures.val]
    guessed = guess_labels(job, names, torch.device("cpu"))
    assert job.guesses and guessed.keys() == set(names) - {"odd.jpg"} and set(guessed.values()) <= set(NAMES[1:])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_leave_nothing(work, tmp_path, capsys, monkeypatch):
    labelled_pipeline(["a", "b", "c"]).save_pretrained(tmp_path / "other")
    few = folder_of(tmp_path / "few", 3)
    (tmp_path / "none").mkdir()
    fine, base = str(work / "pictures"), ["--checkpoint", str(work / "base")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    cases = [
        ([str(few), "-o", "o", *base], "only 3 pictures"),
        ([str(tmp_path / "none"), "-o", "o", *base], "no pictures"),
        ([str(tmp_path / "gone"), "-o", "o", *base], "no such folder"),
        ([fine, "-o", "o", "--checkpoint", str(tmp_path / "other")], "must be label 0"),
        ([fine, "-o", "o", "--checkpoint", str(tmp_path / "few")], "no manifest.json"),
        ([fine, "-o", "o", *base, "--label", "dog"], "cup, hat"),
        ([fine, "-o", "o", *base, "--segmentation", "magic"], "choose one of"),
        ([fine, "-o", "o", *base, "--segmentation", "labels:nowhere"], "no such folder"),
        ([fine, "-o", "o", *base, "--holdout", "0.9"], "at most 0.5"),
        ([fine, "-o", "o", *base, "--no-merge"], "--lora"),
        ([fine, "-o", str(work / "pictures" / "o"), *base], "lies inside"),
        ([fine, "-o", "full", *base], "choose another folder"),
        ([*words(work), "--seed", "7"], "was begun otherwise"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, expected in cases:
        assert main(["finetune", *arguments]) == 2, arguments
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and expected in said.err, said.err
        assert not (tmp_path / "o").exists()


def test_peft_missing(work, capsys, monkeypatch):
    find = finetuning.importlib.util.find_spec
    monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert main(["finetune", *words(work, "o"), "--lora", "4"]) == 2
    assert "pip install 'coherent-ddrm[lora]'" in capsys.readouterr().err


def test_too_many_unusable_pictures(work, tmp_path):
    for split, bad in (("train", 3), ("val", 0)):
        (tmp_path / split).mkdir()
        skipped = [{"path": f"{i}.jpg", "reason": "torn"} for i in range(bad)]
        write_json(tmp_path / split / "manifest.json", {"samples": 4, "skipped": skipped})
    with pytest.raises(UserError, match=r"3 of 11 pictures cannot be used, more than 20%: 0\.jpg: torn"):
        own_pictures.left_out(tmp_path)


def test_a_failed_first_preparation_is_removed(work, monkeypatch):
    monkeypatch.setattr(own_pictures, "TOOL", work / "no_tool.py")
    with pytest.raises(UserError, match="clone"):
        carry_out(examine(ask(work, "fresh")), "cpu")
    assert not (work / "fresh").exists()
