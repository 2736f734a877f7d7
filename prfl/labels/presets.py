"""The layouts of public sets of preferences and of labelling tools, by the name that ``--preset`` takes.

Columns and values were read from the sets' pages and from public readers of them; where a set's page leaves a doubt,
its note says so.  ``prfl unpack`` writes embedded videos out as files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from prfl.labels.layout import Layout
from prfl.labels.reading import Row, Table, json_objects, read_table, table_of
from prfl.utils.errors import Faults, PrflError

VIDEOSCORE = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)
MJ_BENCH = ("Alignment", "Safety", "Fineness", "Coherence & Consistency", "Bias")
VISIONREWARD = {
    (1.0, 3.0): ("composition", "focus", "camera movement", "camera stability"),
    (1.0, 4.0): ("lighting accurate", "letters"),
    (0.0, 3.0): ("shape at beginning",),
    (0.0, 4.0): ("shape throughout", "movement smoothness", "movement reality"),
    (1.0, 5.0): (
        "alignment", "color", "lighting aes", "object motion dynamic", "camera motion dynamic", "clear",
        "image quality stability", "detail refinement", "physics law", "safety",
    ),
}  # fmt: skip
"""The ratings of a video by their range; ``unsafe type`` names a kind and is none."""
RAPIDATA = {
    name: f"weighted_results1_{name}:weighted_results2_{name}" for name in ("Preference", "Coherence", "Alignment")
}


def per_object(rows_of: Callable[[dict[str, Any], str], Sequence[dict[str, Any]]]) -> Callable[[Path, Faults], Table]:
    """Make a reader of JSON files in which one object holds several rows.  rows_of: (object, where) to its rows."""

    def read(path: Path, faults: Faults) -> Table:
        rows: list[Row] = []
        for where, content in json_objects(path):
            with faults.collected():
                try:
                    rows += [(where, row) for row in rows_of(content, where)]
                except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                    what = f"is not as this preset expects it ({type(error).__name__}: {error})"
                    raise PrflError(what, where=where, fix="choose another --preset, or name --columns") from error
        return table_of(path, rows)

    return read


def videodpo(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """VideoDPO's pair.json: numbers of videos, of which even ones won and odd ones lost, two to a file's number."""
    files = [
        f"{'winvideos' if number % 2 == 0 else 'losevideos'}/{number // 2:06d}.mp4"
        for number in (int(content["video1"]), int(content["video2"]))
    ]
    return [{"prompt": content["frame_caption"], "a": files[0], "b": files[1], "Overall": "a"}]


def models_rated(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """BaiqiL/GenAI-Bench-Video's {id: {prompt, models: {name: [ratings]}}}: every two models, by mean rating."""
    means = {name: sum(ratings) / len(ratings) for name, ratings in content["models"].items()}
    rows = []
    for first, second in combinations(means, 2):
        files = {"a": f"{first}/{content['id']}.mp4", "b": f"{second}/{content['id']}.mp4"}
        rows.append({"prompt": content["prompt"], **files, "score_a": means[first], "score_b": means[second]})
    return rows


