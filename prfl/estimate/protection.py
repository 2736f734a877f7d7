"""What prfl does not protect against, as ``prfl doctor`` and docs/usage.md say it."""

from __future__ import annotations

PROTECTED = (
    "no code of a model's or a reward's repository is run, and no pickle is loaded: weights are safetensors, and the "
    "other files of public rewards (.pt, .pth) are read as weights only"
)

NOT_PROTECTED = {
    "video files": "FFmpeg's native code decodes them in this process; open a stranger's videos in a container",
    "configs and run folders": "a config names what is read, downloaded and overwritten; read a stranger's before use",
    "weights": "a stranger's weights do whatever they were trained to do; a hash says they are whole, not good",
    "downloads": "downloads come over TLS and are not signed; name a commit as the revision to get the same files",
    "several processes": "they talk to each other without encryption or passwords; use a network of your own",
    "other users of the machine": "files are written with your umask; locks and hashes stop accidents, not people",
    "deleted files": "caches and reports hold prompts, videos and latents unencrypted; snapshots may keep them",
    "time and disk": "the size of a single file is bounded, the sum is not; set quotas on the machine",
}
