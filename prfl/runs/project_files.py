"""The files that ``prfl init`` writes, with $names where a project differs from another."""

PROJECT = """\
# A reward and a video model that follows it, one after the other.
# Command:    prfl train $project/project.yaml            (--dry-run: memory, hours, what is missing)
version: 1
stages: [reward.yaml, policy.yaml]
"""

REWARD = """\
# A reward: a small head on the hidden states of the video model, which stays as it is.
# Command:    prfl train $project/reward.yaml             then: prfl eval $project/reward.yaml
version: 1
run: runs/$name-reward  # everything that this stage writes, below the current folder
seed: 0
backbone:
  model: $model  # a diffusers folder or hub id; 'shapes' is the small one inside prfl, to try things
  dtype: $dtype$experts
data:
$reward_clips
  cache: runs/cache  # videos and prompts are encoded once, for all runs
  frames: $frames  # of a clip; size and rate were chosen after the headers of your videos
  height: $height
  width: $width
  fps: $fps$reward_buckets
  encode_batch: $encode_batch
reward:
  space: latent
  head:
    dimensions: [$dimensions]
    blocks: [$block]  # the block behind which it reads; the later ones are not run
rollout:
  steps: $chain  # at whose noise levels it is measured
objective:
  name: preference
  loss: $loss
training:
  steps: $reward_steps
  batch: $batch
  accumulation: $accumulation  # so many parts of a batch, one after the other: more takes less memory
  learning_rate: $reward_rate
  warmup: $warmup
  schedule: cosine
  weight_decay: 0.01
  save_every: 100
  log_every: 10
evaluation:
  every: $reward_every  # steps between measurements on the held-out prompts; 0 where none are held out
"""

VIDEOS = """\
  # Nobody has labelled these videos: each clip of them is preferred to a spoilt copy of itself.  A head learns to see
  # damage from it, not taste.  Better: let people compare pairs (prfl labels page), and give data.manifest here.
  generator:
    name: video_clips
    videos: $path
    crops: $crops  # clips of each stretch of a video: the whole picture, then parts of it
    held_out: 0.2  # share of the prompts, the texts beside the videos, that is not trained on
"""

PAIRS = """\
  manifest: $path  # people's labels; rows with "split": "validation" or "test" are not trained on
"""

POLICY = """\
# The video model follows the reward, as a LoRA.
# Command:    prfl train $project/policy.yaml             then: prfl sample $project/policy.yaml --compare-base
#             prfl export runs/$name-policy    writes the LoRA for diffusers and ComfyUI
version: 1
run: runs/$name-policy
seed: 0
backbone:
  model: $model
  dtype: $dtype
  checkpointing: $checkpointing  # full computes activations again in the backward pass: less memory, more time
  adapter: {rank: $rank, alpha: $rank}$experts
data:
$policy_clips
  cache: runs/cache
  frames: $frames
  height: $height
  width: $width
  fps: $fps$policy_buckets$encode_policy
reward:
  space: latent
  path: $${stages.reward.run}/reward
  # weights: {$first: 1.0}  # training the reward ends with the weights to put here
  shape: linear  # hinge, the paper's, stops pulling at a sample whose score is 2 deviations above the clips' mean
rollout:
  steps: $chain
objective:
  name: prfl  # one random step of the chain gets the gradient of the $read's score$handoff$sft
training:
  steps: $policy_steps
  batch: $batch
  accumulation: $accumulation
  learning_rate: $policy_rate
  warmup: 5
  save_every: 20
  log_every: 1
evaluation:
  every: $policy_every  # steps between rounds on held-out prompts: videos, scores, a report
  prompts_per_round: 4
  batch: $batch_drawn
"""

FOLDER_CLIPS = """\
  folder: $path  # a.mp4 with its prompt in a.txt; folders train, validation and test in it are splits
  held_out: 0.2  # share of the prompts for validation, where no folder says which
"""

PROMPTS_ONLY = """\
  manifest: $path  # its prompts; the videos were for the reward
"""

FIRST_FRAMES = """
  prompts: {first_frames: true}  # each prompt with the first frame of a clip of it"""

HANDOFF = """
  handoff: clean  # a reward reads the low-noise expert, and the clean prediction of either can be read"""

ONE_RESIDENT = """
  experts: {resident: one}  # the other expert's weights wait in host memory"""

SFT = """
  sft: {every: 2}  # every other step trains on your clips: it keeps the policy near them"""

README = """\
# $name

Written by `prfl init` from `$folder`: $summary.
Every key is explained in the yaml files, and in `prfl schema FILE`.

    prfl train $project/project.yaml --dry-run  # memory, hours, what is missing
    prfl train $project/project.yaml  # the reward, then the video model; goes on where it was stopped
    prfl eval $project/reward.yaml  # which dimensions rank held-out clips, at which noise level
    prfl sample $project/policy.yaml --compare-base
    prfl export runs/$name-policy

Run them in the folder where `prfl init` was run: `runs/` is made there.  Follow a dimension only if it ranks held-out
clips better than chance: training the reward ends by saying so, with the `reward.weights` to put into policy.yaml.
"""

LARGE = {
    "dtype": "bfloat16", "checkpointing": "full", "encode_batch": 1, "chain": 40, "batch": 8, "accumulation": 8,
    "rank": 32, "reward_steps": 2000, "reward_rate": "1e-4", "warmup": 50, "policy_steps": 1000, "policy_rate": "5e-6",
    "batch_drawn": 1,
}  # fmt: skip
"""For models that need a GPU, as in configs/wan2.1-1.3b."""

SMALL = {
    "dtype": "float32", "checkpointing": "none", "encode_batch": 16, "chain": 20, "batch": 8, "accumulation": 1,
    "rank": 16, "reward_steps": 300, "reward_rate": "1e-3", "warmup": 20, "policy_steps": 20, "policy_rate": "1e-4",
    "batch_drawn": 8,
}  # fmt: skip
"""For small models on a CPU, as in configs/videos."""