def pictures_ranked(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """HPDv2's files: of train.json two pictures, the preferred one with 1; of test.json several, 1 the best rank."""
    if "rank" in content:
        names, scores = content["image_path"], [-rank for rank in content["rank"]]
    else:
        names, scores = content["file_path"], content["human_preference"]
    return [
        {"prompt": content["prompt"], "a": names[a], "b": names[b], "score_a": scores[a], "score_b": scores[b]}
        for a, b in combinations(range(len(names)), 2)
    ]


def win_and_lose(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """SoliReward's {win: [...], lose: [...], meta: ...}: each winner beside each loser."""
    meta = content.get("meta", {})
    prompt = content.get("prompt") or meta.get("prompt") or meta.get("win", {}).get("prompt", "")
    return [
        {"prompt": prompt, "a": winner, "b": loser, "Overall": "a"}
        for winner in content["win"]
        for loser in content["lose"]
    ]


def label_studio(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Label Studio's JSON export: a task with its data, and annotations of one rater each."""
    rows = []
    for annotation in content["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        answers = {item["from_name"]: _label_studio_value(item["value"]) for item in annotation["result"]}
        rows.append({**content["data"], "rater": str(annotation.get("completed_by", "")), **answers})
    return rows


def _label_studio_value(value: dict[str, Any]) -> Any:
    """Return the answer of one control: a choice, a side, a rating or a number."""
    for kind in ("choices", "selected", "rating", "number", "text"):
        if kind in value:
            answer = value[kind]
            return answer[0] if isinstance(answer, list) else answer
    raise ValueError(f"a control with {', '.join(value)}, which is no answer")


def argilla(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Argilla's records: fields, and of each question the responses of several users."""
    by_user: dict[str, dict[str, Any]] = {}
    for question, responses in content["responses"].items():
        for response in responses:
            if response.get("status", "submitted") == "submitted":
                by_user.setdefault(str(response.get("user_id", "")), {})[question] = response["value"]
    return [{**content["fields"], "rater": user, **answers} for user, answers in by_user.items()]


def google_forms(path: Path, faults: Faults) -> Table:
    """Read a form's answers, a rater each line, beside QUESTIONS.csv, which says what each question shows.

    The file beside is called as the answers, ending in ``-questions.csv``: question,prompt,dimension and a,b or video.
    """
    key = path.with_name(f"{path.stem}-questions.csv")
    questions = read_table(key, faults)
    needed = {"question", "prompt", "dimension"} - set(questions.columns)
    if needed:
        fix = "a first line as question,prompt,a,b,dimension"
        raise PrflError(f"has no column {' and no '.join(sorted(needed))}", where=questions.where, fix=fix)

    answers = read_table(path, faults)
    rows: list[Row] = []
    for number, (where, cells) in enumerate(answers.rows, start=1):
        rater = cells.get("Username") or cells.get("Email Address") or str(number)
        of_video: dict[tuple[str, ...], dict[str, Any]] = {}
        for _, question in questions.rows:
            if question["question"] not in cells:
                fix = "copy the question's title as the form has it"
                raise PrflError(f"there is no question {question['question']!r}", where=answers.where, fix=fix)
            videos = [(name, question[name]) for name in ("video", "a", "b") if name in question]
            row: dict[str, Any] = {"prompt": question["prompt"], "rater": rater, **dict(videos)}
            row = of_video.setdefault((question["prompt"], *(video for _, video in videos)), row)
            row[question["dimension"]] = cells[question["question"]]
        rows += [(where, row) for row in of_video.values()]
    return table_of(path, rows)


def preferred_first(path: Path, faults: Faults) -> Table:
    """Read a table whose first video is always the better one."""
    table = read_table(path, faults)
    return table_of(path, [(where, {**cells, "Overall": "a"}) for where, cells in table.rows])


def from_pictures(path: Path, faults: Faults) -> Table:
    """Read a table of Rapidata's image-to-video sets, whose videos are named by addresses: the last two parts count."""
    table = read_table(path, faults)
    rows: list[Row] = []
    for where, cells in table.rows:
        names = {name: "/".join(str(cells.get(name)).split("/")[-2:]) for name in ("file_name1", "file_name2")}
        rows.append((where, {**cells, **names}))
    return table_of(path, rows)


ALWAYS_A = "the preferred one is always a: a head that only looks at the order would be right, so look at prfl eval"
RAPIDATA_ROOT = "a table in the set's data/ is imported with --root, the folder above it, which has videos/"
PRESETS: dict[str, Layout] = {
    "videogen-rewardbench": Layout(
        columns={"a": "path_A", "b": "path_B", "prompt": "prompt"},
        dimensions={name: name for name in ("VQ", "MQ", "TA", "Overall")},
        split="test",
    ),
    "videoalign": Layout(
        columns={"a": "path_A", "b": "path_B", "prompt": "prompt"},
        dimensions={name: name for name in ("VQ", "MQ", "TA")},
    ),
    "videofeedback": Layout(
        columns={"video": "{id}.mp4", "prompt": "text prompt"},
        dimensions={name: name for name in VIDEOSCORE},
        scales={"": (1.0, 4.0)},
        note="the set has links and frames: a video is looked for as ID.mp4, other names by --columns video=...",
    ),
    "videofeedback2": Layout(
        columns={"video": "{video_name}.mp4", "prompt": "prompt"},
        dimensions={"visual": "visual_score", "text": "t2v_score", "physics": "phy_score"},
        scales={"": (1.0, 5.0)},
        note="the set's videos lie in several folders: put them into one, and name it by --root",
    ),
    "mj-bench-video": Layout(
        columns={"a": "video_0_path", "b": "video_1_path", "prompt": "caption"},
        dimensions={**{name: f"category_preference.{name}" for name in MJ_BENCH}, "Overall": "overall_preference"},
        keep=lambda row: not row.get("discard"),
        note='"Video 1" of its answers is video_0_path',
    ),
    "visionreward": Layout(
        columns={"a": "video1_path", "b": "video2_path", "prompt": "prompt"},
        dimensions={"Overall": "standard_answer"},
        split="test",
    ),
    "visionreward-train": Layout(
        columns={"video": "video_path", "prompt": "prompt"},
        dimensions={name: f"annotation.{name}" for names in VISIONREWARD.values() for name in names},
        scales={name: scale for scale, names in VISIONREWARD.items() for name in names},
        note="the set gives each rating's range, not its better end: the higher is taken; --scale NAME=5:1 turns one",
    ),
    "genai-bench": Layout(
        columns={"a": "left_video", "b": "right_video", "prompt": "prompt"},
        dimensions={"Overall": "vote_type"},
        split="test",
        note="votes that both are bad are ties",
    ),
    "genai-bench-video": Layout(dimensions={"Overall": "score_a:score_b"}, read=per_object(models_rated), split="test"),
    "rapidata": Layout(
        columns={"a": "videos/{file_name1}", "b": "videos/{file_name2}", "prompt": "prompt"},
        dimensions=RAPIDATA,
        note=RAPIDATA_ROOT,
    ),
    "rapidata-i2v": Layout(
        columns={"a": "videos/{file_name1}", "b": "videos/{file_name2}", "prompt": "prompt"},
        dimensions=RAPIDATA,
        read=from_pictures,
        note=f"the picture that both videos begin with is left out, so a reward sees the prompt alone; {RAPIDATA_ROOT}",
    ),
    "rapidata-rich": Layout(
        columns={"video": "video", "prompt": "prompt"},
        dimensions={name: f"likert_score_normalized_{name}" for name in ("alignment", "physics", "style")},
    ),
    "videodpo": Layout(read=per_object(videodpo), note=ALWAYS_A),
    "solireward": Layout(read=per_object(win_and_lose), dimensions={"Overall": "Overall"}, note=ALWAYS_A),
    "hpdv2": Layout(
        read=per_object(pictures_ranked),
        dimensions={"Overall": "score_a:score_b"},
        note="pictures, not videos, named as they are below the set's train/ or test/: --root names it",
    ),
    "hpdv3": Layout(
        columns={"a": "path1", "b": "path2", "prompt": "prompt"},
        dimensions={"Overall": "Overall"},
        read=preferred_first,
        note=f"pictures, not videos; {ALWAYS_A}",
    ),
    "va-judger-bench": Layout(
        columns={"a": "video_1_relative_path", "b": "video_2_relative_path", "prompt": "text_prompt"},
        dimensions={"Overall": "human_preference_answer"},
        split="test",
    ),
    "label-studio": Layout(read=per_object(label_studio), join=True),
    "argilla": Layout(read=per_object(argilla), join=True),
    "google-forms": Layout(
        read=google_forms, join=True, note="what each question shows was read from the file ...-questions.csv beside it"
    ),
}
