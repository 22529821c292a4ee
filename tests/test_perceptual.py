"""The perceptual network: what it sees, that it stays frozen, its files, its loss, and its training end to end."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_building import build
from torch import nn

from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.losses import perceptual_loss
from coherent_ddrm.models.discriminator import Discriminator
from coherent_ddrm.models.perceptual import NETWORKS, PerceptualNet, load_perceptual, make_perceptual

ROOT = Path(__file__).parent.parent
BatchNorm = nn.modules.batchnorm._BatchNorm


def stir(net: nn.Module) -> nn.Module:
    """No weight and no statistic where it was: timm starts the last norm of each block at zero, which hides it."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*net.parameters(), *net.buffers()]:
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=rng, dtype=value.dtype) - 0.1)
    return net


def network(name="tiny", **options) -> PerceptualNet:
    torch.manual_seed(0)
    return stir(make_perceptual(name, **options)).eval()


def pictures(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- what it sees ----------------------------------------------------------------------------------------------------


def corners_seen(features, side: int) -> int:
    """How many corner pixels the features at the middle depend on. Eight pictures: one path may meet a dead ReLU."""
    x = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    f = features(x.requires_grad_())
    (gradient,) = torch.autograd.grad(f[..., f.shape[-2] // 2, f.shape[-1] // 2].sum(), x)
    corners = gradient.abs().sum(dim=(0, 1))[[0, 0, -1, -1], [0, -1, 0, -1]]
    return int((corners > 0).sum())


def vgg(pooled: bool) -> nn.Sequential:
    """VGG-19's sixteen 3x3 convolutions, narrow; the networks here have as many, or fewer. pooled: as VGG-19 has it."""
    layers, channels = [], 3
    for stage, count in enumerate((2, 2, 4, 4, 4)):
        layers += [nn.MaxPool2d(2)] if stage and pooled else []
        for _ in range(count):
            layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
            channels = 8
    return stir(nn.Sequential(*layers))


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_feature_sees_the_whole_picture(name):
    """The deepest; the first stage, a plain network's view, does not: so the test can fail."""
    backbone = network(name).backbone
    assert corners_seen(lambda x: backbone(x)[-1], 64) == 4
    assert corners_seen(lambda x: backbone(x)[0], 64) == 0


def test_a_vgg_of_the_same_depth_does_not():
    """VGG-19 reaches 252 pixels, too few from 256 on, where the dilated network still sees all (435). At 64 px
    pooling carries it over; without, at the resolution that dilation keeps, it fails there too (33)."""
    torch.manual_seed(0)
    assert corners_seen(vgg(pooled=True), 272) == 0
    assert corners_seen(vgg(pooled=False), 64) == 0
    assert corners_seen(vgg(pooled=True), 64) == 4
    backbone = network("small").backbone
    assert corners_seen(lambda x: backbone(x)[-1], 272) == 4
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 for m in backbone.modules()) == 17


def test_stages_and_border():
    """[-1, 1] is brought to the mean and deviation that a network expects of [0, 1]."""
    x = pictures(side=64)
    assert [f.shape for f in network().features(x)] == [(2, c, s, s) for c, s in ((8, 16), (16, 8), (16, 8), (32, 8))]
    net = network("resnet10t")
    assert tuple(net.config.mean) == (0.485, 0.456, 0.406)
    expected = (x / 2 + 0.5 - torch.tensor(net.config.mean)[:, None, None]) / torch.tensor(net.config.std)[
        :, None, None
    ]
    for a, b in zip(net.features(x), net.backbone(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert network().features(pictures(side=37))[-1].shape[-2:] == (5, 5)


def test_autocast_does_not_blur_the_difference():
    net, x = network(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        low = net.features(x)
    assert all(f.dtype == torch.float32 and torch.equal(f, g) for f, g in zip(low, net.features(x), strict=True))


# ---- frozen ----------------------------------------------------------------------------------------------------------


def test_frozen_for_good():
    net, x = network().freeze(), pictures(3)
    around = nn.Sequential(net).train()
    norms = [m for m in net.modules() if isinstance(m, BatchNorm)]
    assert around.training and norms and not any(m.training for m in [net, *norms])
    before, first = {k: v.clone() for k, v in net.state_dict().items()}, net.features(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())
    for f, alone in zip(first, net.features(x[:1]), strict=True):
        torch.testing.assert_close(f[:1], alone)


def test_it_learns_with_statistics_of_the_batch_until_then():
    net = network().train()
    assert all(m.training for m in net.modules())
    before = net.backbone.layer1[0].bn1.running_mean.clone()
    net(pictures())
    assert not torch.equal(net.backbone.layer1[0].bn1.running_mean, before)


# ---- loss ------------------------------------------------------------------------------------------------------------


class Identity:
    """Two layers of unlike size: the picture, and three times its left half."""

    def features(self, x):
        return [x, 3 * x[..., : x.shape[-1] // 2]]


def test_loss_in_closed_form():
    x0, error = pictures(2, 8), torch.zeros(2, 3, 8, 8)
    error[0] += 0.5  # 0.25 + 9 x 0.25
    error[1, :, :, 4:] = 1.0  # right half: 0.5 + 0
    loss = perceptual_loss(Identity(), x0 + error, x0)
    torch.testing.assert_close(loss, torch.tensor([2.5, 0.5]))
    assert not perceptual_loss(network(), x0, x0).any()


def test_gradient_goes_through_the_prediction_alone():
    net, x0, x0_hat = network().freeze(), pictures().requires_grad_(), (0.5 * pictures()).requires_grad_()
    perceptual_loss(net, x0_hat, x0).sum().backward()
    assert x0.grad is None and bool(x0_hat.grad.flatten(1).any(dim=1).all())
    assert all(p.grad is None for p in net.parameters())


# ---- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    net, x = network(num_labels=3, num_classes=2), pictures()
    net.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = load_perceptual(tmp_path)
    assert loaded.frozen and not loaded.training
    for a, b in zip([*loaded.features(x), *loaded(x)], [*net.features(x), *net(x)], strict=True):
        torch.testing.assert_close(a, b)
    assert loaded(x)[0].shape == (2, 3, 32, 32) and loaded(x)[1].shape == (2, 2)
    assert network()(x) == (None, None)


def test_timms_weights_from_a_file(tmp_path):
    """What the whole network of timm computes, with its head left out."""
    full, x = stir(timm.create_model("resnet10t", pretrained=False, output_stride=8)).eval(), pictures()
    save_file(full.state_dict(), tmp_path / "net.safetensors")
    net = load_perceptual("resnet10t", weights=tmp_path / "net.safetensors")
    mean, std = (torch.tensor(v)[:, None, None] for v in (net.config.mean, net.config.std))
    torch.testing.assert_close(net.features(x)[-1], full.forward_features((x / 2 + 0.5 - mean) / std))
    assert net.frozen
    with pytest.raises(CheckpointError, match=r"'conv1.weight' is missing; it holds no resnet18"):
        load_perceptual("resnet18", weights=tmp_path / "net.safetensors")


def test_weights_of_csail(tmp_path, monkeypatch):
    """LaMa's own encoder: its stem has other names, its shapes and dilations are timm's."""
    with torch.device("meta"):
        backbone = make_perceptual("ade20k").backbone
    assert [backbone.conv1[i].weight.shape[0] for i in (0, 3, 6)] == [64, 64, 128]
    dilations = [[b.conv2.dilation[0] for b in getattr(backbone, f"layer{i}")] for i in (2, 3, 4)]
    assert dilations == [[1] * 4, [1] + [2] * 5, [2, 4, 4]]  # resnet_dilated.py there: the first keeps half

    small = dict(network="resnet18", options=dict(stem_width=8, stem_type="deep", channels=[8, 8, 8, 8]))
    monkeypatch.setitem(NETWORKS, "ade20k", small)
    net, x, rng = network("ade20k"), pictures(), torch.Generator().manual_seed(1)
    layers = {k: v for k, v in net.backbone.state_dict().items() if k.startswith("layer") and "tracked" not in k}
    stem, expected = {}, x
    for i, (before, after) in enumerate(((3, 8), (8, 8), (8, 16)), start=1):  # conv1, bn1, relu1, conv2, ... there
        weight, *norm = (torch.rand(shape, generator=rng) for shape in ((after, before, 3, 3), *[(after,)] * 4))
        stem |= {f"conv{i}.weight": weight - 0.5}
        stem |= dict(zip([f"bn{i}.{k}" for k in ("weight", "bias", "running_mean", "running_var")], norm, strict=True))
        expected = nn.functional.conv2d(expected, weight - 0.5, stride=2 if i == 1 else 1, padding=1)
        scale, shift, mean, variance = norm
        expected = nn.functional.batch_norm(expected, mean, variance, scale, shift).relu()
    save_file(stem | layers, tmp_path / "encoder.safetensors")
    loaded = load_perceptual("ade20k", weights=tmp_path / "encoder.safetensors")
    expected = loaded.backbone.layer1(nn.functional.max_pool2d(expected, 3, stride=2, padding=1))
    torch.testing.assert_close(loaded.features(x)[0], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in layers.items())


def test_timms_own_weights_and_border_are_taken(monkeypatch):
    make, asked = timm.create_model, []

    def pretend(*args, **options):
        asked.append(options.pop("pretrained", False))
        return make(*args, **options)

    monkeypatch.setattr(timm, "create_model", pretend)
    net = load_perceptual("resnet10t")
    assert True in asked and net.frozen and tuple(net.config.std) == (0.229, 0.224, 0.225)


def test_faults_are_one_line(tmp_path, monkeypatch):
    Discriminator(width=8).save_pretrained(tmp_path / "other")
    network().save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "net.pth").write_bytes(b"pickle")
    make = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no network\nat all")
        return make(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    for source, weights, message in (
        (tmp_path / "other", None, "holds no PerceptualNet; train/perceptual.py makes one"),
        (tmp_path / "net", None, "cannot be loaded"),
        ("resnet17", None, "neither a folder with a PerceptualNet nor a model of timm"),
        ("small", None, "has no weights of its own; train it"),
        ("resnet18", None, "its weights are not to be had .*no network at all.*download them"),
        ("resnet18", tmp_path / "torn.safetensors", "cannot be loaded"),
        ("resnet18", tmp_path / "none.safetensors", "cannot be loaded"),
        ("resnet18", tmp_path / "net.pth", "read from .safetensors alone; torch pickles are never loaded"),
        (
            "resnet17",
            tmp_path / "torn.safetensors",
            "unknown network 'resnet17': choose one of small, tiny, ade20k, or a",
        ),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load_perceptual(source, weights=weights)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vgg11", "pvt_v2_b0", "vit_tiny_patch16_224"])
def test_networks_that_cannot_be_dilated_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"network '{name}' cannot be dilated to stride 8 \(.*\); take a residual one"
    ):
        make_perceptual(name)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Discs at 32 px: red ones are hats with label 1, blue ones dresses with label 2, two have no class."""
    root = tmp_path_factory.mktemp("colours")
    for name in ("images", "maps"):
        (root / name).mkdir()
    y, x = np.mgrid[:32, :32]
    rows = ["image,label"]
    for i in range(24):
        inside = np.hypot(x - 12 - i % 8, y - 16) < 9
        picture = np.where(inside[..., None], [(200, 40, 40), (40, 40, 200)][i % 2], 230)
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray((inside * (1 + i % 2)).astype(np.uint8)).save(root / "maps" / f"{i:02d}.png")
        rows += [f"{i:02d}.png,{['hat', 'dress'][i % 2]}"] if i < 22 else []
    (root / "classes.csv").write_text("\n".join(rows))
    classes = ("--classes", str(root / "classes.csv"))
    build(root / "images", root / "out", "--segmentation", f"labels:{root / 'maps'}", *classes, size=32)
    build(root / "images", root / "maps only", "--segmentation", f"labels:{root / 'maps'}", size=32)
    build(root / "images", root / "classes only", "--segmentation", "none", *classes, size=32)
    return root


def load_script():
    spec = importlib.util.spec_from_file_location("train_perceptual", ROOT / "train" / "perceptual.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(out, shards, *options, module=None):
    """Run the training script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--data.train", shards, "--data.val", shards, "--out", out, "--model.network", "tiny"]
    words += ["--optim.batch", "8", "--optim.precision", "fp32", "--optim.optimizer", "adamw", "--optim.cooldown", "0"]
    words += ["--optim.warmup", "1", "--log.every", "1", *options]
    (module or load_script()).main([str(word) for word in words])


def scores(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if any(key.startswith("val_") for key in row)]


def test_it_learns_and_says_how_well(tmp_path, shards):
    train(tmp_path, shards / "out", "--optim.steps", "60", "--optim.lr", "1e-2", "--optim.ema", "0.8")
    last = scores(tmp_path)[-1]
    assert last["val_accuracy"] > 0.9 and last["val_accuracy_trivial"] == pytest.approx(0.5)
    assert last["val_iou"] > 0.6 and last["val_iou_trivial"] < 0.3
    assert last["val_pixels"] > 0.85 and 0.7 < last["val_pixels_trivial"] < 0.8
    assert (tmp_path / "sheets" / "00000060.png").exists()
    net = load_perceptual(tmp_path / "export")
    assert net.frozen and (net.config.num_labels, net.config.num_classes) == (3, 2)


def test_resumed_equals_never_stopped(tmp_path, shards):
    """Weights and the statistics of batch norm."""
    train(tmp_path / "a", shards / "out", "--optim.steps", "4")
    for steps in ("2", "4"):
        train(tmp_path / "b", shards / "out", "--optim.steps", steps)
    for file in ("net", "ema"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000004" / f"{file}.safetensors") for run in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert file == "ema" or any("running_mean" in k for k in a)


def test_a_batch_that_is_no_number_leaves_the_statistics_as_they_were(tmp_path, shards, monkeypatch):
    """The loop skips its step; a running mean that has met one NaN would stay NaN."""
    spoil, module = iter([False, False, True, False]), load_script()
    deform = module.deform
    damage = lambda x, ids: (x * float("nan"), ids) if next(spoil, False) else (x, ids)  # noqa: E731
    monkeypatch.setattr(module, "deform", lambda *args: damage(*deform(*args)))
    train(tmp_path, shards / "out", "--optim.steps", "2", module=module)  # two looks come before the first step
    net = load_file(tmp_path / "checkpoints" / "step-00000002" / "net.safetensors")
    counted = {int(value) for name, value in net.items() if "num_batches" in name}
    assert all(bool(value.isfinite().all()) for value in net.values()) and counted == {1}


@pytest.mark.parametrize(
    ("folder", "left_out", "other"),
    [("maps only", "classes", "segmentation"), ("classes only", "segmentation", "classes")],
)
def test_maps_or_classes_alone(tmp_path, shards, capsys, folder, left_out, other):
    train(tmp_path / "run", shards / folder, "--optim.steps", "1", f"--objective.{left_out}", "0")
    assert ("val_iou" in scores(tmp_path / "run")[-1]) == (other == "segmentation")
    assert ("val_accuracy" in scores(tmp_path / "run")[-1]) == (other == "classes")
    assert (tmp_path / "run" / "sheets" / "00000001.png").exists()
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "bad", shards / folder)
    assert left.value.code == 2 and f"set objective.{left_out} 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(tmp_path / "bad", shards / folder, "--objective.segmentation", "0", "--objective.classes", "0")
    assert "are both 0" in capsys.readouterr().err


def test_dry_run_and_faults(tmp_path, shards, capsys):
    train(tmp_path / "dry", shards / "out", "--dry-run")
    assert "PerceptualNet: 0." in capsys.readouterr().out and not (tmp_path / "dry").exists()
    for options, message in (
        (("--model.network", "nope"), "model.network: unknown network 'nope'"),
        (("--data.val", shards / "maps only"), "data.val: its classes are"),
        (("--data.val", shards / "classes only"), "data.val: its labels are"),
    ):
        with pytest.raises(SystemExit) as left:
            train(tmp_path / "bad", shards / "out", *options)
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_samples_without_labels_teach_nothing():
    objective = load_script().Objective(network(num_labels=3, num_classes=2), 1.0, 1.0, smoothing=0.1)
    segmentation = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    segmentation[0, 4:8] = 1
    loss = objective(pictures(), segmentation, torch.tensor([-1, -1]))
    assert loss[0] > 0 and loss[1] == 0
    loss = objective(pictures(), torch.full_like(segmentation, 255), torch.tensor([-1, 1]))
    assert loss[0] == 0 and loss[1] > 0


def test_the_map_moves_with_the_picture():
    """Labels drawn into the picture are found where they were; in the middle of u nothing changes."""
    module, rng = load_script(), torch.Generator().manual_seed(0)
    ids = (torch.rand(4, 1, 4, 4, generator=rng) < 0.5).float()
    ids = nn.functional.interpolate(ids, size=(32, 32))[:, 0].byte()
    x = (2 * ids.float() - 1)[:, None].expand(-1, 3, -1, -1)
    u = torch.rand(4, 9, generator=rng)
    u[:, 3:] = 0.5  # colours as they were
    moved, labels = module.deform(x, ids, u)
    assert ((moved[:, 0] > 0) == (labels > 0)).float().mean() > 0.97
    assert (labels != ids).float().mean() > 0.1 and labels.dtype == torch.uint8
    same, still = module.deform(x, ids, torch.full((4, 9), 0.5))
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)
    assert torch.equal(still, ids)
