"""The order of the data: every item once an epoch, whatever the batch."""

from prfl.utils.order import met, shuffled


def test_epochs_are_permutations_laid_end_to_end():
    flat = shuffled(range(40), 10, seed=7, purpose="x")
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled(range(12, 16), 10, seed=7, purpose="x") == flat[12:16]  # nothing is remembered


def test_the_order_depends_on_seed_and_purpose():
    orders = [shuffled(range(20), 20, seed, purpose) for seed, purpose in ((7, "x"), (8, "x"), (7, "y"))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_what_a_training_meets_is_what_it_draws():
    for samples, count in ((6, 6), (20, 20), (50, 20)):
        drawn = shuffled(range(samples), 20, seed=7, purpose="x")
        assert met(samples, 20, seed=7, purpose="x") == sorted(set(drawn)) and len(set(drawn)) == count
