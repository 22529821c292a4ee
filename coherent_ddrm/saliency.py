"""Foreground of a picture without labels: GrabCut from several starting guesses, the best cut wins.

GrabCut (Rother et al. 2004, https://dl.acm.org/doi/10.1145/1015706.1015720) started from the border alone collapses on
objects that touch the border or share its colour. Here it is started from a sure core and sure corners, from colour
distance to the border, and from a picture with its texture smoothed away (prints and stripes); each cut is then judged
without labels, and a picture whose best cut is poor is refused, not guessed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

WORKING_SIZE = 96
CORE_RADIUS = 0.22  # of half the side: sure foreground at the start
MIN_SHARE, MAX_SHARE = 0.06, 0.92  # a foreground smaller or larger than this is a collapsed cut
WALL_DISTANCE = 8.0  # in 8-bit Lab: a colour this near to the border's is probably background
GOOD_SCORE = 1.65  # good enough to skip the remaining guesses
KEEP_SCORE = 1.15  # below this the picture is refused


class Foreground(NamedTuple):
    """One cut. `mask`: (S, S) bool; `score`: higher is better, -1 for a collapsed cut; `guess`: the start that won."""

    mask: np.ndarray
    score: float
    guess: str

    @property
    def kept(self) -> bool:
        return self.score >= KEEP_SCORE


def foreground(image: np.ndarray) -> Foreground:
    """The best foreground of `image` (S, S, 3) uint8, S about 96. Deterministic: OpenCV's generator is seeded."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[0] != image.shape[1]:
        raise ValueError(f"foreground() takes a square uint8 (S, S, 3) picture, got {image.dtype} {image.shape}.")
    smooth = cv2.medianBlur(image, 7)
    lab = cv2.cvtColor(smooth, cv2.COLOR_RGB2LAB)
    best = Foreground(np.zeros(image.shape[:2], bool), -1.0, "none")
    for guess, mask in _cuts(image, smooth):
        cut = Foreground(mask, _score(lab, mask), guess)
        best = max(best, cut, key=lambda c: c.score)
        if guess.endswith("released") and best.score >= GOOD_SCORE:
            break
    return best


