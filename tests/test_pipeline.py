"""The pipeline: known pixels, seeds, plans, callbacks, and the checkpoint folder."""

import importlib
import json
import pkgutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LABELS, RESOLUTION, difference, make_hole, make_mask, make_picture, make_pipeline

import coherent_ddrm
from coherent_ddrm.denoiser import Bound
from coherent_ddrm.errors import CheckpointError, UserError
from coherent_ddrm.export import write_manifest
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.samplers import Coherent
from coherent_ddrm.scene import SAMPLERS


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


SIZES = [(32, 32), (48, 40), (25, 20), (150, 90), (120, 400)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("height, width", SIZES)
def test_known_pixels_are_the_input(pipe, sampler, height, width):
    picture, hole = make_picture(height, width), make_hole(height, width)
    result = pipe(picture, make_mask(hole), generator=0, sampler=sampler).images[0]
    gap = difference(result, picture)
    assert result.size == picture.size
    assert (gap[~hole] == 0).all() and (gap[hole] > 0).mean() > 0.9


def test_mask_polarity(pipe):
    """White is filled, black is kept, whatever form the mask comes in."""
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    forms = [make_mask(hole), hole, hole.astype(np.uint8) * 255, hole.astype(np.float32), torch.from_numpy(hole)[None]]
    results = [np.asarray(pipe(picture, form, generator=0).images[0]) for form in forms]
    assert all((result == results[0]).all() for result in results)
    assert (difference(results[0], picture)[~hole] == 0).all()


def test_hole_pixels_are_not_read(pipe):
    picture, hole = make_picture(90, 130), make_hole(90, 130)
    other = Image.fromarray(np.where(hole[..., None], np.uint8(255) - np.asarray(picture), np.asarray(picture)))
    a, b = (pipe(p, make_mask(hole), generator=3).images[0] for p in (picture, other))
    assert (difference(a, b) == 0).all()


def test_grey_and_alpha_inputs(pipe):
    hole = make_hole(32, 32)
    for mode in ("L", "LA", "RGBA"):
        picture = make_picture(32, 32, mode)
        result = pipe(picture, make_mask(hole), generator=0).images[0]
        assert (difference(result, picture.convert("RGB"))[~hole] == 0).all()


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """Same seed, same noise; sums in a larger batch may round differently, hence the last level."""
    pictures = [make_picture(32, 32, seed=i) for i in range(4)]
    holes = [make_hole(32, 32, (0.1 * i, 0.2, 0.5 + 0.1 * i, 0.9)) for i in range(4)]
    together = pipe(pictures, holes, generator=5, candidates=2)
    for i in range(4):
        alone = pipe(pictures[i], holes[i], generator=5, candidates=2)
        for k in range(2):
            gap = difference(together.images[2 * i + k], alone.images[k])
            assert gap.max() <= 1 and (gap > 0).mean() < 0.01
    assert together.seeds == [(5, k) for _ in range(4) for k in range(2)]


def test_seeds(pipe):
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    run = lambda generator, **options: np.asarray(pipe(picture, hole, generator=generator, **options).images[0])  # noqa: E731
    assert (run(0) == run(0)).all() and difference(run(0), run(1))[hole].mean() > 1
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert (run(generators[0]) == run([generators[1]])).all()
    assert difference(run(generators[0]), run(generators[0]))[hole].mean() > 1  # a generator moves on
    drawn = pipe(picture, hole)
    assert (np.asarray(drawn.images[0]) == run(drawn.seeds[0][0])).all()  # the drawn seed is told


def test_candidates_differ(pipe):
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    output = pipe(picture, hole, generator=0, candidates=3)
    assert len(output.images) == len(output.structure.edges) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert difference(output.images[a], output.images[b])[hole].mean() > 1
    assert (output.structure.plan[0] == output.structure.plan[1]).all()  # one mean plan for all
    several = pipe(picture, hole, generator=0, candidates=2, structure_steps=2).structure.plan
    assert not torch.equal(several[0], several[1])


def test_nfe_counts_network_evaluations(pipe):
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    output = pipe(picture, hole, num_inference_steps=5, structure_steps=2, generator=0)
    assert (output.nfe, output.structure_nfe) == (5, 2) and output.seconds > 0
    assert pipe(picture, hole, generator=0).nfe == pipe.config.steps


def test_callback_sees_and_replaces_latents(pipe):
    picture, hole, seen = make_picture(32, 32), make_hole(32, 32), []

    def white(pipeline, step, t, kwargs):
        seen.append((step, t, tuple(kwargs["latents"].shape)))
        return {"latents": torch.ones_like(kwargs["latents"])} if step == 2 else None

    result = np.asarray(pipe(picture, hole, generator=0, callback_on_step_end=white).images[0])
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1:] == (1.0, (1, 3, 32, 32))
    assert (result[hole] == 255).all() and (result[~hole] == np.asarray(picture)[~hole]).all()
    with pytest.raises(UserError, match="latents"):
        pipe(picture, hole, callback_on_step_end=lambda *_: {"latents": torch.ones(1)})


