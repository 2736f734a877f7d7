"""Control characters in a user's text: they cannot steer the terminal."""

from __future__ import annotations

from tests.faults.planting import fault


@fault("a file's name that colours the terminal", r"no such file: clips/\x1b[31m9.mp4", "relative to")
def _(bench):
    bench.rows(lambda rows: rows[0].update(video="clips/\x1b[31m9.mp4"))
    return bench.cli("train", "reward.yaml")


@fault("a prompt that clears the terminal, twice", r"train.txt:4: the prompt 'a \x1b[2J dog", "remove one")
def _(bench):
    with open("train.txt", "a") as file:
        file.write("a \x1b[2J dog\na \x1b[2J dog\n")
    return bench.cli("train", "prfl.yaml")


@fault("a key that rings the bell", r"steps\x07", "training.steps")
def _(bench):
    return bench.cli("train", "sft.yaml", "training.steps\x07=3")


@fault("a dimension that turns the line over", r"mo\u202etion", "label both")
def _(bench):
    def change(rows):
        for row in rows:
            row["label"] = {"mo\u202etion": 1.0}

    bench.rows(change)
    return bench.cli("train", "reward.yaml", "reward.head.dimensions=['mo\u202etion']")
