"""The classifier behind guidance: its border, its file, and its training script end to end on made-up shards."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from shard_building import build

from coherent_ddrm.classifier import NETWORKS, Classifier, load_classifier, make_classifier
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.examples import make_examples
from coherent_ddrm.guidance import ClassifierGuided
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.schedule import Flow, VPCosine

ROOT = Path(__file__).parent.parent


def network(**options) -> Classifier:
    torch.manual_seed(0)
    return make_classifier("tiny", 3, class_names=["hat", "dress", "shoe"], **options).eval()


def pictures(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("timed", [False, True])
def test_saved_and_loaded(tmp_path, timed):
    net, x, t = network(timed=timed), pictures(), torch.tensor([0.2, 0.9])
    net.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = Classifier.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(x, t), net(x, t))
    assert loaded.label("dress") == 1 and loaded.timed == timed
    assert loaded.label("2") == 2
    for name in ("sock", "3"):
        with pytest.raises(ValueError, match=rf"unknown class '{name}': choose one of hat, dress, shoe, 0 to 2"):
            loaded.label(name)


def test_loaded_to_guide(tmp_path, monkeypatch):
    network().save_pretrained(tmp_path / "net")
    ready = load_classifier(tmp_path / "net")
    assert not ready.training and not any(weight.requires_grad for weight in ready.parameters())
    make_dit("tiny").save_pretrained(tmp_path / "other")
    for source, message in ((tmp_path / "other", "holds no Classifier"), ("resnet17", "neither a folder")):
        with pytest.raises(CheckpointError, match=message):
            load_classifier(source)
    (tmp_path / "net" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_classifier(tmp_path / "net")

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(CheckpointError, match=r"resnet18: .* not to be had .*no network"):
        load_classifier("resnet18")


def test_log_prob():
    net, x = network(), pictures(3)
    logs = net(x).log_softmax(dim=1)
    torch.testing.assert_close(net.log_prob(x, 2), logs[:, 2])
    torch.testing.assert_close(net.log_prob(x, torch.tensor([1, 0, 2])), logs[[0, 1, 2], [1, 0, 2]])


def test_time_is_seen_by_timed_networks_alone():
    net, x = network(timed=True), pictures()
    assert not torch.allclose(net(x, torch.zeros(2)), net(x, torch.ones(2)))
    with pytest.raises(ValueError, match="needs t"):
        net(x)
    assert torch.equal(network()(x, torch.zeros(2)), network()(x))


def test_the_border_is_timms():
    """[-1, 1] is brought to the mean and deviation that a network expects of [0, 1], and to its size."""
    mean, std, x = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), pictures(side=48)
    net = network(mean=mean, std=std)
    expected = ((x + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(net(x), net.net(expected))
    assert torch.equal(network()(x), network().net(x))
    sized, seen = network(size=32), []
    sized.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    sized(x)
    assert seen == [(2, 3, 32, 32)]


def test_timms_own_weights_and_border_are_taken(monkeypatch, tmp_path):
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: make(*args, **{**options, "pretrained": False}))
    net, x = Classifier.pretrained("mobilenetv3_small_050", size=64), pictures()
    assert tuple(net.config.mean) == (0.485, 0.456, 0.406) and net(x).shape == (2, 1000) and not net.training
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(Classifier.from_pretrained(tmp_path)(x), net(x))


def test_any_timm_network_guides():
    """Also one with batch norm, of ImageNet's kind: its p(label) rises, and a picture does not depend on its batch."""
    torch.manual_seed(0)
    classifier = make_classifier("mobilenetv3_small_050", 10).eval()
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    denoiser = lambda x_t, t: 0.5 * x_t  # noqa: E731
    denoiser.schedule = Flow()
    x_t, labels, t = pictures(), torch.tensor([3, 7]), torch.full((2,), 0.8)
    guided = ClassifierGuided(denoiser, classifier, [(None, labels)], scale=0.1)
    result = guided(x_t, t)
    assert bool((classifier.log_prob(result, labels) > classifier.log_prob(0.5 * x_t, labels)).all())
    guided.targets = [(None, labels[:1])]
    torch.testing.assert_close(guided(x_t[:1], t[:1]), result[:1], atol=1e-5, rtol=1e-4)
    assert all(weight.grad is None for weight in classifier.parameters())


