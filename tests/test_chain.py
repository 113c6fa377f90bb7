"""Variations and drafts: what is refused with which words, and the way to JSON and back."""

import json
from dataclasses import replace
from typing import Any

import pytest

from engine import chain, plan
from engine.types import BadRequest, Request

FULL = Request("a red circle", "tiny", 3, 512, 512, 4)
DRAFT = replace(FULL, width=256, height=256)
VARIED = replace(FULL, variations=((7, 0.3), (8, 0.75)))
REFINED = replace(FULL, seed=5, draft=replace(DRAFT, variations=((9, 0.5),)), start=3)


@pytest.mark.parametrize("request_", [FULL, VARIED, REFINED, replace(REFINED, variations=((1, 1.0),))])
def test_a_request_survives_json(request_: Request) -> None:
    assert chain.request(json.loads(json.dumps(chain.values(request_)))) == request_
    assert plan.complete(request_, None) == request_


def test_what_is_not_used_is_not_written_and_strange_keys_are_ignored() -> None:
    assert set(chain.values(FULL)) == {"prompt", "model", "seed", "width", "height", "steps"}
    assert chain.request({**chain.values(FULL), "backend": "torch", "kept": True}) == FULL
    assert chain.request({"prompt": "a", "model": "b"}) == Request("a", "b")


def test_an_open_draft_is_completed_too() -> None:
    whole = plan.complete(replace(FULL, draft=replace(DRAFT, steps=None), start=2), None)
    assert whole.draft == DRAFT


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (replace(FULL, variations=((-1, 0.3),)), "seed -1 is out of range"),
        (replace(FULL, variations=((1, 0.0),)), "strength 0.0 is out of range"),
        (replace(FULL, variations=((1, 1.5),)), "strength 1.5 is out of range"),
        (replace(FULL, variations=((1, float("nan")),)), "strength nan"),
        (replace(FULL, variations=((1, 0.5),) * 33), "33 variations .* at most 32"),
        (replace(FULL, start=2), "start step 2 needs a draft"),
        (replace(REFINED, start=0), "start step 0 is out of range: with 4 steps give 1 to 3"),
        (replace(REFINED, start=4), "start step 4"),
        (replace(REFINED, steps=1, start=1), "2 steps or more"),
        (replace(REFINED, prompt="another"), "same model with the same prompt"),
        (replace(REFINED, model="another"), "same model with the same prompt"),
        (replace(REFINED, width=256), "256x256 can't be refined to 256x512"),
        (replace(REFINED, width=128, height=128), "can't be refined to 128x128"),
        (replace(REFINED, draft=replace(DRAFT, steps=0)), "0 steps are out of range"),
        (replace(REFINED, draft=replace(DRAFT, seed=-2)), "seed -2"),
    ],
)
def test_impossible_chains_are_sentences(request_: Request, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        plan.complete(request_, None)
    assert "\n" not in str(refused.value)


def test_an_endless_chain_of_drafts_is_refused_before_it_is_walked() -> None:
    request = FULL
    for _ in range(5000):
        request = replace(FULL, draft=request, start=3)
    with pytest.raises(BadRequest, match="more than 3 drafts"):
        plan.complete(request, None)
    plain: dict[str, Any] = chain.values(FULL)
    for _ in range(5000):
        plain = {**chain.values(FULL), "draft": plain, "start": 3}
    with pytest.raises(BadRequest, match="more than 3 behind it"):
        chain.request(plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "no prompt"),
        ({"prompt": 3}, "prompt of this recipe is '3', which is no text"),
        ({"seed": "3"}, "seed of this recipe is '3', which is no whole number"),
        ({"seed": True}, "seed .* 'True'"),
        ({"width": 1.5}, "width .* '1.5'"),
        ({"start": [1]}, "start"),
        ({"variations": 3}, "variations of this recipe are '3'"),
        ({"variations": [[1]]}, "variations"),
        ({"variations": [[1, "0.5"]]}, "variations"),
        ({"variations": [[1.5, 0.5]]}, "variations"),
        ({"variations": [[1, 0.5]] * 33}, "variations"),
        ({"draft": "x"}, "draft in this recipe is damaged"),
        ({"draft": {"prompt": "x"}}, "no model"),
    ],
)
def test_values_of_the_wrong_kind_are_sentences(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        chain.request({**chain.values(FULL), **changes})


def test_strengths_rise_and_every_number_of_steps_can_be_refined() -> None:
    assert list(chain.STRENGTHS.values()) == sorted(chain.STRENGTHS.values())
    for steps in range(1, plan.MAX_STEPS + 1):
        finer, start = chain.refinement(steps)
        plan.complete(replace(REFINED, steps=finer, start=start), None)
