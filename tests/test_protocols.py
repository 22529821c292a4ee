"""The published protocols: names that exist elsewhere in the package, and numbers that keep the papers' orderings."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from coherent_ddrm import images
from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.protocols import (
    METRICS,
    PROTOCOLS,
    REPORTED,
    Resize,
    describe,
    find_protocol,
    published_table,
)
from coherent_ddrm.evaluation.protocols_markdown import markdown
from coherent_ddrm.masks import EVALUATION_SETS, MAKERS
from coherent_ddrm.metrics import describe as describe_score

EVERY = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def value(name: str, mask: str, method: str, metric: str, data: str | None = None) -> float:
    return published_table(find_protocol(name), mask, data)[method][metric].value


@EVERY
def test_names_exist_and_counts_are_positive(protocol):
    assert set(protocol.masks) <= set(MAKERS)
    assert set(protocol.metrics) <= set(METRICS)
    assert protocol.resize in get_args(images.Policy)
    assert all(data.count > 0 for data in protocol.data)
    assert protocol.resolution in (256, 512) and protocol.masks_per_picture == 1
    assert protocol.link.startswith("https://arxiv.org/abs/")
    assert len({data.name for data in protocol.data}) == len(protocol.data)


@EVERY
def test_published_rows_belong_to_their_protocol(protocol):
    keys = [(row.method, row.mask, row.metric, row.data) for row in protocol.published]
    assert keys and len(keys) == len(set(keys))
    for row in protocol.published:
        assert row.mask in protocol.masks and row.data in {data.name for data in protocol.data}, row
        assert row.metric in {*protocol.metrics, "votes"} and row.metric in REPORTED, row
        assert ("memory" in row.source) != row.checked, row
        top = {"fid": 100, "p_ids": 0.5, "u_ids": 0.5}.get(row.metric, 1)
        assert 0 < row.value < top, row
    assert any("unverified" in note for note in protocol.notes) == (not all(row.checked for row in protocol.published))


def test_a_protocol_on_one_of_its_sets():
    whole, places = find_protocol("repaint-6masks"), find_protocol("repaint-6masks:places2")
    assert [data.name for data in places.data] == ["places2"] and {row.data for row in places.published} == {"places2"}
    assert len(places.published) < len(whole.published)
    with pytest.raises(UserError, match="no pictures 'ffhq': choose one of "):
        find_protocol("repaint-6masks:ffhq")


def test_rules_are_those_of_images():
    assert get_args(Resize) == get_args(images.Policy)
    assert all(describe_score(name).meaning for name in METRICS)  # a ValueError for a name that is no score's
    assert set(find_protocol("repaint-6masks").masks) == set(EVALUATION_SETS["repaint-6"])


def test_a_wrong_name_is_told_the_near_one():
    with pytest.raises(UserError, match="Did you mean 'places2-lama-512'"):
        find_protocol("places-lama-512")
    with pytest.raises(UserError, match="Known: places2-lama-512, celebahq-256"):
        find_protocol("?")
    with pytest.raises(UserError, match="has no holes 'half': choose one of mat-large, mat-small"):
        published_table(find_protocol("mat-places-512"), "half")
    with pytest.raises(UserError, match="has no pictures 'ffhq': choose one of celebahq, imagenet, places2"):
        published_table(find_protocol("repaint-6masks"), "repaint-half", "ffhq")


def test_orderings_that_the_papers_state():
    wide = published_table(find_protocol("places2-lama-512"), "lama-thick")
    narrow = published_table(find_protocol("places2-lama-512"), "lama-thin")
    assert wide["CoModGAN"]["fid"].value < wide["LaMa-Fourier"]["fid"].value  # the one FID that LaMa does not win
    assert min(wide, key=lambda method: wide[method]["lpips_vgg"].value) == "LaMa-Fourier"
    assert (
        narrow["LaMa-Regular"]["fid"].value < narrow["LaMa-Fourier"]["fid"].value
    )  # Fourier pays where holes are wide
    assert wide["LaMa-Fourier"]["fid"].value < wide["LaMa-Regular"]["fid"].value
    for method in wide:  # wide holes are harder, whatever fills them
        assert narrow[method]["fid"].value < wide[method]["fid"].value, method
        assert narrow[method]["lpips_vgg"].value < wide[method]["lpips_vgg"].value, method

    # LaMa beats RePaint by LPIPS on half and expand, and loses with the raters
    for mask in ("repaint-half", "repaint-expand"):
        for data in ("celebahq", "imagenet", "places2"):
            lama, repaint = (value("repaint-6masks", mask, m, "lpips_alex", data) for m in ("LaMa", "RePaint"))
            assert lama < repaint and value("repaint-6masks", mask, "LaMa", "votes", data) < 0.5
    votes = [row for row in find_protocol("repaint-6masks").published if row.metric == "votes"]
    assert len(votes) == 6 * (5 + 3 + 5)
    ahead = [row for row in votes if row.value > 0.5]  # one of the undecided cases: ICT, half, ImageNet
    assert [(row.method, row.mask, row.data) for row in ahead] == [("ICT", "repaint-half", "imagenet")]


@pytest.mark.parametrize("name", ["mat-places-512", "mat-celebahq-512"])
def test_mat_is_harder_with_large_holes_and_its_scores_agree(name):
    small, large = (published_table(find_protocol(name), mask) for mask in ("mat-small", "mat-large"))
    assert small.keys() == large.keys()
    for method in small:
        assert small[method]["fid"].value < large[method]["fid"].value
        for metric in ("p_ids", "u_ids"):
            assert small[method][metric].value > large[method][metric].value
        assert small[method]["p_ids"].value < small[method]["u_ids"].value
    if name == "mat-places-512":
        best = [min(table, key=lambda m, t=table: t[m]["fid"].value) for table in (small, large)]
        best += [max(table, key=lambda m, t=table: t[m]["u_ids"].value) for table in (small, large)]
        assert set(best) == {"MAT (8M pictures)"}
        assert large["MAT"]["p_ids"].value == 0.1903  # a share; the paper prints per cent
        assert large["MAT"]["p_ids"].printed == "19.03 %"


@EVERY
def test_the_description_says_what_is_scored_and_what_differs(protocol):
    text = describe(protocol)
    assert "\n" not in text and "  " not in text
    for needed in (protocol.link, *protocol.masks, *protocol.metrics, *protocol.notes, str(protocol.resolution)):
        assert needed in text


def test_docs_are_the_table():
    assert (Path(__file__).parent.parent / "docs/protocols.md").read_text() == markdown()


def test_no_torch_is_needed():
    code = "import sys; import coherent_ddrm.evaluation.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