@pytest.mark.parametrize("form", ["edges", "both", "plan", "output"])
def test_edited_structure_changes_the_hole_only(pipe, form):
    picture, hole = make_picture(70, 40), make_hole(70, 40)
    plain = pipe(picture, hole, generator=0)
    edges = Image.fromarray(255 - np.asarray(plain.structure.edges[0]))
    plain_again = pipe(picture, hole, generator=0, structure=plain.structure)
    assert (difference(plain.images[0], plain_again.images[0]) == 0).all()
    given = {
        "edges": edges,
        "both": (edges, plain.structure.segmentation[0]),
        "plan": -plain.structure.plan[0],
        "output": type(plain.structure)(-plain.structure.plan, [], []),
    }[form]
    edited = pipe(picture, hole, generator=0, structure=given)
    gap = difference(plain.images[0], edited.images[0])
    assert (gap[~hole] == 0).all() and gap[hole].mean() > 0.5
    if form == "edges":
        assert (difference(edited.structure.edges[0], edges) == 0).all()
        assert torch.equal(edited.structure.plan[:, 1:], plain.structure.plan[:, 1:])  # segmentation as predicted


def test_edge_map_of_the_pictures_size(pipe):
    """It is cut and reduced as the picture is; a one-pixel line stays visible."""
    picture, hole = make_picture(200, 200), make_hole(200, 200, (0.4, 0.4, 0.6, 0.6))
    line = np.zeros((200, 200), np.uint8)
    line[100] = 255
    output = pipe(picture, hole, generator=0, structure=Image.fromarray(line))
    edges, window = np.asarray(output.structure.edges[0]), output.windows[0]
    assert edges.max() > 100 and abs(edges.max(axis=1).argmax() - (100 - window.top) * 32 / window.side) <= 1


def test_mixed_plans_in_a_batch(pipe):
    pictures, hole = [make_picture(32, 32, seed=i) for i in range(2)], make_hole(32, 32)
    plain = pipe(pictures, [hole, hole], generator=0, candidates=2)
    edges = Image.fromarray(255 - np.asarray(plain.structure.edges[0]))
    mixed = pipe(pictures, [hole, hole], generator=0, candidates=2, structure=[None, edges])
    moved = [difference(a, b)[hole].mean() > 0.5 for a, b in zip(plain.images, mixed.images, strict=True)]
    assert moved == [False, False, True, True]


def test_output_types(pipe):
    rng = np.random.default_rng(0)
    floats = torch.from_numpy(rng.random((2, 3, 32, 32), dtype=np.float32))
    hole = make_hole(32, 32)
    result = pipe(floats, make_mask(hole), generator=0, output_type="pt").images
    known = torch.from_numpy(~hole)
    assert result.shape == floats.shape and torch.equal(result[..., known], floats[..., known])  # not even rounded
    array = floats.permute(0, 2, 3, 1).numpy()
    images, *_ = pipe(array, make_mask(hole), generator=0, output_type="np", return_dict=False)
    assert np.array_equal(images, result.permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="one size"):
        pipe([make_picture(32, 32), make_picture(40, 32)], [hole, make_hole(40, 32)], output_type="np")


def test_networks_of_other_kinds():
    """No plan; a plan but no predictor; attention that allows no cache."""
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    plain = make_pipeline(planner=False, structure_channels=0)
    assert plain(picture, hole, generator=0).structure is None
    with pytest.raises(UserError, match="no plan"):
        plain(picture, hole, structure=make_mask(hole))
    unplanned = make_pipeline(planner=False)
    assert unplanned(picture, hole, generator=0).structure is None
    with pytest.raises(UserError, match="segmentation"):
        unplanned(picture, hole, structure=make_mask(hole))
    ids = Image.fromarray(np.zeros((32, 32), np.uint8))
    assert unplanned(picture, hole, generator=0, structure=(make_mask(hole), ids)).structure_nfe == 0
    both_ways = make_pipeline(one_way=False)
    assert (difference(both_ways(picture, hole, generator=0, candidates=2).images[1], picture)[~hole] == 0).all()