def test_ours_fits_the_ten_megabytes():
    assert sum(4 * p.numel() for p in make_classifier("small", 20).parameters()) < 10e6
    assert "small" in NETWORKS
    with pytest.raises(ValueError, match=r"unknown network 'resnet18000'"):
        make_classifier("resnet18000", 20)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Discs at 32 px: red ones are hats, blue ones dresses, and two have no class."""
    root = tmp_path_factory.mktemp("colours")
    (root / "images").mkdir()
    y, x = np.mgrid[:32, :32]
    rows = ["image,label"]
    for i in range(24):
        colour = [(200, 40, 40), (40, 40, 200)][i % 2]
        inside = np.hypot(x - 12 - i % 8, y - 16) < 9
        picture = np.where(inside[..., None], colour, 230)
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        rows += [f"{i:02d}.png,{['hat', 'dress'][i % 2]}"] if i < 22 else []
    (root / "classes.csv").write_text("\n".join(rows))
    build(root / "images", root / "out", "--segmentation", "none", "--classes", str(root / "classes.csv"), size=32)
    return root / "out"


def load_script():
    spec = importlib.util.spec_from_file_location("train_classifier", ROOT / "train" / "classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(out, shards, *options):
    """Run the training script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--data.train", shards, "--data.val", shards, "--out", out, "--model.network", "tiny"]
    words += ["--optim.batch", "8", "--optim.precision", "fp32", "--optim.optimizer", "adamw", "--optim.cooldown", "0"]
    words += ["--optim.warmup", "1", "--log.every", "1", *options]
    load_script().main([str(word) for word in words])


def scores(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "val_accuracy" in row]


@pytest.mark.parametrize("timed", [False, True])
def test_it_learns_and_says_how_well(tmp_path, shards, timed):
    train(tmp_path, shards, "--optim.steps", "40", "--optim.lr", "3e-3", "--optim.ema", "0.9", "--model.timed", timed)
    last = scores(tmp_path)[-1]
    assert last["val_accuracy"] > 0.9 and last["val_majority"] == pytest.approx(0.5) and last["val_loss"] < 0.6
    assert (tmp_path / "sheets" / "00000040.png").exists()
    classifier = Classifier.from_pretrained(tmp_path / "export")
    assert classifier.config.class_names == ["dress", "hat"] and classifier.timed == timed


def test_resumed_equals_never_stopped(tmp_path, shards):
    train(tmp_path / "a", shards, "--optim.steps", "4")
    for steps in ("2", "4"):
        train(tmp_path / "b", shards, "--optim.steps", steps)
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000004" / "ema.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples_without_a_class_teach_nothing():
    module = load_script()
    objective = module.Objective(network(), smoothing=0.1)
    loss = objective(pictures(), torch.tensor([1, -1]), None)
    assert loss[0] > 0 and loss[1] == 0


def test_pictures_are_erased_as_guidance_shows_them():
    module = load_script()
    x, hole = torch.zeros(4, 3, 8, 8), torch.zeros(4, 1, 8, 8)
    hole[:3, :, :4] = 1
    hole[3, :, :1] = 1  # too little to tell a class
    seen = module.erase(x, hole, torch.tensor([0.1, 0.3, 0.9, 0.3]), share=0.5)
    assert torch.equal(seen[0, :1], hole[0]) and torch.equal(seen[1, :1], 1 - hole[1])
    assert not seen[2].any() and not seen[3].any()


def test_changes_are_the_identity_in_the_middle():
    module, x = load_script(), pictures()
    torch.testing.assert_close(module.deform(x, torch.full((2, 10), 0.5)), x, atol=1e-5, rtol=0)
    assert torch.equal(module.soften(x, torch.zeros(2, 2), torch.randn_like(x)), x)
    flat = module.soften(x, torch.tensor([[1.0, 0.0]] * 2), x)
    assert flat.var() < 0.1 * x.var() and float(flat.mean()) == pytest.approx(float(x.mean()), abs=0.01)


def test_a_timed_network_is_shown_noisy_pictures():
    module, black = (
        load_script(),
        {"image": np.zeros((256, 8, 8, 3), np.uint8), "edges": np.zeros((256, 8, 8), np.uint8)},
    )
    black["segmentation"] = black["edges"]
    make = lambda: make_examples(black, "half", 0, 0, range(256), 256)  # noqa: E731
    x, t = module.shown(make(), erased=0, softened=0, timed=True)
    clear, no_time = module.shown(make(), erased=0, softened=0, timed=False)
    alpha, sigma = VPCosine()(t[:, None, None, None])
    z = (x - alpha * clear) / sigma
    assert no_time is None and float(z.std()) == pytest.approx(1, abs=0.02) and abs(float(z.mean())) < 0.02
    soft, _ = module.shown(make(), erased=0, softened=0.5, timed=False)
    changed = (soft != clear).flatten(1).any(dim=1)
    assert 0.4 < float(changed.float().mean()) < 0.6


def test_dry_run_and_faults(tmp_path, shards, capsys):
    train(tmp_path / "dry", shards, "--dry-run")
    assert "Classifier: 0." in capsys.readouterr().out and not (tmp_path / "dry").exists()
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "bad", shards, "--model.network", "nope")
    assert left.value.code == 2 and "model.network: unknown network 'nope'" in capsys.readouterr().err
