"""Networks of scores: weights come from where they are said to, and no score is ever made of random ones."""

import hashlib
import urllib.error

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from coherent_ddrm.classifier import make_classifier
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.metrics import available, perceptual_distance, score_pairs, sources
from coherent_ddrm.models.perceptual import make_perceptual

ALEX, VGG, INCEPTION = (sources.FILES[name].rpartition("/")[2] for name in ("lpips_alex", "lpips_vgg", "inception"))
WANTED = ["psnr", "lpips_alex", "lpips_alex_hole", "lpips_vgg", "fid", "kid"]


@pytest.fixture(autouse=True)
def no_network_and_no_cache(monkeypatch, tmp_path):
    """Whatever this machine has fetched before, and whether it has a network, is no part of these tests."""

    def offline(*args, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)


def pictures(seed: int, size: int = 64) -> Tensor:
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, size, mode="bilinear")).byte()


def hole_of(x: Tensor) -> Tensor:
    hole = torch.zeros(len(x), 1, *x.shape[-2:])
    hole[..., 20:50, 10:40] = 1
    return hole


def trunk_state(backbone: str) -> dict[str, Tensor]:
    """Random weights of a backbone's features, under torchvision's names."""
    torch.manual_seed(5)
    make = dict(alex=torchvision.models.alexnet, vgg=torchvision.models.vgg16)[backbone]
    with torch.device("meta"):
        features = make(weights=None).features
    features = features.to_empty(device="cpu")
    for weight in features.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return {f"features.{name}": weight for name, weight in features.state_dict().items()}


def library_lpips(backbone: str, state: dict[str, Tensor], spatial: bool) -> lpips.LPIPS:
    """The package's own network, given the weights in their order."""
    net = lpips.LPIPS(net=backbone, pnet_rand=True, spatial=spatial, verbose=False)
    with torch.no_grad():
        for own, weight in zip(net.net.parameters(), state.values(), strict=True):
            own.copy_(weight)
    return net


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
@pytest.mark.parametrize("backbone, file", [("alex", ALEX), ("vgg", VGG)])
def test_lpips_with_local_weights_equals_the_packages(tmp_path, backbone, file):
    state = trunk_state(backbone)
    save_file(state, tmp_path / file.replace(".pth", ".safetensors"))
    before = torch.random.get_rng_state()
    networks, notes = available([f"lpips_{backbone}_hole"], tmp_path)
    assert not notes and list(networks) == [f"lpips_{backbone}"]
    assert torch.equal(torch.random.get_rng_state(), before)
    x, truth = pictures(0), pictures(1)
    hole = hole_of(x)
    scores = score_pairs(x, truth, hole, networks)
    unit = [v.float() / 127.5 - 1 for v in (x, truth)]
    whole = library_lpips(backbone, state, False)(*unit).flatten()
    spatial = library_lpips(backbone, state, True)(*unit)  # (B, 1, H, W)
    assert whole.min() > 1e-3
    torch.testing.assert_close(scores[f"lpips_{backbone}"], whole)
    torch.testing.assert_close(scores[f"lpips_{backbone}_hole"], spatial[..., 20:50, 10:40].mean(dim=(1, 2, 3)))
    assert not perceptual_distance(networks[f"lpips_{backbone}"], truth, truth).any()


def test_small_pictures_have_an_lpips(tmp_path):
    save_file(trunk_state("alex"), tmp_path / ALEX.replace(".pth", ".safetensors"))
    networks, _ = available(["lpips_alex"], tmp_path)
    assert perceptual_distance(networks["lpips_alex"], pictures(0, 32), pictures(1, 32)).isfinite().all()


def test_scores_without_weights_are_left_out_with_a_line_each(tmp_path):
    networks, notes = available(WANTED, tmp_path)
    assert not networks and len(notes) == 3
    assert notes[0].startswith("left out: lpips_alex, lpips_alex_hole: ") and notes[2].startswith("left out: fid, kid:")
    for note, file in zip(notes, (ALEX, VGG, INCEPTION), strict=True):
        assert f"put {file} from https://" in note and str(tmp_path) in note and "no network here" in note
    assert "downloads are off" in available(["fid"], tmp_path, download=False)[1][0]
    assert set(score_pairs(pictures(0), pictures(1), hole_of(pictures(0)), networks)) == {
        *("psnr", "psnr_hole", "ssim", "ssim_hole", "l1", "l1_hole", "seam", "sharpness", "edge_f1", "changed"),
        *("surround_agreement", "mirror_agreement"),
    }


def test_pickles_are_read_as_tensors_only_and_their_hash_is_checked(tmp_path, monkeypatch):
    torch.save(trunk_state("alex"), tmp_path / ALEX)
    networks, notes = available(["lpips_alex"], tmp_path)
    assert not networks and "its SHA-256 is" in notes[0] and "not 7be5be79" in notes[0]
    digest = hashlib.sha256((tmp_path / ALEX).read_bytes()).hexdigest()[:8]
    name = f"alexnet-{digest}.pth"
    (tmp_path / ALEX).rename(tmp_path / name)
    monkeypatch.setitem(sources.FILES, "lpips_alex", f"https://example.org/{name}")
    networks, notes = available(["lpips_alex"], tmp_path)
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16]
    assert not notes and networks["lpips_alex"].identity == f"{name}, sha256 {digest}"

    class Evil:
        def __reduce__(self):
            return print, ("a pickle ran",)

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    monkeypatch.setitem(sources.FILES, "lpips_alex", "https://example.org/evil.pth")
    networks, notes = available(["lpips_alex"], tmp_path)
    assert not networks and "cannot be read" in notes[0]


