"""The emoji world's sentences and its judge."""

import math
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import
import pytest
import torch
from torch.distributions import kl_divergence

import demo.judge
from demo import one_gaussian
from demo.grammar import ANIMALS, parse, prompts, scenes
from prompts.sets import read_prompts
from rewards import load_reward


def test_more_than_100000_distinct_sentences_are_read_as_what_they_were_made_of():
    of_all = {scene.sentence(): scene for scene in scenes()}
    assert len(of_all) > 100_000 and len(of_all) == sum(1 for _ in scenes())
    assert all(parse(sentence) == scene for sentence, scene in of_all.items())
    animals = (Path(__file__).parents[1] / "prompts/animals.txt").read_text().splitlines()
    assert [parse(line).animal for line in animals] == list(ANIMALS)
    with pytest.raises(ValueError, match="'A painting of a cat in red' is not a sentence of demo"):
        parse("A painting of a cat in red")


def test_what_is_held_out_is_in_no_training():
    seen, unseen = (read_prompts(name)[0] for name in ("emoji", "emoji-unseen"))
    assert len(seen) > 100_000 and len(unseen) == 500 and set(seen).isdisjoint(unseen)
    combination = "animal", "colour", "background"
    held_out = {tuple(getattr(parse(line), name) for name in combination) for line in unseen}
    trained = {tuple(getattr(parse(line), name) for name in combination) for line in seen}
    assert held_out.isdisjoint(trained)
    # The same on every machine, in an order that mixes them.
    assert unseen[1] == "A painting of an orange zebra on a spotted red background"
    assert len({parse(line).animal for line in prompts()[:500]}) == len(ANIMALS)


def test_the_judge_compares_what_it_sees_with_what_the_prompt_names(monkeypatch):
    shown = parse("A painting of a small red fox on the left, on a striped blue background")
    monkeypatch.setattr(demo.judge, "seen", lambda images: [shown] * len(images))
    images = torch.zeros(1, 3, 64, 64)
    for sentence, wrong in {
        "A painting of a fox": set(), "A painting of a cat": {"animal"},
        "A painting of a large fox": {"size"}, "A painting of a green fox": {"colour"},
        "A painting of a fox on the right": {"place"},
        "A painting of a fox on a blue background": set(),
        "A painting of a fox on a spotted blue background": {"background"},
        "A painting of a small red fox on the left, on a striped white background": {"background"},
    }.items():
        for name in ("animal", "size", "colour", "place", "background"):
            assert getattr(demo.judge, name)(images, [sentence]) == float(name not in wrong)
        assert demo.judge.all_right(images, [sentence]) == float(not wrong)
    assert demo.judge.animal(images, ["a red fox"]).isnan()  # not of the grammar


def test_the_judges_weights_are_read_and_if_they_are_not_there_it_is_told(tmp_path, monkeypatch):
    judge = f"{Path(demo.judge.__file__)}:all_right"
    images = torch.rand(3, 3, 64, 64)
    assert load_reward(judge, "cpu")(images, random.sample(prompts(), 3)).tolist() == [0, 0, 0]
    demo.judge.load_judge.cache_clear()
    monkeypatch.setattr(demo.judge, "WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="judge's weights .*judge.safetensors are missing"):
        demo.judge.load_judge(torch.device("cpu"))


def test_on_one_gaussian_prdp_lands_on_the_optimum_and_ddpo_passes_it():
    torch.manual_seed(0)
    policies = {objective: one_gaussian.train(objective) for objective in ("prdp", "ddpo")}
    # N(0, 1) times exp(-(x - 2)^2 / 2): precisions add, and the means are weighted by them.
    assert policies["prdp"][-1].mean.item() == pytest.approx(1, abs=1e-3)
    assert policies["prdp"][-1].variance.item() == pytest.approx(1 / 2, abs=1e-3)
    prdp, ddpo = (torch.stack([kl_divergence(policy, policies[objective][0]) for policy in
                               policies[objective]]) for objective in ("prdp", "ddpo"))
    optimum = (math.log(2) + 1 / 2) / 2  # the KL of N(1, 1/2) to N(0, 1)
    assert (prdp[200:] - optimum).abs().max() < 1e-3
    assert optimum < ddpo[100] < ddpo[200] < ddpo[300]
