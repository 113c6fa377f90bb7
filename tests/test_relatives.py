"""What Vary and Refine ask for."""

from dataclasses import replace

import pytest

from engine.chain import STRENGTHS
from engine.plan import complete
from engine.types import BadRequest, Request
from studio.relatives import refine, vary

SIZES = ((512, 512), (256, 256), (1024, 1024), (1248, 832), (832, 1248))
DRAFT = Request("a red circle", "tiny", 3, 256, 256, 4)


def test_varying_twice_keeps_the_first_variation() -> None:
    twice = vary(vary(DRAFT, "subtle", seed=7), "strong", seed=8)
    assert twice == replace(DRAFT, variations=((7, STRENGTHS["subtle"]), (8, STRENGTHS["strong"])))
    assert complete(twice, None) == twice
    assert vary(DRAFT, "medium") != vary(DRAFT, "medium")
    with pytest.raises(BadRequest, match="'gentle'; known: subtle, medium, strong"):
        vary(DRAFT, "gentle")


@pytest.mark.parametrize(
    ("size", "to"), [((256, 256), (512, 512)), ((512, 512), (1024, 1024)), ((640, 416), (1248, 832))]
)
def test_a_draft_grows_to_the_next_size_of_its_shape(size: tuple[int, int], to: tuple[int, int]) -> None:
    draft = replace(DRAFT, width=size[0], height=size[1], variations=((7, 0.3),))
    refined = refine(draft, SIZES)
    assert (refined.width, refined.height, refined.draft, refined.seed) == (*to, draft, 3)
    assert (refined.steps, refined.start) == (8, 7)
    assert refined.variations == () and complete(refined, None) == refined


def test_the_largest_cannot_grow() -> None:
    with pytest.raises(BadRequest, match="1024x1024 is the largest size of this shape"):
        refine(replace(DRAFT, width=1024, height=1024), SIZES)


def test_one_step_becomes_two_for_a_refinement() -> None:
    assert complete(refine(replace(DRAFT, steps=1), SIZES), None).start == 1


def test_a_refined_picture_is_varied_from_its_draft_on() -> None:
    varied = vary(refine(DRAFT, SIZES), "medium", seed=9)
    assert varied.draft == replace(DRAFT, variations=((9, STRENGTHS["medium"]),))
    assert varied.variations == ((9, STRENGTHS["medium"]),) and complete(varied, None) == varied
