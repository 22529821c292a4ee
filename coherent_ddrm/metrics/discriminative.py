"""How well a linear SVM tells results from truths: P-IDS and U-IDS.

CoModGAN, https://arxiv.org/abs/2103.10428, section 4; the SVM (scikit-learn's LinearSVC, primal) and the counts are
those that MAT, https://arxiv.org/abs/2203.15270, reports with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from coherent_ddrm.errors import UserError

FEWEST = 10_000  # with fewer pictures than a few times the features, the SVM separates any two sets and both are 0


class Discriminative(NamedTuple):
    """p_ids: share of pairs whose result looks more real than its truth; u_ids: share of pictures told wrongly."""

    p_ids: float
    u_ids: float


def discriminative_scores(real: Tensor, fake: Tensor) -> Discriminative:
    """P-IDS and U-IDS of features (N, d) twice, row i of `fake` the result for row i of `real`; both 0.5 at best.

    UserError under 10,000 pictures. Compare at one N only: they grow with it.
    """
    if real.shape != fake.shape or real.ndim != 2:
        raise ValueError(f"features are (N, d) twice, in pairs; got {tuple(real.shape)} and {tuple(fake.shape)}")
    if len(real) < FEWEST:
        raise UserError(
            f"{len(real)} pictures: P-IDS and U-IDS collapse to 0 on small sets, {FEWEST} or more are needed; use kid"
        )
    from sklearn.svm import LinearSVC

    real, fake = (x.double().cpu().numpy() for x in (real, fake))
    features, labels = np.concatenate([real, fake]), np.repeat([1, 0], len(real))
    svm = LinearSVC(dual=False).fit(features, labels)
    more_real = svm.decision_function(fake) > svm.decision_function(real)
    return Discriminative(float(more_real.mean()), float(1 - svm.score(features, labels)))
