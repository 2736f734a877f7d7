"""What prfl does not protect against, as ``prfl doctor`` and docs/usage.md say it."""

from __future__ import annotations

PROTECTED = (
    "no code of a model's or a reward's repository is run, and no pickle is loaded: weights are safetensors, and the "
    "other files of public rewards (.pt, .pth) are read as weights only"
)

NOT_PROTECTED = {
    "video files": "decoded in this process by FFmpeg's native code: a stranger's videos belong in a container",
    "configs and run folders": "a config names what is read, downloaded and overwritten: read a stranger's before use",
    "weights": "those of a stranger load whatever they were trained to do; a hash says that they are whole, not good",
    "downloads": "come over TLS and are not signed: a revision that is a commit is the same tomorrow",
    "several processes": "talk to each other in clear and let anybody in: on a network of your own only",
    "other users of the machine": "files are written as your umask says; locks and hashes stop accidents, not people",
    "what was deleted": "prompts, videos and latents lie in clear in caches and reports; disks and snapshots keep them",
    "time and disk": "sizes of single files are bounded, not the sum: quotas are the machine's",
}
