import dataclasses

import pytest
import torch

from robustlab.core.errors import ConfigError
from robustlab.metrics.store import PredictionStore


def full(make_store, **options):
    store = make_store(60, 3, per_cluster=4, **options)
    return dataclasses.replace(
        store, groups={"site": torch.arange(60) % 5 - 1}, score_reasons={"noise": "no_fit", "other": "no_fit"}
    )


def test_parts_of_a_store_join_to_the_store(make_store):
    store = full(make_store)
    parts = [store.select(torch.arange(a, b)) for a, b in ((0, 7), (7, 7), (7, 60))]
    joined = PredictionStore.concatenate(parts)
    assert joined.task == store.task
    assert joined.score_reasons == store.score_reasons
    for name in ("ids", "logits", "labels", "clusters"):
        assert torch.equal(getattr(joined, name), getattr(store, name)), name
    for name in ("scores", "groups"):
        assert getattr(joined, name).keys() == getattr(store, name).keys()
        assert all(torch.equal(value, getattr(store, name)[key]) for key, value in getattr(joined, name).items())


def test_a_reason_that_one_part_does_not_have_is_dropped(make_store):
    store = full(make_store)
    other = dataclasses.replace(store, score_reasons={"other": "no_fit"})
    assert PredictionStore.concatenate([store, other]).score_reasons == {"other": "no_fit"}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"clusters": None},
        {"groups": {}},
        {"scores": {}},
        {"pseudonyms": True},
        {"answers_only": True},
        {"logits": torch.zeros(60, 4)},
        {"task": "binary"},
    ],
    ids=str,
)
def test_stores_that_are_not_alike_do_not_join(make_store, change):
    store = full(make_store)
    with pytest.raises(ConfigError, match="like the first one"):
        PredictionStore.concatenate([store, dataclasses.replace(store, **change)])


def test_nothing_does_not_join():
    with pytest.raises(ConfigError, match="at least one store"):
        PredictionStore.concatenate([])
