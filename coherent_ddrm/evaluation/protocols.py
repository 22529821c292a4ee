"""The evaluation protocols of inpainting papers, by name: pictures, sizes, holes, scores, and the numbers reported.

    protocol = find_protocol("places2-lama-512")
    print(describe(protocol))
    published_table(protocol, "lama-thick")  # {"LaMa-Fourier": {"fid": Published(...), "lpips_vgg": ...}, ...}

What a protocol of ours does otherwise than the paper stands in its `notes`. LaMa https://arxiv.org/abs/2109.07161,
MAT https://arxiv.org/abs/2203.15270, RePaint https://arxiv.org/abs/2201.09865. docs/protocols.md is made by
`python -m coherent_ddrm.evaluation.protocols_markdown`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation import published
from coherent_ddrm.evaluation.published import Published

Resize = Literal["crop", "stretch", "pad"]
"""How a picture is brought to the square, as coherent_ddrm.images.fit does it.

crop: the middle square of the picture, resized. stretch: the whole picture, its aspect ratio given up. pad: the whole
picture with white beside it. Shrinking is antialiased Lanczos, growing bicubic; a square of the right size stays.
"""

METRICS = ("fid", "kid", "p_ids", "u_ids", "lpips_alex", "lpips_vgg", "psnr", "ssim", "l1")
METRICS += tuple(f"{name}_hole" for name in ("lpips_alex", "lpips_vgg", "psnr", "ssim", "l1"))
REPORTED = (*METRICS, "votes")  # what papers report: raters' votes too, which no program scores


@dataclass(frozen=True)
class Data:
    """Pictures that a user must bring: a short name, what they are and which of them, and how many."""

    name: str
    pictures: str
    count: int


@dataclass(frozen=True)
class Protocol:
    """One published way to score inpainting.

    Attributes:
        name, title: what the command line and the report call it
        paper, link: where it comes from
        data: the sets of pictures it is defined on, each scored by itself
        resolution: side of the square pictures
        resize: our rule that comes nearest, see `Resize`
        published_resize: the published rule, and where ours differs
        masks: our maker of each kind of hole -> the paper's name for it
        masks_per_picture: holes of each kind drawn for each picture
        metrics: scores of the composited pictures, as the paper takes them
        notes: what differs from the paper, and what misleads
        published: numbers of papers
    """

    name: str
    title: str
    paper: str
    link: str
    data: tuple[Data, ...]
    resolution: int
    resize: Resize
    published_resize: str
    masks: Mapping[str, str]
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    published: tuple[Published, ...]
    masks_per_picture: int = 1


_OUR_MASKS = (
    "Holes are drawn by this project's makers from its own seeds, with the published parameters; they are not the "
    "holes of the paper, pixel by pixel."
)
_LAMA_CODE = "The authors' code fixes no seed for its masks, so its own holes differ from run to run as well."
_LAMA_VGG = "LPIPS is on VGG-16, the default of the authors' evaluation code, over the whole picture."
_LAMA_MASKS = {"lama-thin": "narrow", "lama-medium": "medium", "lama-thick": "wide"}
_LAMA_RESIZE = (
    "The authors' script brings the shorter side to the resolution (bicubic), draws five holes on the whole picture, "
    "cuts a random square that meets the hole, and keeps one of those that cover at most half of the square. Ours cuts "
    "the middle square and draws the hole on it, at most half covered."
)
_MEDIUM = "Medium holes are scored in the paper's supplement only; no numbers of theirs are held here."
_SVM = "P-IDS and U-IDS are shares of 1 here and per cent in the paper; they are left out under 10,000 pictures."
_INCEPTION = "FID compares the results with the true pictures they were made from, on Inception's 2,048 features."
_MEMORY = "Rows marked unverified are from memory: do not cite them without the paper at hand."

_PROTOCOLS = (
    Protocol(
        name="places2-lama-512",
        title="Places2 at 512, LaMa's narrow, medium and wide holes",
        paper="LaMa: Resolution-robust Large Mask Inpainting with Fourier Convolutions (WACV 2022)",
        link="https://arxiv.org/abs/2109.07161",
        data=(
            Data(
                "places2",
                "30,000 pictures drawn at random from the validation set of Places365-Standard in high resolution "
                "(val_large, 36,500 pictures)",
                30_000,
            ),
        ),
        resolution=512,
        resize="crop",
        published_resize=_LAMA_RESIZE,
        masks=_LAMA_MASKS,
        metrics=("fid", "lpips_vgg", "ssim"),
        notes=(
            f"{_OUR_MASKS} {_LAMA_CODE}",
            "Which 30,000 of the 36,500 pictures is left to chance by the authors' script; there is no list.",
            _INCEPTION,
            _LAMA_VGG,
            _MEDIUM,
            "The paper's third kind of hole, silhouettes from a segmentation network, is not reproduced.",
            "The three LaMa networks were trained on squares of 256; CoModGAN on 8 million Places2 pictures.",
            _MEMORY,
        ),
        published=published.PLACES_LAMA,
    ),
    Protocol(
        name="celebahq-256",
        title="CelebA-HQ at 256, LaMa's narrow, medium and wide holes",
        paper="LaMa: Resolution-robust Large Mask Inpainting with Fourier Convolutions (WACV 2022)",
        link="https://arxiv.org/abs/2109.07161",
        data=(
            Data(
                "celebahq",
                "the 2,000 CelebA-HQ pictures at 256 that LaMa's repository lists in fetch_data/val_shuffled.flist, "
                "which it calls visual_test",
                2_000,
            ),
        ),
        resolution=256,
        resize="crop",
        published_resize=f"{_LAMA_RESIZE} For pictures that are 256 x 256 already, both leave them as they are.",
        masks=_LAMA_MASKS,
        metrics=("fid", "lpips_vgg", "ssim"),
        notes=(
            f"{_OUR_MASKS} {_LAMA_CODE}",
            f"{_INCEPTION} 2,000 pictures are fewer than that: such an FID is mostly bias, comparable only at the same "
            "count, and a guard that asks for more pictures than features leaves it out.",
            "That these 2,000 are the pictures of the paper's table is taken from the repository's instructions.",
            _LAMA_VGG,
            _MEDIUM,
            _MEMORY,
        ),
        published=published.CELEBAHQ_LAMA,
    ),
    Protocol(
        name="repaint-6masks",
        title="RePaint's six kinds of hole at 256",
        paper="RePaint: Inpainting using Denoising Diffusion Probabilistic Models (CVPR 2022)",
        link="https://arxiv.org/abs/2201.09865",
        data=(
            Data("celebahq", "100 test pictures of CelebA-HQ at 256, as LaMa's repository splits it", 100),
            Data("imagenet", "100 test pictures of ImageNet; the paper does not list which", 100),
            Data("places2", "100 test pictures of Places2 (the paper's appendix)", 100),
        ),
        resolution=256,
        resize="crop",
        published_resize=(
            "The authors' code halves the picture (box filter) while the shorter side is at least 512, brings it to "
            "256 (bicubic) and cuts the middle square. Ours cuts the same square and resizes it once, by Lanczos; "
            "pictures that are 256 x 256 already stay as they are in both."
        ),
        masks={
            "repaint-thin": "Narrow",
            "repaint-thick": "Wide",
            "repaint-every-second-line": "Alternating Lines",
            "repaint-super-resolve": "Super-Resolve 2x",
            "repaint-expand": "Expand",
            "repaint-half": "Half",
        },
        metrics=("lpips_alex",),
        notes=(
            f"{_OUR_MASKS} Narrow and wide are LaMa's; the other four are fixed patterns.",
            "Of alternating lines and 2x super-resolution, the paper's text does not say which line or pixel is kept; "
            "ours keeps the first. Half: the left half is given, as in the paper.",
            "LPIPS is on AlexNet, as the paper says, over the whole picture.",
            "100 pictures: differences of a few thousandths are within chance; look at the intervals.",
            "LPIPS compares with one truth, so where much is missing it punishes a fill that is plausible but another: "
            "on half and expand LaMa has the better LPIPS, while raters preferred RePaint.",
            "votes: share of raters' choices that went to the method when shown beside RePaint (5 raters for each of "
            "the 100 pictures, who had to agree with themselves); above 0.5 is preferred to RePaint. No program scores "
            "it: `coherent-ddrm study` does.",
            "On CelebA-HQ, ICT's network was one trained on FFHQ; on ImageNet, the authors trained LaMa themselves.",
            "CoPaint scores the same kinds and a text mask, on 100 pictures of CelebA-HQ and ImageNet, with LPIPS on "
            "AlexNet; its numbers could not be read and are not given.",
        ),
        published=published.REPAINT,
    ),
    Protocol(
        name="mat-places-512",
        title="Places at 512, MAT's large and small holes",
        paper="MAT: Mask-Aware Transformer for Large Hole Image Inpainting (CVPR 2022)",
        link="https://arxiv.org/abs/2203.15270",
        data=(
            Data(
                "places2",
                "all 36,500 pictures of the validation set of Places365-Standard in high resolution (val_large)",
                36_500,
            ),
        ),
        resolution=512,
        resize="crop",
        published_resize=(
            "The authors' code cuts the middle 512 x 512 out of the picture without resizing; a picture with a shorter "
            "side is first mirrored at its right and bottom. Ours brings the shorter side to 512 as well: the same cut "
            "where that side is 512 already, as it is for most of val_large."
        ),
        masks={"mat-large": "large mask", "mat-small": "small mask"},
        metrics=("fid", "p_ids", "u_ids"),
        notes=(
            f"{_OUR_MASKS} The authors hand out their mask files and ask that they be used; with holes drawn anew, and "
            "another number of pictures, FID shifts.",
            _INCEPTION,
            _SVM,
            "The SVM is fitted on the very features it is scored on, as CoModGAN and MAT define it.",
            "Training sets differ: MAT 1.8 million pictures, CoModGAN 8 million, LaMa-Big 4.5 million.",
        ),
        published=published.PLACES_MAT,
    ),
    Protocol(
        name="mat-celebahq-512",
        title="CelebA-HQ at 512, MAT's large and small holes",
        paper="MAT: Mask-Aware Transformer for Large Hole Image Inpainting (CVPR 2022)",
        link="https://arxiv.org/abs/2203.15270",
        data=(
            Data(
                "celebahq",
                "the CelebA-HQ pictures that CelebA's list_eval_partition marks 1, validation, found through "
                "CelebA-HQ's image_list.txt; 2,993 of them (the count is from memory)",
                2_993,
            ),
        ),
        resolution=512,
        resize="crop",
        published_resize=(
            "CelebA-HQ is square, so nothing is cut; by which filter the authors brought it from 1,024 to 512 could "
            "not be read. Ours is Lanczos."
        ),
        masks={"mat-large": "large mask", "mat-small": "small mask"},
        metrics=("fid", "p_ids", "u_ids"),
        notes=(
            f"{_OUR_MASKS} The authors hand out their mask files and ask that they be used.",
            _INCEPTION,
            f"{_SVM} So they are left out here: the paper's stand beside FID for the record.",
        ),
        published=published.CELEBAHQ_MAT,
    ),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}


def find_protocol(text: str) -> Protocol:
    """The protocol called so, or, by NAME:PICTURES, that on one of its sets of pictures (repaint-6masks:places2).

    Raises:
        UserError: there is none, with the nearest name, or it has no such set.
    """
    name, _, data = text.partition(":")
    if name in PROTOCOLS:
        return _on(PROTOCOLS[name], data) if data else PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown protocol {name!r}.{hint} Known: {', '.join(PROTOCOLS)}")


def _on(protocol: Protocol, data: str) -> Protocol:
    chosen = tuple(one for one in protocol.data if one.name == data)
    if not chosen:
        names = ", ".join(one.name for one in protocol.data)
        raise UserError(f"protocol {protocol.name} has no pictures {data!r}: choose one of {names}")
    return replace(protocol, data=chosen, published=tuple(row for row in protocol.published if row.data == data))


def published_table(protocol: Protocol, mask: str, data: str | None = None) -> dict[str, dict[str, Published]]:
    """{method: {metric: number}} of one kind of hole, methods in the papers' order.

    `data` names one of the protocol's sets; without it the first.
    """
    if mask not in protocol.masks:
        raise UserError(f"protocol {protocol.name} has no holes {mask!r}: choose one of {', '.join(protocol.masks)}")
    table: dict[str, dict[str, Published]] = {}
    for row in _on(protocol, data or protocol.data[0].name).published:
        if row.mask == mask:
            table.setdefault(row.method, {})[row.metric] = row
    return table


def describe(protocol: Protocol) -> str:
    """One paragraph for a report: what is scored, how, and what differs from the paper."""
    pictures = "; or ".join(data.pictures for data in protocol.data)
    holes = ", ".join(f"{maker} (the paper's {name!r})" for maker, name in protocol.masks.items())
    each = "One hole" if protocol.masks_per_picture == 1 else f"{protocol.masks_per_picture} holes"
    return (
        f"{protocol.title}, after {protocol.paper}, {protocol.link}. Pictures: {pictures}. {protocol.published_resize} "
        f"All is scored at {protocol.resolution} x {protocol.resolution}. {each} of each kind for every picture: "
        f"{holes}. Scores, taken on composited 8-bit pictures: {', '.join(protocol.metrics)}. "
        f"{' '.join(protocol.notes)}"
    )
