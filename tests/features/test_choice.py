"""What `probe` says of a few records: how many, what chance makes of them, and on which the layer was chosen."""

import numpy as np
import pytest

from data2vec_train.features.measures import standard_error
from data2vec_train.probe.run import choose_layer, comparison


def coins(records, layers, seed=0):
    return list(np.random.default_rng(seed).random((layers, records)) < 0.35)


def test_a_layer_is_not_judged_by_the_records_that_chose_it():
    """Of 13 layers that only guess, the best one of 400 records seems to be better than chance; on others it is not."""
    best, said = [], []
    for seed in range(40):
        hits = coins(400, 13, seed)
        best.append(max(row.mean() for row in hits))
        said.append(choose_layer(hits, list(range(13)), seed)["accuracy"])
    assert np.mean(best) > 0.38
    assert np.mean(said) == pytest.approx(0.35, abs=0.012)


def test_few_records_choose_and_say_so():
    chosen = choose_layer(coins(20, 5), [0, 1, 2, 3, 4], seed=0)
    assert chosen["records"] == 20
    assert chosen["chosen_on_the_same_records"]
    assert not choose_layer(coins(20, 1), [4], seed=0)["chosen_on_the_same_records"]


def test_the_issue_of_20_records_is_called_chance():
    untrained, trained = (
        {"layer": 1, "accuracy": share, "standard_error": standard_error(share, 20), "records": 20}
        | {"chosen_on_the_same_records": True}
        for share in (0.35, 0.5)
    )
    said = comparison("k-NN", untrained, trained)
    assert said.startswith("k-NN: 35.0% +- 10.7% (layer 1) untrained -> 50.0% +- 11.2% (layer 1) trained, on 20 test")
    assert "due to chance" in said
    assert "chosen on these same records" in said


def test_many_records_and_a_large_difference_need_no_note():
    chosen = {"layer": 2, "accuracy": 0.5, "standard_error": standard_error(0.5, 5000), "records": 5000}
    chosen["chosen_on_the_same_records"] = False
    assert "chance" not in comparison("linear", chosen, chosen | {"accuracy": 0.6})
    assert "chance" in comparison("linear", chosen, chosen | {"accuracy": 0.51})


@pytest.mark.parametrize("records", [1, 5])
def test_a_perfect_score_of_a_handful_is_worth_nothing(records):
    all_right = choose_layer([np.ones(records, bool)], [3], seed=0)
    all_wrong = choose_layer([np.zeros(records, bool)], [3], seed=0)
    assert all_right["standard_error"] == 0.0
    assert "chance" in comparison("k-NN", all_wrong, all_right)
