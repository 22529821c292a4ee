import json
import shutil

import pytest
import torch
from adm import Weights, adm
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION, make_pipeline

from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.guided_diffusion import CHANNEL_MULT, Flags, alphas_cumprod, convert, read_flags, unet_config
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.priors import load_prior
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import DDIM, DDNM, sample
from coherent_ddrm.schedule import expand, time_grid

SIZE = 8
BETAS = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}


def make_unet(out_channels=3, seed=0, **options):
    torch.manual_seed(seed)
    shape = dict(sample_size=SIZE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet2DModel(out_channels=out_channels, **{**shape, **blocks, **options}).eval()


def save(folder, net, scheduler, kind=DDPMPipeline):
    kind(net, scheduler).save_pretrained(folder)
    return folder


def noise(count=2, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", BETAS)
@torch.no_grad()
def test_x0_hat_is_that_of_the_networks_own_scheduler(tmp_path, betas, prediction):
    options = dict(beta_schedule=betas, prediction_type=prediction, **BETAS[betas])
    net, timesteps = make_unet(), torch.tensor([0, 1, 400, 998, 999])
    x_t, t = noise(len(timesteps)), (timesteps + 1) / 1000
    output = net(x_t, timesteps).sample
    for kind, clip in [(DDPMScheduler, True), (DDIMScheduler, False)]:
        scheduler = kind(clip_sample=clip, clip_sample_range=0.8, **options)
        scheduler.set_timesteps(1000)
        prior = load_prior(save(tmp_path / kind.__name__, net, scheduler))
        assert prior.clip == (0.8 if clip else None) and prior.prediction == prediction
        magnified = 1 / prior.schedule(t)[0] if prediction == "epsilon" else torch.ones(5)
        for i, ours in enumerate(prior(x_t, t)):
            theirs = scheduler.step(output[i], timesteps[i], x_t[i]).pred_original_sample
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * float(magnified[i]))


@pytest.mark.parametrize("betas", BETAS)
def test_levels_are_the_schedulers(tmp_path, betas):
    scheduler = DDPMScheduler(beta_schedule=betas, num_train_timesteps=500, **BETAS[betas])
    schedule = load_prior(save(tmp_path, make_unet(), scheduler)).schedule
    alpha_t, sigma_t = schedule(torch.arange(501) / 500)
    assert schedule.levels == 500 and alpha_t[0] == 1 and sigma_t[0] == 0
    torch.testing.assert_close(alpha_t[1:], scheduler.alphas_cumprod.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sigma_t[1:] ** 2, 1 - scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("snr", ["plain", "zero terminal"])
@pytest.mark.parametrize("clip", [False, True])
@torch.no_grad()
def test_ddim_walks_where_diffusers_walks(tmp_path, clip, snr):
    """10 steps at eta 0 from the same noise; with clipping, diffusers must read eps off the clipped x0, as we do."""
    zero = snr != "plain"
    scheduler = DDIMScheduler(
        clip_sample=clip,
        timestep_spacing="trailing",
        prediction_type="v_prediction" if zero else "epsilon",
        rescale_betas_zero_snr=zero,
    )
    net = make_unet()
    prior = load_prior(save(tmp_path, net, scheduler, DDIMPipeline))
    path, z = [], noise()
    rng = [keyed_generator(0, i) for i in range(2)]
    sample(DDIM(prior), z, time_grid(10), rng, callback=lambda i, s, x_s: path.append(x_s))
    scheduler.set_timesteps(10)
    x = z
    for i, k in enumerate(scheduler.timesteps.tolist()):
        x = scheduler.step(net(x, k).sample, k, x, use_clipped_model_output=clip).prev_sample
        torch.testing.assert_close(path[i], x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert len(path) == 10 and (not clip or path[-1].abs().max() <= 1)


@torch.no_grad()
def test_learned_variance_is_ignored_and_classes_are_told(tmp_path):
    net, x_t, t = make_unet(out_channels=6, num_class_embeds=4), noise(), torch.full((2,), 0.3)
    prior = load_prior(save(tmp_path, net, DDPMScheduler(prediction_type="sample", clip_sample=False)))
    label = torch.tensor([0, 3])
    assert prior.labels == 4 and prior.channels == 3 and prior.resolution == SIZE
    torch.testing.assert_close(prior(x_t, t, class_labels=label), net(x_t, 299, label).sample[:, :3])
    with pytest.raises(ValueError, match="knows 4 classes"):
        prior(x_t, t)


def test_bare_unet_takes_the_scheduler_beside_it(tmp_path):
    save(tmp_path, make_unet(), DDPMScheduler(beta_end=0.03))
    beside = load_prior(tmp_path / "unet")
    shutil.copytree(tmp_path / "unet", tmp_path / "alone")
    with pytest.raises(
        CheckpointError, match=r"without scheduler_config.json, so the noise .* is unknown; put that file"
    ):
        load_prior(tmp_path / "alone")
    shutil.copy(tmp_path / "scheduler" / "scheduler_config.json", tmp_path / "alone")
    assert load_prior(tmp_path / "alone").schedule == beside.schedule == load_prior(tmp_path).schedule


@torch.no_grad()
def test_attention_weights_under_their_old_names_are_read(tmp_path, good):
    """As in google/ddpm-*: query, key, value, proj_attn."""
    folder, names = shutil.copytree(good, tmp_path / "old"), dict(to_q="query", to_k="key", to_v="value")
    names["to_out.0"] = "proj_attn"

    def rename(weights):
        for new, old in names.items():
            for name in [name for name in weights if f".{new}." in name]:
                weights[name.replace(new, old)] = weights.pop(name)

    rewrite(folder, rename)
    assert torch.equal(load_prior(folder)(noise(), torch.ones(2)), load_prior(good)(noise(), torch.ones(2)))


@torch.no_grad()
def test_prior_restores_in_low_precision_too(tmp_path):
    save(tmp_path, make_unet(), DDPMScheduler())
    prior = load_prior(tmp_path, "cpu", torch.bfloat16)
    assert prior.net.dtype == torch.bfloat16 and not any(w.requires_grad for w in prior.net.parameters())
    y, hole = noise().clamp(-1, 1), torch.zeros(2, 1, SIZE, SIZE)
    hole[..., 2:6, 2:6] = 1
    rng = [keyed_generator(1, i) for i in range(2)]
    x0 = sample(DDNM(prior, Observation(y * (1 - hole), Inpainting(hole))), normal(y, rng), time_grid(3), rng)
    assert x0.dtype == torch.float32 and torch.equal(x0 * (1 - hole), y * (1 - hole))


# ---------------------------------------------------------------------------------------------- ours


def test_our_checkpoint_is_a_prior(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "ours")
    x_t, t = noise(size=RESOLUTION), torch.full((2,), 0.7)
    with torch.no_grad():
        expected = pipe.transformer(x_t, t)
    prior = load_prior(tmp_path / "ours")
    assert (prior.resolution, prior.channels, prior.labels) == (RESOLUTION, 3, 0) and prior.per_pixel_time
    for same in (prior(x_t, t), prior(x_t, t), load_prior(tmp_path / "ours" / "transformer")(x_t, t)):
        torch.testing.assert_close(same, expected)
    torch.testing.assert_close(prior(x_t[:1], t[:1]), expected[:1])  # another batch, another context
    time = torch.full((2, 1, RESOLUTION, RESOLUTION), 0.7)
    torch.testing.assert_close(prior(x_t, time), expected)
    slope = torch.autograd.grad(prior(x_t.requires_grad_(), t).sum(), x_t)[0]
    assert slope.isfinite().all() and slope.abs().max() > 0
    low = load_prior(tmp_path / "ours", dtype=torch.bfloat16)(x_t.detach(), t)
    assert low.dtype == torch.float32 and 0 < (low - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_damage_of_our_checkpoint_is_named(tmp_path):
    make_pipeline(planner=False).save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "time.mlp.0.bias": weights["time.mlp.0.bias"] + 1}, file)
    with pytest.raises(CheckpointError, match="damaged, its sha256"):
        load_prior(tmp_path)


# ---------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(tmp_path_factory.mktemp("good"), make_unet(), DDPMScheduler())


def edit(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def rewrite(folder, change):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def as_pickle(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def cut(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "pickle": (as_pickle, r"unet: no weights in .safetensors; torch pickles are never loaded; .*save_file"),
    "cut short": (cut, r"unet: cannot be loaded"),
    "not a number": (
        lambda f: rewrite(f, lambda w: w["conv_in.bias"].fill_(torch.nan)),
        r"weight 'conv_in.bias' holds numbers that are not finite",
    ),
    "missing": (
        lambda f: rewrite(f, lambda w: w.pop("conv_out.bias")),
        r"weight 'conv_out.bias' is missing \(1 such\)",
    ),
    "unexpected": (
        lambda f: rewrite(f, lambda w: w.update(more=torch.ones(1))),
        r"weight 'more' is unexpected \(1 such\)",
    ),
    "shape": (lambda f: rewrite(f, lambda w: w.update({"conv_in.bias": torch.ones(3)})), r"unet: "),
    "unknown key": (lambda f: edit(f / "unet" / "config.json", dropuot=0.1), r"unknown key 'dropuot'"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), r"config.json: not readable as JSON"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler_config.json: not readable as JSON"),
    "flow": (
        lambda f: FlowMatchEulerDiscreteScheduler().save_pretrained(f / "scheduler"),
        r"FlowMatchEulerDiscreteScheduler has no betas of a DDPM",
    ),
    "beta schedule": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule="sqrt"),
        r"scheduler_config.json: not usable \(.*sqrt",
    ),
    "no noise": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", trained_betas=[0.0, 0.0]),
        r"not usable \(alphas_cumprod must fall",
    ),
    "thresholding": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", thresholding=True),
        r"thresholding is not done here; set it to false",
    ),
    "prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"),
        r"unknown prediction 'flow_prediction': choose one of epsilon",
    ),
    "zero terminal snr": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True),
        r"epsilon cannot start at alpha_t = 0",
    ),
    "latent": (
        lambda f: edit(f / "model_index.json", vqvae=["diffusers", "VQModel"], _class_name="LDMPipeline"),
        r"LDMPipeline has a vqvae too; a prior is a U-Net on pixels",
    ),
    "other network": (
        lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet2DConditionModel"]),
        r"the unet of its DDPMPipeline is \['diffusers', 'UNet2DConditionModel'\]",
    ),
    "wide": (
        lambda f: edit(f / "unet" / "config.json", sample_size=[8, 16]),
        r"sample_size is .*; a prior makes square",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"neither model_index.json nor config.json"),
    "other model": (
        lambda f: ((f / "model_index.json").unlink(), (f / "config.json").write_text('{"_class_name": "VQModel"}')),
        r"a VQModel; a prior is a UNet2DModel",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_with_a_folder_is_said_on_one_line(tmp_path, good, name):
    damage, message = DAMAGE[name]
    folder = shutil.copytree(good, tmp_path / "prior")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_prior(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(out_channels=4), "4 channels from 3; a prior returns as many"),
        (dict(time_embedding_type="fourier"), "time_embedding_type is 'fourier', not 'positional'"),
        (dict(class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    ],
)
def test_other_kinds_of_unet_are_refused(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        load_prior(save(tmp_path, make_unet(**options), DDPMScheduler()))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "no such checkpoint folder, and no Hub repository"),
        ("nobody/no-such-prior", r"no such folder, and not to be had from the Hub .*; download it where"),
        ("not a name/at all!", "not to be had from the Hub"),
        ("weights/prior.safetensors", "no such file"),
        ("prior.ckpt", "no such file"),
    ],
)
def test_names_that_lead_nowhere(source, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_prior(source)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- guided-diffusion

FLAGS = dict(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(8,),
    num_heads=4,
    class_cond=False,
    num_classes=5,
    use_scale_shift_norm=True,
    resblock_updown=True,
    learn_sigma=True,
)
CASES = {
    "as released": dict(num_head_channels=16, class_cond=True),
    "new attention order": dict(num_head_channels=16, use_new_attention_order=True),
    "num_heads": dict(num_heads=2),
    "convolutions": dict(resblock_updown=False, use_scale_shift_norm=False, learn_sigma=False, class_cond=True),
    "attention everywhere": dict(attention_resolutions=(16, 8), num_head_channels=8, num_res_blocks=2),
    "attention at the top": dict(attention_resolutions=(16,), num_head_channels=8, resblock_updown=False),
    "three levels": dict(channel_mult=(1, 1, 3), attention_resolutions=(8,), num_head_channels=32),
}


def make_adm(changes, seed=3):
    """(flags, weights) of a random checkpoint."""
    flags, weights = {**FLAGS, **changes}, Weights(seed)
    label = torch.zeros(1, dtype=torch.long) if flags["class_cond"] else None
    adm(weights, flags, torch.zeros(1, 3, flags["image_size"], flags["image_size"]), torch.zeros(1), label)
    return flags, weights


def save_adm(folder, flags, weights):
    folder.mkdir(exist_ok=True)
    save_file(dict(weights), folder / "adm.safetensors")
    (folder / "adm.json").write_text(json.dumps(flags))
    return folder / "adm.safetensors"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_converted_unet_computes_what_adm_computes(case):
    flags, weights = make_adm(CASES[case])
    net = UNet2DModel(**unet_config(read_flags(flags))).eval()
    net.load_state_dict(convert(weights, read_flags(flags)), strict=True)
    x, timestep = noise(3, 16), torch.tensor([0.0, 250.0, 999.0])
    label = torch.tensor([4, 0, 2]) if flags["class_cond"] else None
    expected = adm(weights, flags, x, timestep, label)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(net(x, timestep, label).sample, expected, rtol=1e-5, atol=1e-5)  # eps 1e-6: 8e-5


@torch.no_grad()
def test_guided_diffusion_file_is_a_prior(tmp_path):
    flags, weights = make_adm(CASES["as released"])
    as_typed = {
        **flags,
        "channel_mult": "1,2",
        "attention_resolutions": "8",
        "timestep_respacing": "250",
        "dropout": 0.1,
    }
    file = save_adm(tmp_path, {**as_typed, "noise_schedule": "cosine"}, weights)
    prior = load_prior(file)
    assert (prior.resolution, prior.channels, prior.labels, prior.clip) == (16, 3, 5, 1.0)
    x_t, label, t = noise(1, 16), torch.tensor([1]), torch.tensor([0.2])
    alpha_t, sigma_t = prior.schedule(expand(t, x_t))
    eps = adm(weights, flags, x_t, torch.tensor([199.0]), label)[:, :3]
    expected = ((x_t - sigma_t * eps) / alpha_t).clamp(-1, 1)
    torch.testing.assert_close(prior(x_t, t, class_labels=label), expected, rtol=1e-4, atol=1e-4)
    save(tmp_path / "diffusers", prior.net, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    again = load_prior(tmp_path / "diffusers")
    torch.testing.assert_close(again(x_t, t, class_labels=label), expected, rtol=1e-4, atol=1e-4)


def test_time_may_be_rescaled_and_x0_predicted(tmp_path):
    flags, weights = make_adm({})
    file = save_adm(
        tmp_path, {**flags, "diffusion_steps": 4000, "rescale_timesteps": True, "predict_xstart": True}, weights
    )
    prior = load_prior(file)
    assert prior.schedule.levels == 4000 and prior.timestep_scale == 0.25
    x_t = noise(1, 16)
    expected = adm(weights, flags, x_t, torch.tensor([0.25 * 1999]))[:, :3].clamp(-1, 1)
    torch.testing.assert_close(prior(x_t, torch.tensor([0.5])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_guided_diffusion_betas_are_those_of_diffusers(ours, theirs):
    expected = DDPMScheduler(beta_schedule=theirs).alphas_cumprod.double()
    torch.testing.assert_close(alphas_cumprod(Flags(noise_schedule=ours)), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("image_size", [64, 128, 256])
def test_released_sizes_have_a_config(image_size):
    """With the flags that the released models have in common."""
    flags = dict(image_size=image_size, attention_resolutions="32,16,8", num_head_channels=64, resblock_updown=True)
    config = unet_config(read_flags({**flags, "num_channels": 256, "learn_sigma": True, "use_fp16": True}))
    assert config["block_out_channels"] == tuple(256 * m for m in CHANNEL_MULT[image_size])
    attended = [kind.startswith("Attn") for kind in config["down_block_types"]]
    assert sum(attended) == 3 and [kind.startswith("Attn") for kind in config["up_block_types"]] == attended[::-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_chanels=32), "unknown flag 'num_chanels'; it takes image_size, num_channels"),
        (dict(learn_sigma="True"), "learn_sigma is 'True'; it must be of type bool"),
        (dict(num_res_blocks=2.5), "num_res_blocks is 2.5; it must be of type int"),
        (dict(num_res_blocks=0), "num_res_blocks is 0; it must be a whole number from 1"),
        (dict(channel_mult="0.5,1"), "channel_mult is '0.5,1'; it must be whole numbers"),
        (dict(attention_resolutions=[8, 0]), r"attention_resolutions is \[8, 0\]; it must be whole numbers"),
        (dict(channel_mult="2,4"), r"channel_mult is \(2, 4\); starting with 2: UNet2DModel embeds time"),
        (dict(image_size=512, channel_mult=""), r"channel_mult is \(\); starting with 0.5: UNet2DModel embeds time"),
        (dict(channel_mult=""), "image_size is 16; without channel_mult it must be one of 64, 128, 256, 512"),
        (dict(image_size=15), "image_size is 15; it must halve 1 times"),
        (dict(num_channels=48), "num_channels is 48; it must be a multiple of the 32 groups"),
        (dict(noise_schedule="sigmoid"), "noise_schedule is 'sigmoid'; it must be linear or cosine"),
        (dict(diffusion_steps=20), "diffusion_steps is 20; linear betas"),
        (dict(attention_resolutions="16,8"), r"num_heads is 4; over \[32, 64\] channels its heads differ in size"),
        (dict(num_heads=3), "num_heads is 3; it must divide 64 channels"),
        (dict(num_heads_upsample=2), "num_heads_upsample is 2; UNet2DModel has one head size for both ways"),
        (dict(num_head_channels=48), r"num_head_channels is 48; it must divide the channels with attention, \[64\]"),
        (dict(num_head_channels=0), "num_head_channels is 0; it must be above 0, or -1"),
    ],
)
def test_flags_that_cannot_be_had_are_named(changes, message):
    with pytest.raises(CheckpointError, match=f"flags: {message}"):
        read_flags({**FLAGS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(class_cond=True), "no weight 'label_emb.weight', which the flags ask for"),
        (dict(num_res_blocks=2), "no weight 'input_blocks.4.0.in_layers.0.weight'"),
        (dict(attention_resolutions=""), "no weight 'output_blocks.1.1.in_layers.0.weight'"),
        (dict(attention_resolutions="", resblock_updown=False), "no weight 'input_blocks.2.0.op.weight'"),
        (dict(learn_sigma=False), r"does not fit the flags in adm.json \(.*conv_out.weight"),
        (dict(num_channels=64), "does not fit the flags"),
    ],
)
def test_weights_that_do_not_fit_the_flags(tmp_path, changes, message):
    flags, weights = make_adm({})
    with pytest.raises(CheckpointError, match=message):
        load_prior(save_adm(tmp_path, {**flags, **changes}, weights))


def test_weights_without_a_place():
    flags, weights = make_adm(dict(class_cond=True))
    with pytest.raises(CheckpointError, match=r"weight 'label_emb.weight' has no place \(1 such\); check the flags"):
        convert(weights, read_flags({**flags, "class_cond": False}))


def test_files_that_are_no_guided_diffusion_checkpoint(tmp_path):
    flags, weights = make_adm({})
    file = save_adm(tmp_path, flags, weights)
    (tmp_path / "adm.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"adm.pt: a prior is a folder or a .safetensors file; torch pickles are"):
        load_prior(tmp_path / "adm.pt")
    weights["out.2.bias"] = weights["out.2.bias"] * torch.inf
    with pytest.raises(CheckpointError, match=r"weight 'conv_out.bias' holds numbers that are not finite"):
        load_prior(save_adm(tmp_path, flags, weights))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"adm.safetensors: cannot be loaded"):
        load_prior(file)
    (tmp_path / "adm.json").unlink()
    with pytest.raises(CheckpointError, match=r"adm.json: missing; it holds guided-diffusion's flags"):
        load_prior(file)