def test_cache_equals_the_full_network(pipe, monkeypatch):
    """The walk over hole tokens only and the walk with all tokens at every step give the same pictures."""

    def full(net, scene, eta):
        bound = Bound(net, {"hole": scene.hole, "structure": scene.plan})
        return Coherent(bound, scene.observation)

    picture, hole = make_picture(32, 32), make_hole(32, 32)
    cached = pipe(picture, hole, generator=0, candidates=2).images
    monkeypatch.setitem(SAMPLERS, "coherent", full)
    for a, b in zip(cached, pipe(picture, hole, generator=0, candidates=2).images, strict=True):
        assert difference(a, b).max() <= 1


BAD_CALLS = {
    "sizes differ": (dict(mask_image=make_hole(32, 33)), "33 x 32"),
    "empty mask": (dict(mask_image=np.zeros((32, 32), bool)), "nothing to fill"),
    "all hole": (dict(mask_image=np.ones((32, 32), bool)), "white everywhere"),
    "unknown sampler": (dict(sampler="euler"), "coherent, ddnm"),
    "no steps": (dict(num_inference_steps=0), "num_inference_steps is 0"),
    "no candidates": (dict(candidates=0), "candidates is 0"),
    "not a picture": (dict(image="picture.png"), "str"),
    "out of range": (dict(image=np.full((32, 32, 3), 2.0)), "2"),
    "output type": (dict(output_type="latent"), "pil, np, pt"),
    "negative seed": (dict(generator=-1), "-1"),
    "too many generators": (dict(generator=[0, 1]), "2 generators for 1"),
    "edge map size": (dict(structure=Image.new("L", (20, 20))), "20 x 20"),
    "plan shape": (dict(structure=torch.zeros(LABELS, RESOLUTION, RESOLUTION)), "shape"),
    "plan not finite": (dict(structure=torch.full((1 + LABELS, RESOLUTION, RESOLUTION), torch.nan)), "finite"),
    "unknown label": (dict(structure=(Image.new("L", (32, 32)), Image.new("L", (32, 32), 9))), "label 9"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(pipe, case):
    change, message = BAD_CALLS[case]
    with pytest.raises(UserError, match=message):
        pipe(**{"image": make_picture(32, 32), "mask_image": make_hole(32, 32), **change})


def test_result_that_is_not_finite():
    pipe = make_pipeline(planner=False)
    pipe.transformer.final.bias.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        pipe(make_picture(32, 32), make_hole(32, 32))


# -- the checkpoint folder ---------------------------------------------------------------------------------------------


def test_save_and_load(pipe, saved):
    loaded = CoherentInpaintPipeline.from_pretrained(saved)
    assert dict(loaded.config)["label_names"] == ["a", "b", "c"] and loaded.config.resolution == RESOLUTION
    picture, hole = make_picture(32, 32), make_hole(32, 32)
    a, b = (p(picture, hole, generator=0).images[0] for p in (pipe, loaded))
    assert (difference(a, b) == 0).all()
    assert not list(saved.parent.glob(".*")) and len(loaded.checkpoint_hash) == 64


def test_save_over_an_old_export(checkpoint):
    """Old components go, other files stay, and no path of the machine is recorded."""
    (checkpoint / "README.md").write_text("card")
    loaded = CoherentInpaintPipeline.from_pretrained(checkpoint, structure=None)
    loaded.save_pretrained(checkpoint)
    assert CoherentInpaintPipeline.from_pretrained(checkpoint).structure is None
    assert (checkpoint / "README.md").read_text() == "card" and not (checkpoint / "structure").exists()
    assert all(str(checkpoint.parent) not in path.read_text() for path in checkpoint.rglob("*.json"))


def test_exported_files_follow_the_umask(saved):
    weights = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode & 0o777 == (saved / "model_index.json").stat().st_mode & 0o777 != 0o600


def test_bf16(saved):
    """Low precision is close to full precision, and known pixels stay exact."""
    picture, hole = make_picture(70, 50), make_hole(70, 50)
    full, low = (
        CoherentInpaintPipeline.from_pretrained(saved, dtype=dtype)(picture, hole, generator=0).images[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    gap = difference(full, low)
    assert (gap[~hole] == 0).all() and gap[hole].mean() < 8


def test_flipped_byte(checkpoint):
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=file.name):
            CoherentInpaintPipeline.from_pretrained(checkpoint)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_missing_and_added_files(checkpoint):
    extra = checkpoint / "transformer" / "diffusion_pytorch_model.bin"
    extra.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="not listed"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)
    extra.unlink()
    (checkpoint / "structure" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no finished export"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        CoherentInpaintPipeline.from_pretrained(checkpoint / "nowhere")


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "structure/config.json"])
def test_unknown_config_key(checkpoint, file):
    config = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**config, "dephts": 2}))
    write_manifest(checkpoint)  # as if an honest tool had written it
    with pytest.raises(CheckpointError, match="dephts"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)


