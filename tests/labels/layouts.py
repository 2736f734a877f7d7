"""Small invented tables, each laid out as a public set or a labelling tool lays its own out.

python -m tests.labels.layouts        writes them to a temporary folder, imports each, prints what was read

They are 17 public layouts and those of three tools.  Two sets that are known by name have none here, because their
columns were seen nowhere: TIGER-Lab/VideoScore-Bench and datapointai/text-2-video-human-preferences-motion.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfl.labels.presets import PRESETS, VISIONREWARD
from prfl.labels.table import import_table

Answer = dict[str, Any]


@dataclass(frozen=True)
class Invented:
    """A table.  write: to a folder, returns the table.  videos: the files that it names.

    expected: of each row of the manifest the prompt, the videos and the answers; split: of all rows.
    """

    write: Callable[[Path], Path]
    expected: list[tuple[str, tuple[str, ...], Answer]]
    split: str | None = None

    def make(self, folder: Path) -> Path:
        """Write the table and empty files for its videos."""
        for _, videos, _ in self.expected:
            for video in videos:
                (folder / video).parent.mkdir(parents=True, exist_ok=True)
                (folder / video).touch()
        return self.write(folder)


def table(name: str, *rows: dict[str, Any]) -> Callable[[Path], Path]:
    """Write rows as CSV, JSON, JSON lines or parquet, as the name ends."""

    def write(folder: Path) -> Path:
        path = folder / name
        if path.suffix == ".csv":
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(list(rows)), encoding="utf-8")
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path

    return write


def document(name: str, content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder / name

    return write


def form(folder: Path) -> Path:
    """A form's answers of two people, and what its questions show."""
    questions = [
        {"question": "1. Which moves better?", "prompt": "a dog", "a": "a.mp4", "b": "b.mp4", "dimension": "motion"},
        {"question": "2. Which looks better?", "prompt": "a dog", "a": "a.mp4", "b": "b.mp4", "dimension": "look"},
    ]
    table("form-questions.csv", *questions)(folder)
    titles = [question["question"] for question in questions]
    first = {"Timestamp": "2026/01/01 10:00", titles[0]: "Left", titles[1]: "Both"}
    second = {"Timestamp": "2026/01/01 11:00", titles[0]: "Left", titles[1]: "Right"}
    return table("form.csv", first, second)(folder)


AB = {"path_A": "m1/a.mp4", "path_B": "m2/b.mp4", "prompt": "a dog"}
SIDES = ("m1/a.mp4", "m2/b.mp4")
ODD = {"A_model": "m1", "B_model": "m2", "fps_A": 24, "num_frames_A": 97, "fps_B": 8.0, "num_frames_B": 49}
FEEDBACK = {
    "visual quality": 1, "temporal consistency": 4, "dynamic degree": 3, "text-to-video alignment": 2,
    "factual consistency": 4,
}  # fmt: skip
MJ = {"caption": "a dog", "video_0_path": "v/0.mp4", "video_1_path": "v/1.mp4", "video_0_label": [0, 2]}
RAPID = {
    "prompt": "a dog",
    "video1": "http://x/1",
    "video2": "http://x/2",
    "file_name1": "1.mp4",
    "file_name2": "2.mp4",
}
STUDIO = {"prompt": "a dog", "a": "a.mp4", "b": "b.mp4"}


def studio(rater: int, side: str) -> dict[str, Any]:
    result = [
        {"from_name": "motion", "type": "pairwise", "value": {"selected": side}},
        {"from_name": "look", "type": "choices", "value": {"choices": ["Video 2"]}},
    ]
    return {"completed_by": rater, "result": result}


def rapid(of: str, first: float, second: float) -> dict[str, float]:
    return {f"weighted_results1_{of}": first, f"weighted_results2_{of}": second}