def _cuts(image: np.ndarray, smooth: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Cuts from ever less usual starts, each once with its sure seeds and once released from them."""
    side = len(image)
    radius = _radius(side)
    wall = _border_distance(cv2.cvtColor(smooth, cv2.COLOR_RGB2LAB)) < WALL_DISTANCE
    starts = (
        ("shape", image, _seed_shape(radius, corners=True)),
        ("smooth shape", smooth, _seed_shape(radius, corners=True)),
        ("colour", image, _seed_colour(image, radius)),
        ("smooth colour", smooth, _seed_colour(smooth, radius)),
        ("free corners", image, _seed_shape(radius, corners=False)),
    )
    for name, source, seed in starts:
        mask = _clean(_grab_cut(source, seed, iterations=4))
        yield name, mask
        if MIN_SHARE < mask.mean() < MAX_SHARE:
            # The core may hold background (between two shoes, two legs): cut once more with nothing sure.
            probable = np.where(mask & ~wall, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
            yield f"{name} released", _clean(_grab_cut(source, probable, iterations=2))


def _grab_cut(image: np.ndarray, seed: np.ndarray, iterations: int) -> np.ndarray:
    """(S, S) bool. A cut that OpenCV refuses (one side empty) counts as collapsed, not as an error."""
    has_fg = np.isin(seed, (cv2.GC_FGD, cv2.GC_PR_FGD)).any()
    has_bg = np.isin(seed, (cv2.GC_BGD, cv2.GC_PR_BGD)).any()
    if not (has_fg and has_bg):
        return np.zeros(seed.shape, bool)
    cv2.setRNGSeed(0)  # its k-means draws from a global generator; a picture must not depend on the one before
    mask = cv2.grabCut(image, seed.copy(), None, None, None, iterations, cv2.GC_INIT_WITH_MASK)[0]
    return (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)


def _radius(side: int) -> np.ndarray:
    """(S, S): 0 in the centre, 1 at the middle of each border."""
    axis = np.abs(np.arange(side) - (side - 1) / 2) / (side / 2)
    return np.hypot(axis[:, None], axis[None, :])


def _seed_shape(radius: np.ndarray, corners: bool) -> np.ndarray:
    seed = np.where(radius < 0.75, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    seed[radius < CORE_RADIUS] = cv2.GC_FGD
    return _sure_corners(seed) if corners else seed


def _seed_colour(image: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Probable foreground: far in colour from every common colour of the border, and not far out."""
    weight = _border_distance(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)) * np.exp(-((radius / 0.9) ** 2))
    scaled = np.clip(weight * (255 / (np.percentile(weight, 98) + 1e-6)), 0, 255).astype(np.uint8)
    far = scaled > cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)[0]
    seed = np.where(far, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    seed[far & (radius < CORE_RADIUS)] = cv2.GC_FGD
    return _sure_corners(seed)


def _sure_corners(seed: np.ndarray) -> np.ndarray:
    c = len(seed) // 10
    for rows in (slice(0, c), slice(-c, None)):
        for cols in (slice(0, c), slice(-c, None)):
            seed[rows, cols] = cv2.GC_BGD
    return seed


def _border_distance(lab: np.ndarray) -> np.ndarray:
    """(S, S) float32: Lab distance of each pixel to the nearest common colour of the outer ring."""
    width = max(2, len(lab) // 16)
    ring = np.ones(lab.shape[:2], bool)
    ring[width:-width, width:-width] = False
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    _, nearest, centres = cv2.kmeans(lab[ring].astype(np.float32), 4, None, stop, 1, cv2.KMEANS_PP_CENTERS)
    share = np.bincount(nearest.ravel(), minlength=4) / len(nearest)
    common = centres[share >= 0.08]  # a rare colour on the border is the object leaving the picture
    return np.min([np.linalg.norm(lab.astype(np.float32) - centre, axis=2) for centre in common], axis=0)


def _clean(mask: np.ndarray) -> np.ndarray:
    """Drop specks and parts under 15 % of the largest (two shoes stay two), fill holes under 2 % of the picture."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, label, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    if count > 1:
        large = [k for k in range(1, count) if areas[k] >= 0.15 * areas[1:].max()]
        opened = np.isin(label, large).astype(np.uint8)
    count, label, stats, _ = cv2.connectedComponentsWithStats(1 - opened, connectivity=4)
    for k in range(1, count):
        if stats[k, cv2.CC_STAT_AREA] < 0.02 * mask.size:
            opened[label == k] = 1
    return opened.astype(bool)


def _score(lab: np.ndarray, mask: np.ndarray) -> float:
    """How good a cut looks without labels: colours apart, a step along the outline, centre covered, border free."""
    if not MIN_SHARE < mask.mean() < MAX_SHARE:
        return -1.0
    apart = 1 - np.sqrt(_histogram(lab[mask]) * _histogram(lab[~mask])).sum()  # 1 - Bhattacharyya coefficient
    outline_x, outline_y = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    steps = lab.astype(np.float32)
    step = np.concatenate(
        [
            np.abs(steps[:, 2:] - steps[:, :-2]).sum(2)[outline_x[:, 1:]],
            np.abs(steps[2:] - steps[:-2]).sum(2)[outline_y[1:]],
        ]
    )
    contrast = np.minimum(step, 40).mean() / 40 if len(step) else 0.0
    ring = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()
    corners = np.mean([mask[0, 0], mask[0, -1], mask[-1, 0], mask[-1, -1]])
    core = mask[_radius(len(mask)) < 0.3].mean()
    return float(0.5 * apart + contrast + 0.5 * core - 0.6 * ring - 0.25 * corners)


def _histogram(colours: np.ndarray) -> np.ndarray:
    """(512,) share of each coarse Lab colour among `colours` (N, 3)."""
    coarse = (colours // 32).astype(np.int64)
    counts = np.bincount(coarse @ np.array([64, 8, 1]), minlength=512)
    return counts / max(1, counts.sum())