def test_foreign_component(checkpoint):
    """A checkpoint cannot name the classes that are built from it."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "UNet2DModel"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match="UNet2DModel"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)


def test_weights_of_another_shape(checkpoint):
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    for change in ({"depth": 1}, {"depth": 3}, {"dim": 96}, {"dim": "wide"}):
        (checkpoint / "transformer" / "config.json").write_text(json.dumps({**config, **change}))
        write_manifest(checkpoint)
        with pytest.raises(CheckpointError):
            CoherentInpaintPipeline.from_pretrained(checkpoint)


def test_nan_weights(checkpoint):
    pipe = make_pipeline(planner=False)
    pipe.transformer.blocks[0].down.weight.data[3, 4] = torch.nan
    pipe.save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=r"blocks.0.down.weight"):
        CoherentInpaintPipeline.from_pretrained(checkpoint)


def test_networks_must_fit_each_other(pipe):
    with pytest.raises(CheckpointError, match="channels"):
        CoherentInpaintPipeline(make_pipeline(planner=False, structure_channels=9).transformer, pipe.structure)
    with pytest.raises(CheckpointError, match="multiple"):
        CoherentInpaintPipeline(pipe.transformer, resolution=33)


def test_no_package_is_named_like_a_folder_of_diffusers():
    """diffusers records a class from such a package under the wrong library and then cannot load it."""
    importlib.import_module("diffusers.pipelines")
    for module in pkgutil.walk_packages(coherent_ddrm.__path__, "coherent_ddrm."):
        if module.ispkg:
            assert not hasattr(diffusers.pipelines, module.name.rsplit(".", 1)[1]), module.name


def test_methods_without_a_plan_bad_eta_and_resampling(pipe):
    image, mask = make_picture(32, 32), make_mask(make_hole(32, 32))
    assert pipe(image, mask, 2, generator=0, sampler="ddnm").structure is None
    with pytest.raises(UserError, match="'ddnm' takes no plan"):
        pipe(image, mask, 2, sampler="ddnm", structure=Image.new("L", (32, 32)))
    with pytest.raises(UserError, match=r"eta is 1\.5"):
        pipe(image, mask, 2, eta=1.5)
    assert pipe(image, mask, 20, generator=0, resample=2).nfe == 20 + 5 * 2


def test_guidance_on_the_plan(pipe):
    """0 is the network without its plan, 1 the plain network, between and beyond a line; twice the evaluations."""
    picture, mask = make_picture(RESOLUTION, RESOLUTION), make_mask(make_hole(RESOLUTION, RESOLUTION))
    call = lambda **o: pipe(picture, mask, num_inference_steps=1, generator=0, output_type="pt", **o)  # noqa: E731
    plain, two, none, half = (call(structure_scale=s) for s in (1.0, 2.0, 0.0, 0.5))
    assert torch.equal(plain.images, call().images) and not torch.equal(plain.images, two.images)
    inside = (none.images > 0) & (none.images < 1) & (plain.images > 0) & (plain.images < 1)  # where nothing is clipped
    gap = (half.images - (none.images + plain.images) / 2)[inside].abs()
    assert float(gap.max()) < 1.1 / 255 and (two.nfe, half.nfe, plain.nfe) == (2, 2, 1)
    for wrong in (dict(structure_scale=-1.0), dict(structure_scale=2.0, sampler="ddnm")):
        with pytest.raises(UserError, match=r"structure_scale is -1|takes no plan"):
            call(**wrong)