def test_a_network_is_called_by_the_hash_of_its_own_file(tmp_path, monkeypatch):
    """The name of a .safetensors holds the hash of the publisher's .pth, whatever is in it."""
    file = tmp_path / ALEX.replace(".pth", ".safetensors")
    state, called = trunk_state("alex"), []
    for factor in (1, 2):
        save_file({name: factor * weight for name, weight in state.items()}, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        called.append(available(["lpips_alex"], tmp_path)[0]["lpips_alex"].identity)
        assert called[-1] == f"{file.name}, sha256 {digest[:16]}"
    assert called[0] != called[1]

    def fetch(url, target, *args, **options):
        torch.save(state, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setitem(sources.FILES, "lpips_alex", "https://example.org/fetched.pth")
    networks, notes = available(["lpips_alex"])
    digest = hashlib.sha256((tmp_path / "hub" / "checkpoints" / "fetched.pth").read_bytes()).hexdigest()
    assert not notes and networks["lpips_alex"].identity == f"fetched.pth, sha256 {digest[:16]}"


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(trunk_state("vgg"), tmp_path / ALEX.replace(".pth", ".safetensors"))
    networks, notes = available(["lpips_alex"], tmp_path)
    assert not networks and "holds no weights of lpips_alex" in notes[0]
    with pytest.raises(CheckpointError, match="no such folder"):
        available(["psnr"], tmp_path / "nowhere")


def test_inception_with_local_weights(tmp_path, monkeypatch):
    """The features are torch-fidelity's own, with the weights of the file."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    kind = fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        theirs = kind("inception-v3-compat", ["2048"])
    save_file(theirs.state_dict(), tmp_path / INCEPTION.replace(".pth", ".safetensors"))
    networks, notes = available(["fid"], tmp_path)
    assert not notes and INCEPTION.removesuffix(".pth") in networks["inception"].identity
    x = pictures(0)[:1]
    features = networks["inception"].features(x)
    assert features.shape == (1, 2048) and features.std() > 0
    torch.testing.assert_close(features, theirs(x)[0])


@pytest.mark.parametrize("timed", [False, True])
def test_a_classifier_of_ones_own(tmp_path, timed):
    torch.manual_seed(0)
    classifier = make_classifier("tiny", 4, timed=timed).eval()
    classifier.save_pretrained(tmp_path / "mine")
    networks, notes = available(["fid-mine", "pd-mine", "pd-other"], tmp_path)
    assert list(networks) == ["mine"] and "Classifier of mine, sha256" in networks["mine"].identity
    assert len(notes) == 1 and "left out: pd-other" in notes[0] and str(tmp_path / "other") in notes[0]
    x, truth = pictures(0), pictures(1)
    features = networks["mine"].features(x)
    head = classifier.net.fc(features)
    torch.testing.assert_close(head, classifier(x.float() / 127.5 - 1, torch.zeros(2)))  # the logits, from features
    check_distance(networks, "mine", x, truth)


def test_a_perceptual_network_of_ones_own(tmp_path):
    torch.manual_seed(0)
    net = make_perceptual("tiny").eval()
    net.save_pretrained(tmp_path / "seen")
    networks, _ = available(["pd-seen"], tmp_path)
    x, truth = pictures(0), pictures(1)
    layers = [net.features(v.float() / 127.5 - 1) for v in (x, truth)]
    torch.testing.assert_close(networks["seen"].features(x), layers[0][-1].mean(dim=(2, 3)))
    cosines = [torch.cosine_similarity(a, b, dim=1) for a, b in zip(*layers, strict=True)]
    alive = [a.any(dim=1) & b.any(dim=1) for a, b in zip(*layers, strict=True)]
    assert torch.stack([v.float().mean() for v in alive]).min() > 0.9
    seen = [networks["seen"].layers(v) for v in (x, truth)]
    for layer, cosine, lives in zip(networks["seen"].maps(*seen), cosines, alive, strict=True):
        torch.testing.assert_close(4 * layer[:, 0][lives], 1 - cosine[lives], rtol=1e-4, atol=1e-5)
    check_distance(networks, "seen", x, truth)


def check_distance(networks, name: str, x: Tensor, truth: Tensor) -> None:
    """0 for equal pictures; a change in the hole is felt there more than on the whole."""
    hole = hole_of(x)
    mixed = torch.where(hole.bool(), x, truth)
    scores = score_pairs(mixed, truth, hole, networks)
    assert (scores[f"pd-{name}_hole"] > scores[f"pd-{name}"]).all() and (scores[f"pd-{name}"] > 1e-4).all()
    assert not perceptual_distance(networks[name], truth, truth).any()


def test_the_shipped_network_tells_garments_from_noise():
    networks, notes = available(["pd-clothing", "fid-clothing"])
    assert not notes and networks["clothing"].features(pictures(0)).shape == (2, 224)
    assert "clothing-64-classifier" in networks["clothing"].identity
    x = pictures(0)
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    brighter = (x.float() * 0.9 + 20).byte()
    near, far = (perceptual_distance(networks["clothing"], v, x) for v in (brighter, noise))
    assert (near < 0.5 * far).all()


def test_floats_are_refused():
    networks, _ = available(["pd-clothing"])
    with pytest.raises(ValueError, match="uint8"):
        networks["clothing"].features(pictures(0).float())
