"""The commands parse, load the config and call prfl.runs, whose functions are replaced here by a recorder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prfl import cli, runs
from prfl.commands import train
from prfl.config import json_schema, load_config
from prfl.utils.errors import PrflError

SFT = str(Path(__file__).parents[2] / "configs/tiny/sft.yaml")
PRFL = str(Path(__file__).parents[2] / "configs/tiny/prfl.yaml")
STORY = str(Path(__file__).parents[2] / "configs/tiny.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the commands asked of prfl.runs."""
    made: list[tuple] = []
    homes = {"train": "stage", **{name: name for name in ("cache", "evaluate", "sample", "dry_run", "doctor")}}
    for name, home in homes.items():
        module = ModuleType(f"prfl.runs.{home}")
        setattr(module, name, lambda *args, _name=name, **named: made.append((_name, *args, named)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(runs, home, module, raising=False)
    return made


def test_train_with_options_and_overrides_in_any_order(calls: list[tuple]) -> None:
    expected = load_config(SFT, ["training.steps=3", "seed=4"])
    for arguments in (
        ["train", SFT, "training.steps=3", "seed=4", "--resume", "none"],
        ["train", SFT, "training.steps=3", "--resume", "none", "seed=4"],
        ["train", "--resume", "none", SFT, "training.steps=3", "seed=4"],
    ):
        assert cli.main(arguments) == 0
        assert calls.pop() == ("train", expected, {"resume": "none"})


def test_train_runs_the_stages_in_order(calls: list[tuple]) -> None:
    assert cli.main(["train", STORY, "policy.training.steps=7"]) == 0
    assert [call[1].run.name for call in calls] == ["tiny-watcher", "tiny-policy"]
    assert calls[1][1].training.steps == 7


def test_dry_run_prints_what_reads_back_as_the_same_config(
    calls: list[tuple], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert cli.main(["train", SFT, "--dry-run", "-v", "seed=9"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert [(call[0], call[1].config, call[2]) for call in calls] == [
        ("dry_run", load_config(printed), {"earlier": [], "gpu": None, "quiet": False})
    ]
    assert load_config(printed).seed == 9


def test_doctor_with_and_without_a_config(calls: list[tuple]) -> None:
    assert cli.main(["doctor"]) == cli.main(["doctor", STORY, "policy.seed=9"]) == 0
    assert [[stage.name for stage in call[1]] for call in calls] == [[], ["watcher", "policy"]]
    assert calls[1][1][1].config.seed == 9


def test_schema_goes_to_a_file_or_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["schema"]) == cli.main(["schema", str(tmp_path / "s.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "s.json").read_text()) == json_schema()


PLAIN = {"compare_base": False, "prompts": (), "base": False, "checkpoint": None, "lora_scale": 1.0}


def test_sample_steers_by_options_and_by_the_config(calls: list[tuple]) -> None:
    """Options stand above the config's section; another method begins with its own defaults."""
    section = "steering={name: best_of, chains: 4, keep: 2}"
    for arguments, steering in (
        (["--best-of", "6", "--decide-at", "0.5,1"], {"chains": 6, "decide_at": [0.5, 1.0]}),
        ([section], {"chains": 4, "keep": 2}),
        ([section, "--keep", "3"], {"chains": 4, "keep": 3}),
        ([section, "--budget", "90"], {"budget": 90.0, "keep": 2}),
        (["steering={name: best_of, budget: 50}", "--best-of", "3"], {"chains": 3}),
    ):
        assert cli.main(["sample", PRFL, *arguments, "--seed", "7", "--prompt", "up"]) == 0
        name, config, options = calls.pop()
        assert config.steering.model_dump(exclude_defaults=True) == {"name": "best_of", **steering}
        assert config.evaluation.seed == 7 and options == {**PLAIN, "prompts": ["up"]}


def test_cache_eval_and_sample(calls: list[tuple]) -> None:
    config = load_config(SFT)
    assert cli.main(["cache", SFT]) == cli.main(["sample", SFT, "--compare-base"]) == 0
    assert cli.main(["eval", SFT, "--manifest", "m.jsonl"]) == cli.main(["eval", "--head", "a/b"]) == 0
    assert cli.main(["eval", SFT, "--head", "x=a/b", "--head", "y=c"]) == 0
    assert calls == [
        ("cache", config, {}),
        ("sample", config, {**PLAIN, "compare_base": True}),
        ("evaluate", config, {"heads": None, "manifest": Path("m.jsonl"), "split": "validation"}),
        (
            "evaluate",
            None,
            {"heads": {"head": Path("a/b")}, "manifest": None, "split": "validation", "run": None, "overrides": []},
        ),
        ("evaluate", config, {"heads": {"x": Path("a/b"), "y": Path("c")}, "manifest": None, "split": "validation"}),
    ]


def test_eval_of_a_run_takes_keys_to_change(calls: list[tuple]) -> None:
    of_a_run = {"heads": None, "manifest": None, "split": "validation", "run": Path("runs/x")}
    for arguments in (["--run", "runs/x", "seed=1", "seed=2"], ["seed=1", "--run", "runs/x", "seed=2"]):
        assert cli.main(["eval", *arguments]) == 0
        assert calls.pop() == ("evaluate", None, {**of_a_run, "overrides": ["seed=1", "seed=2"]})
    assert cli.main(["eval", SFT, "--run", "runs/x"]) == 2


def test_a_mistake_is_one_line_without_traceback(calls: list[tuple], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", SFT, "training.stepz=3"]) == 2
    assert capsys.readouterr().err == "prfl: command line: training.stepz: unknown key. Did you mean 'steps'?\n"
    assert cli.main(["train", SFT, "steps"]) == 2
    assert cli.main(["train", "absent.yaml"]) == 2
    assert cli.main(["eval"]) == 2
    assert not calls


def test_errors_of_the_work_itself(calls: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(error: BaseException):
        def command(*args, **named):
            raise error

        return command

    monkeypatch.setattr(sys.modules["prfl.runs.cache"], "cache", fail(PrflError("broken", where="here", fix="so")))
    assert cli.main(["cache", SFT]) == 2
    assert capsys.readouterr().err == "prfl: here: broken\n  To mend it: so\n"
    monkeypatch.setattr(sys.modules["prfl.runs.cache"], "cache", fail(KeyboardInterrupt()))
    assert cli.main(["cache", SFT]) == 130
    assert f"the same command goes on where it stopped:\n  prfl cache {SFT}\n" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["prfl.runs.stage"], "train", fail(KeyboardInterrupt()))
    assert cli.main(["train", SFT, "--resume", "none", "run=runs/a b"]) == 130
    assert f"it stopped:\n  prfl train {SFT} 'run=runs/a b'\n" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["prfl.runs.sample"], "sample", fail(KeyboardInterrupt()))
    assert cli.main(["sample", SFT]) == 130
    assert capsys.readouterr().err == "prfl: interrupted\n", "it begins anew"
    monkeypatch.setattr(sys.modules["prfl.runs.cache"], "cache", fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        cli.main(["cache", SFT])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", SFT, "--dryrun=1"],
        ["labels"],
        ["export", "runs/x", "seed=1"],
        ["score", "a.mp4"],
        ["score", "a.mp4", "--head", "x", "--sigmas", "low"],
        ["labels", "import", "a", "--scale", "5"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: prfl" in capsys.readouterr().err


def test_help_teaches_and_does_not_wait_for_torch() -> None:
    teaches = train.HELP
    for word in ("a config", "key=value", "training.steps=10", "--resume none", "dry run", "prfl schema"):
        assert word in teaches, word
    code = "import sys; from prfl import cli\ntry: cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "prfl train configs/tiny.yaml" in run.stdout
    assert run.stdout.splitlines()[-1] == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' torch has another OpenMP library")
@pytest.mark.parametrize(
    ("own", "spins"), [({}, "1000"), pytest.param({"GOMP_SPINCOUNT": "7"}, "7", marks=pytest.mark.slow)]
)
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(own: dict[str, str], spins: str) -> None:
    """Told by the OpenMP library, which reads the environment when torch is loaded."""
    code = "from prfl import cli; cli.main(['schema']); import torch"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1", **own}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr


def test_the_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and re.fullmatch(r"prfl \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("prfl tr", {"train"}),
        ("prfl train --dry", {"--dry-run"}),
        ("prfl train tiny/pr", {"tiny/prfl.yaml", "tiny/pretrain.yaml"}),
        ("prfl train tiny/prfl.yaml training.st", {"training.steps="}),
        ("prfl train tiny/prfl.yaml training.schedule=", {"constant", "linear", "cosine"}),
        ("prfl train tiny.yaml wa", {"watcher."}),
        ("prfl train tiny.yaml policy.training.sa", {"policy.training.save_every="}),
    ],
)
def test_a_shell_completes(words: str, completed: set[str], tmp_path: Path) -> None:
    """As bash asks: the words so far in the environment, the answers in a file."""
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": words, "COMP_POINT": str(len(words)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " =:",
        "COMP_TYPE": "9",
    }
    code = "from prfl import cli; import sys; sys.argv = ['prfl']; cli.main()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, cwd=tmp_path, timeout=120)
    assert {word.strip() for word in (tmp_path / "answer").read_text().splitlines()} == completed
