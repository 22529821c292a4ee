"""Scores of inpainted pictures: one idea per file, every name in table.py, weights in sources.py; see docs/metrics.md.

score_pairs: each picture beside its truth; score_sets: a set beside another; the rest by itself.
"""

from coherent_ddrm.metrics.candidates import diversity
from coherent_ddrm.metrics.colour import mirror_agreement, surround_agreement
from coherent_ddrm.metrics.consistency import changed, measurement_error
from coherent_ddrm.metrics.discriminative import discriminative_scores
from coherent_ddrm.metrics.frechet import fid, fid_infinity
from coherent_ddrm.metrics.gradients import gradient_magnitude, seam, sharpness
from coherent_ddrm.metrics.kernel import kid
from coherent_ddrm.metrics.pairs import Truth, by_itself, score_pairs
from coherent_ddrm.metrics.perceptual import perceptual_distance
from coherent_ddrm.metrics.pixels import l1, psnr, ssim
from coherent_ddrm.metrics.reinpainting import reinpaint_invented, reinpaint_known
from coherent_ddrm.metrics.sets import score_sets
from coherent_ddrm.metrics.sources import available
from coherent_ddrm.metrics.structure import edge_f1, edge_maps, foreground_iou, foregrounds
from coherent_ddrm.metrics.table import METRICS, Metric, describe, network_of
from coherent_ddrm.structure_losses import segmentation_iou

__all__ = [
    "METRICS",
    "Metric",
    "Truth",
    "available",
    "by_itself",
    "changed",
    "describe",
    "discriminative_scores",
    "diversity",
    "edge_f1",
    "edge_maps",
    "fid",
    "fid_infinity",
    "foreground_iou",
    "foregrounds",
    "gradient_magnitude",
    "kid",
    "l1",
    "measurement_error",
    "mirror_agreement",
    "network_of",
    "perceptual_distance",
    "psnr",
    "reinpaint_invented",
    "reinpaint_known",
    "score_pairs",
    "score_sets",
    "seam",
    "segmentation_iou",
    "sharpness",
    "ssim",
    "surround_agreement",
]
