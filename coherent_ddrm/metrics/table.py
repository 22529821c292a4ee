"""Every score by name: its unit, which way is better, if any, what it says.

A name is a base of the table, with -NETWORK for a network of one's own (pd-clothing, fid-clothing) and _hole for the
hole alone (psnr_hole, pd-clothing_hole).
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One row of the table.

    `better`: "higher" or "lower"; "one": best at 1; "truth": best at what the truth itself has, beyond which a higher
    value is no better (`score_pairs(truth, truth, hole)` gives it); "none": it tells of something, not how good it is.
    """

    unit: str
    better: Literal["higher", "lower", "one", "truth", "none"]
    meaning: str


METRICS: dict[str, Metric] = {
    "psnr": Metric("dB", "higher", "10 log10(1 / mean squared error)"),
    "ssim": Metric("at most 1", "higher", "structural similarity, RGB, Gaussian 11 / 1.5"),
    "l1": Metric("of [0, 1]", "lower", "mean absolute error"),
    "lpips_alex": Metric("from 0", "lower", "LPIPS 0.1 on AlexNet"),
    "lpips_vgg": Metric("from 0", "lower", "LPIPS 0.1 on VGG-16"),
    "pd": Metric("0 to 2", "lower", "1 - cosine of a network's own features, mean over places and layers"),
    "seam": Metric("of [0, 1]", "lower", "error of the differences across the hole's border"),
    "sharpness": Metric("ratio", "one", "gradient magnitude in the hole over the truth's"),
    "edge_f1": Metric("0 to 1", "higher", "edges in the hole against the truth's, within one pixel"),
    "segmentation_iou": Metric("0 to 1", "higher", "mean overlap of the labels that occur"),
    "foreground_iou": Metric("0 to 1", "higher", "overlap of the foregrounds that GrabCut finds"),
    "surround_agreement": Metric("0 to 1", "truth", "colours of the hole that its surroundings have"),
    "mirror_agreement": Metric("0 to 1", "truth", "colours of the hole against those across the axis"),
    "reinpaint_known": Metric("of [0, 1]", "lower", "known pixels around the hole, inpainted from the fill"),
    "reinpaint_invented": Metric("of [0, 1]", "lower", "parts of the fill, inpainted again from the rest"),
    "changed": Metric("values", "lower", "8-bit values of known pixels that differ"),
    "measurement_error": Metric("of [-1, 1]", "lower", "max |A x - y|"),
    "diversity": Metric("of its distance", "none", "mean distance of two candidates"),
    "fid": Metric("from 0", "lower", "Fréchet distance of Gaussians fitted to features"),
    "fid_infinity": Metric("about 0 and up", "lower", "FID extrapolated to endless sets"),
    "fid_infinity_spread": Metric("of FID", "none", "standard deviation over subsets"),
    "kid": Metric("about 0 and up", "lower", "squared MMD of features, cubic kernel, unbiased"),
    "kid_spread": Metric("of KID", "none", "standard deviation over subsets"),
    "p_ids": Metric("0 to 0.5", "higher", "results that a linear SVM finds more real than their truth"),
    "u_ids": Metric("0 to 0.5", "higher", "share that a linear SVM gets wrong"),
}
IN_HOLE = ("psnr", "ssim", "l1", "lpips_alex", "lpips_vgg", "pd")  # also measured in the hole alone
ON_SETS = ("fid", "fid_infinity", "kid", "p_ids", "u_ids")  # of a set of pictures, not of each
ON_FEATURES = (*ON_SETS, "fid_infinity_spread", "kid_spread", "pd")  # take a network of one's own


def split(name: str) -> tuple[str, str | None]:
    """A score's name as (base, network): fid-clothing -> (fid, clothing), psnr_hole -> (psnr, None).

    ValueError for a name that is none.
    """
    base, dash, network = name.removesuffix("_hole").partition("-")
    known = base in METRICS and (bool(dash) == bool(network)) and not (dash and base not in ON_FEATURES)
    if not known or (name.endswith("_hole") and base not in IN_HOLE) or (base == "pd" and not network):
        raise ValueError(
            f"unknown score {name!r}: choose of {', '.join(METRICS)}; {', '.join(ON_FEATURES)} take a network, as "
            f"fid-clothing does, and pd needs one; {', '.join(IN_HOLE)} take _hole at the end"
        )
    return base, network or None


def describe(name: str) -> Metric:
    """The row of a score, whatever its network and part."""
    return METRICS[split(name)[0]]


def network_of(name: str) -> str | None:
    """The network that a score is measured with, None for one that needs none."""
    base, network = split(name)
    if base in ("lpips_alex", "lpips_vgg"):
        return base
    return network or ("inception" if base in ON_FEATURES else None)