LAYOUTS: dict[str, Invented] = {
    "videogen-rewardbench": Invented(
        table(
            "videogen-rewardbench.csv",
            {**AB, "VQ": "A", "MQ": "B", "TA": "same", "Overall": "", **ODD},
            {**AB, "prompt": "a cat", "VQ": "same", "MQ": "A", "TA": "A", "Overall": "A", **ODD},
        ),
        [
            ("a dog", SIDES, {"VQ": "a", "MQ": "b", "TA": "tie"}),
            ("a cat", SIDES, {"VQ": "tie", "MQ": "a", "TA": "a", "Overall": "a"}),
        ],
        "test",
    ),
    "videoalign": Invented(
        table("train.csv", {**AB, "VQ": "A", "MQ": "B", "TA": "same", "fps_A": 8, "num_frames_A": 49}),
        [("a dog", SIDES, {"VQ": "a", "MQ": "b", "TA": "tie"})],
    ),
    "videofeedback": Invented(
        table("train.parquet", {"id": "0007", "text prompt": "a dog", "video link": "http://x/7", **FEEDBACK}),
        [("a dog", ("0007.mp4",), {name: (value - 1) / 3 for name, value in FEEDBACK.items()})],
    ),
    "videofeedback2": Invented(
        table(
            "data_27k_test.json",
            {"video_name": "0007_h", "video_url": "http://x/m/7.mp4", "prompt": "a dog", "visual_score": 1,
             "t2v_score": 5, "phy_score": 3},
        ),
        [("a dog", ("0007_h.mp4",), {"visual": 0.0, "text": 1.0, "physics": 0.5})],
    ),
    "mj-bench-video": Invented(
        table(
            "test.json",
            {**MJ, "category_preference": {"Alignment": "Video 1 better", "Safety": "Same", "Fineness":
             "Video 2 better", "Coherence & Consistency": "Same", "Bias": "Same"},
             "overall_preference": "Video 1 better", "discard": False},
            {**MJ, "category_preference": {"Alignment": "Same"}, "overall_preference": "Same", "discard": True},
        ),
        [("a dog", ("v/0.mp4", "v/1.mp4"), {
            "Alignment": "a", "Safety": "tie", "Fineness": "b", "Coherence & Consistency": "tie", "Bias": "tie",
            "Overall": "a",
        })],
    ),
    "visionreward": Invented(
        table(
            "test.parquet",
            {"prompt": "a dog", "video1_path": "a.mp4", "video2_path": "b.mp4", "standard_answer": "video2"},
            {"prompt": "a cat", "video1_path": "a.mp4", "video2_path": "b.mp4", "standard_answer": "tie"},
        ),
        [("a dog", ("a.mp4", "b.mp4"), {"Overall": "b"}), ("a cat", ("a.mp4", "b.mp4"), {"Overall": "tie"})],
        "test",
    ),
    "visionreward-train": Invented(
        table(
            "train.parquet",
            {"video_path": "v/1.mp4", "internal_id": "1", "prompt": "a dog", "url": "http://x/1",
             "annotation": {**{name: worst for (worst, _), names in VISIONREWARD.items() for name in names},
                            "shape throughout": 3, "physics law": 5, "unsafe type": 4},
             "meta_result": [1, 0], "meta_mask": [1, 1]},
        ),
        [("a dog", ("v/1.mp4",), {**{name: 0.0 for names in VISIONREWARD.values() for name in names},
                                  "shape throughout": 0.75, "physics law": 1.0})],
    ),
    "genai-bench": Invented(
        table(
            "test_v1.parquet",
            *(
                {"prompt": prompt, "left_model": "m1", "left_video": "a.mp4", "right_model": "m2",
                 "right_video": "b.mp4", "vote_type": vote}
                for prompt, vote in (("1", "leftvote"), ("2", "rightvote"), ("3", "tievote"), ("4", "bothbad_vote"))
            ),
        ),
        [(str(i), ("a.mp4", "b.mp4"), {"Overall": side}) for i, side in enumerate(("a", "b", "tie", "tie"), start=1)],
        "test",
    ),
    "genai-bench-video": Invented(
        document("genai_video.json", {
            "00": {"prompt": "a dog", "models": {"m1": [1, 2, 3], "m2": [5, 5, 4], "m3": [2, 2, 2]}},
        }),
        [
            ("a dog", ("m1/00.mp4", "m2/00.mp4"), {"Overall": "b"}),
            ("a dog", ("m1/00.mp4", "m3/00.mp4"), {"Overall": "tie"}),
            ("a dog", ("m2/00.mp4", "m3/00.mp4"), {"Overall": "a"}),
        ],
        "test",
    ),
    "rapidata": Invented(
        table(
            "train.parquet",
            {**RAPID, **rapid("Preference", 0.7, 0.3), **rapid("Coherence", 0.5, 0.5), **rapid("Alignment", 0.1, 0.9)},
        ),
        [("a dog", ("videos/1.mp4", "videos/2.mp4"), {"Preference": "a", "Coherence": "tie", "Alignment": "b"})],
    ),
    "rapidata-i2v": Invented(
        table(
            "train.parquet",
            {**RAPID, "file_name1": "https://x/y/marey/1.mp4", "file_name2": "hailuo-02/2.mp4",
             "prompt_asset": {"bytes": b"picture", "path": None}, **rapid("Preference", 0.2, 0.8),
             **rapid("Coherence", 0.5, 0.5), **rapid("Alignment", 0.9, 0.1)},
        ),
        [("a dog", ("videos/marey/1.mp4", "videos/hailuo-02/2.mp4"),
          {"Preference": "b", "Coherence": "tie", "Alignment": "a"})],
    ),
    "rapidata-rich": Invented(
        table(
            "train.parquet",
            {"prompt": "a dog", "video": "v.mp4",
             **{f"likert_score_{n}": 4.0 for n in ("alignment", "physics", "style")},
             **{f"likert_score_normalized_{n}": 0.75 for n in ("alignment", "physics", "style")}},
        ),
        [("a dog", ("v.mp4",), {"alignment": 0.75, "physics": 0.75, "style": 0.75})],
    ),
    "videodpo": Invented(
        table("pair.json", {"video1": 14, "video2": 15, "frame_caption": "a dog", "label": 0}),
        [("a dog", ("winvideos/000007.mp4", "losevideos/000007.mp4"), {"Overall": "a"})],
    ),
    "solireward": Invented(
        table("pairs.json", {"win": ["w.mp4"], "lose": ["l.mp4", "k.mp4"], "meta": {"prompt": "a dog"}}),
        [("a dog", ("w.mp4", "l.mp4"), {"Overall": "a"}), ("a dog", ("w.mp4", "k.mp4"), {"Overall": "a"})],
    ),
    "hpdv2": Invented(
        document("hpdv2.json", [
            {"prompt": "a dog", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1], "user_hash": "u"},
            {"prompt": "a cat", "image_path": ["3.jpg", "4.jpg", "5.jpg"], "rank": [2, 1, 2], "raw_annotations": []},
        ]),
        [
            ("a dog", ("1.jpg", "2.jpg"), {"Overall": "b"}),
            ("a cat", ("3.jpg", "4.jpg"), {"Overall": "b"}),
            ("a cat", ("3.jpg", "5.jpg"), {"Overall": "tie"}),
            ("a cat", ("4.jpg", "5.jpg"), {"Overall": "a"}),
        ],
    ),
    "hpdv3": Invented(
        table(
            "train.json",
            {"path1": "i/1.jpg", "path2": "i/2.jpg", "prompt": "a dog", "model1": "m", "model2": "n", "confidence": 0.9,
             "choice_dist": [12, 4]},
        ),
        [("a dog", ("i/1.jpg", "i/2.jpg"), {"Overall": "a"})],
    ),
    "va-judger-bench": Invented(
        table(
            "data.jsonl",
            {"case_id": "7", "text_prompt": "a dog", "video_1_relative_path": "v/1.mp4",
             "video_2_relative_path": "v/2.mp4", "human_preference_answer": "video 2 is better"},
        ),
        [("a dog", ("v/1.mp4", "v/2.mp4"), {"Overall": "b"})],
        "test",
    ),
    "label-studio": Invented(
        document("export.json", [
            {"id": 1, "data": STUDIO, "annotations": [studio(1, "left"), studio(2, "left"), studio(3, "right")]},
            {"id": 2, "data": {**STUDIO, "prompt": "a cat"},
             "annotations": [{**studio(1, "right"), "was_cancelled": True}, studio(2, "right")]},
        ]),
        [("a dog", ("a.mp4", "b.mp4"), {"motion": "a", "look": "b"}),
         ("a cat", ("a.mp4", "b.mp4"), {"motion": "b", "look": "b"})],
    ),
    "argilla": Invented(
        document("records.json", [
            {"id": "1", "fields": {"prompt": "a dog", "video_a": "a.mp4", "video_b": "b.mp4"}, "metadata": {},
             "responses": {
                 "motion": [{"value": "A", "user_id": "u1"}, {"value": "B", "user_id": "u2", "status": "draft"}],
                 "look": [{"value": "same", "user_id": "u1"}],
             }},
        ]),
        [("a dog", ("a.mp4", "b.mp4"), {"motion": "a", "look": "tie"})],
    ),
    "google-forms": Invented(form, [("a dog", ("a.mp4", "b.mp4"), {"motion": "a", "look": "b"})]),
}  # fmt: skip


def main() -> None:
    for name, invented in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = invented.make(Path(folder))
            told = import_table(path, layout=PRESETS[name]).partition(": ")[2]
            print(f"{name} ({path.name}): {told}\n")


if __name__ == "__main__":
    main()
