"""The effect of every key of a config: two values of it, and the computation whose outcomes must differ.

``EFFECTS`` has for each key (by the section that declares it) the computation, a config to start from and overrides:
those that both sides share, then one list for each side.  Where no cheap computation can show a key, ``REASONS`` says
why, or names the test that shows it.
"""

from __future__ import annotations

from tests.config.steering_effects import STEERING_EFFECTS

SFT, REWARD, PRFL, VADER = "sft.yaml", "reward.yaml", "prfl.yaml", "vader.yaml"
CLIPS = "data.manifest=manifest.jsonl"
PIXEL = "reward={space: pixel, head: {dimensions: [light], inner: 8, hidden: 8}}"
SHAPES = ["data.manifest=null", "data.prompts.train=shapes", "data.frames=17", "data.height=32", "data.width=32"]
CHAIN = "objective={name: full_chain}"
CLOSE = "objective.steps_range=[0.75, 1]"  # steps to go until the trained one
LIGHT = "reward.head.dimensions=[light]"  # the clips of one prompt are alike in the other one
SAMPLES = "shapes_samples, per_prompt: 2"


def objective(name: str, key: str, *values: str) -> tuple[list[str], ...]:
    """One side for each value of the objective's key."""
    return tuple([f"objective={{name: {name}, {key}: {value}}}"] for value in values)


def sides(key: str, *values: object) -> tuple[list[str], ...]:
    return tuple([f"{key}={value}"] for value in values)


def adapter(prefix: str, start: str, shared: list[str]) -> dict[str, tuple]:
    return {
        f"{prefix}.AdapterConfig.rank": ("step", start, shared, *sides(f"{prefix}.rank", 1, 2)),
        f"{prefix}.AdapterConfig.alpha": ("step", start, shared, *sides(f"{prefix}.alpha", 1, 2)),
        f"{prefix}.AdapterConfig.targets": ("step", start, shared, *sides(f"{prefix}.targets", "[to_q]", "[to_k]")),
        f"{prefix}.AdapterConfig.dropout": ("step", start, shared, *sides(f"{prefix}.dropout", 0.0, 0.4)),
    }


def generator(text: str, key: str, *values: object) -> tuple[list[str], ...]:
    return tuple([f"data.generator={{name: {text}, {key}: {value}}}"] for value in values)


EFFECTS: dict[str, tuple] = {
    "Config.run": ("loop", SFT, [], *sides("run", "runs/one", "runs/two")),
    "Config.seed": ("step", SFT, [], *sides("seed", 0, 1)),
    **adapter("backbone.adapter", SFT, []),
    "PolicyAdapterConfig.blocks": ("step", SFT, [], *sides("backbone.adapter.blocks", "all", "last_half")),
    **adapter("reward.head.adapter", REWARD, ["reward.head.adapter={rank: 2, alpha: 2}"]),
    "KernelsConfig.lora_linear": ("kernels", SFT, [], *sides("backbone.kernels.lora_linear", "auto", "triton")),
    "KernelsConfig.qk_norm_rope": ("kernels", SFT, [], *sides("backbone.kernels.qk_norm_rope", "auto", "triton")),
    "KernelsConfig.gated_residual_norm": (
        "kernels", SFT, [], *sides("backbone.kernels.gated_residual_norm", "auto", "triton"),
    ),
    "BackboneConfig.model": ("step", SFT, [], [], ["backbone.model=other"]),
    "BackboneConfig.dtype": ("step", SFT, [], *sides("backbone.dtype", "float32", "bfloat16")),
    "BackboneConfig.device": ("device", SFT, [], *sides("backbone.device", "auto", "cuda")),
    "BackboneConfig.checkpointing": ("step", SFT, [], *sides("backbone.checkpointing", "none", "full")),
    "BackboneConfig.offload": (
        "step", SFT, ["backbone.checkpointing=full"], *sides("backbone.offload", "false", "true"),
    ),
    "BackboneConfig.kernels": ("kernels", SFT, [], *sides("backbone.kernels", "auto", "triton")),
    "BackboneConfig.attention": ("attention", SFT, [], *sides("backbone.attention", "auto", "triton")),
    "BackboneConfig.train": ("step", SFT, [], [], ["backbone.train=full", "backbone.adapter=null"]),
    "LatentHeadConfig.dimensions": ("step", REWARD, [], *sides("reward.head.dimensions", "[light]", "[calm]")),
    "LatentHeadConfig.blocks": ("step", REWARD, [], *sides("reward.head.blocks", "[0]", "[1]")),
    "LatentHeadConfig.pooling": ("step", REWARD, [], *sides("reward.head.pooling", "query", "mean")),
    "LatentHeadConfig.inner": ("step", REWARD, [], *sides("reward.head.inner", 8, 16)),
    "LatentHeadConfig.queries": ("step", REWARD, [], *sides("reward.head.queries", 1, 2)),
    "LatentHeadConfig.heads": ("step", REWARD, [], *sides("reward.head.heads", 4, 2)),
    "LatentHeadConfig.hidden": ("step", REWARD, [], *sides("reward.head.hidden", 8, 16)),
    "LatentHeadConfig.film": ("step", REWARD, [], *sides("reward.head.film", "true", "false")),
    "PixelHeadConfig.dimensions": ("step", REWARD, [PIXEL], *sides("reward.head.dimensions", "[light]", "[calm]")),
    "PixelHeadConfig.size": ("step", REWARD, [PIXEL], *sides("reward.head.size", 8, 16)),
    "PixelHeadConfig.hidden": ("step", REWARD, [PIXEL], *sides("reward.head.hidden", 4, 8)),
    "PixelHeadConfig.inner": ("step", REWARD, [PIXEL], *sides("reward.head.inner", 4, 8)),
    "RewardBase.weights": ("step", PRFL, [], *sides("reward.weights", "{light: 1.0}", "{calm: 1.0}")),
    "RewardBase.aggregate": ("step", PRFL, [], *sides("reward.aggregate", "sum", "logsigmoid")),
    "RewardBase.shape": ("step", PRFL, [], *sides("reward.shape", "linear", "hinge")),
    "RewardBase.target": ("step", PRFL, ["reward.shape=hinge"], *sides("reward.target", 2.0, 9.0)),
    "RewardBase.scale": ("step", PRFL, [], *sides("reward.scale", 0.1, 0.2)),
    "RewardBase.batch": ("step", PRFL, [], *sides("reward.batch", "null", 1)),
    "LatentRewardConfig.path": ("step", PRFL, [], *sides("reward.path", "heads/latent", "heads/second")),
    "LatentRewardConfig.uncertainty_weight": (
        "step", PRFL, ["reward.path=[heads/latent, heads/second]"], *sides("reward.uncertainty_weight", 0.0, 1.0),
    ),
    "PixelRewardConfig.path": ("step", VADER, [], *sides("reward.path", "heads/pixel", "heads/pixels")),
    "GuidanceConfig.scale": ("step", PRFL, ["rollout.guidance.gradient=cond"], *sides("rollout.guidance.scale", 2, 3)),
    "GuidanceConfig.first_frame": (
        "step", PRFL, ["rollout.guidance={scale: 3, gradient: cond}"],
        *sides("rollout.guidance.first_frame", "null", 1.0),
    ),
    "GuidanceConfig.gradient": (
        "step", PRFL, ["rollout.guidance.scale=3"], *sides("rollout.guidance.gradient", "cond", "both"),
    ),
    "RolloutConfig.solver": ("step", PRFL, [CHAIN], *sides("rollout.solver", "euler", "unipc")),
    "RolloutConfig.eta": ("step", PRFL, [CHAIN, "rollout.solver=flow_sde"], *sides("rollout.eta", 0.2, 0.9)),
    "RolloutConfig.steps": ("step", PRFL, [CHAIN], *sides("rollout.steps", 2, 3)),
    "RolloutConfig.shift": ("step", PRFL, [CHAIN], *sides("rollout.shift", 1.0, 5.0)),
    "RolloutConfig.stride": ("step", PRFL, ["objective={name: vader}"], *sides("rollout.stride", 1, 2)),
    "RolloutConfig.gradients_per_rollout": ("step", PRFL, [], *sides("rollout.gradients_per_rollout", 1, 2)),
    "RolloutConfig.step_weight": ("step", PRFL, [], *sides("rollout.step_weight", "native", "unit")),
    **{
        f"CheaperConfig.{key}": ("step", PRFL, [CLOSE], *sides(f"rollout.cheaper.{key}", *two))
        for key, two in {"products": ("exact", "float8"), "attention": ("exact", "int8"), "cache": (0.0, 0.9)}.items()
    },
    "SftConfig.prompt_dropout": ("step", SFT, [], *sides("objective.prompt_dropout", 0.0, 1.0)),
    "PreferenceConfig.loss": ("step", REWARD, [LIGHT], *sides("objective.loss", "bce", "bradley_terry")),
    "PreferenceConfig.eta": ("step", REWARD, [LIGHT, "objective.loss=rao_kupper"], *sides("objective.eta", 2.0, 9.0)),
    "PreferenceConfig.sigma_sampling": ("step", REWARD, [], *sides("objective.sigma_sampling", "uniform", "shifted")),
    "PreferenceConfig.frames": ("step", REWARD, [PIXEL], *sides("objective.frames", "null", 1)),
    "PreferenceConfig.keep_decoded": ("step", REWARD, [PIXEL], *sides("objective.keep_decoded", "false", "true")),
    "RewardGradientConfig.frames": ("step", VADER, [], *sides("objective.frames", "all", "one")),
    "RewardGradientConfig.distance_weight": ("step", PRFL, [], *sides("objective.distance_weight", 0.0, 1.0)),
    "SftRegulariserConfig.every": ("step", PRFL, [CLIPS], *sides("objective.sft.every", 1, 2)),
    "SftRegulariserConfig.weight": ("step", PRFL, [CLIPS], *sides("objective.sft.weight", 1.0, 2.0)),
    "SftRegulariserConfig.prompt_dropout": ("step", PRFL, [CLIPS], *sides("objective.sft.prompt_dropout", 0.0, 1.0)),
    "FromDataConfig.from_data": ("step", PRFL, [], [], ["objective.from_data=1.0", CLIPS]),
    "PrflConfig.handoff": ("step", PRFL, [], *sides("objective.handoff", "next", "clean")),
    "PrflConfig.steps_range": ("step", PRFL, [], *sides("objective.steps_range", "[0, 0.25]", "[0.75, 1]")),
    "ReflConfig.steps_range": ("step", PRFL, [], *objective("refl", "steps_range", "[0, 0.25]", "[0.75, 1]")),
    "VaderConfig.last_steps": ("step", VADER, [], *sides("objective.last_steps", 1, 2)),
    "AlignPropConfig.last_steps": ("step", PRFL, [], *objective("alignprop", "last_steps", "[1, 1]", "[3, 3]")),
    "DraftLvConfig.copies": ("step", PRFL, [], *objective("draft_lv", "copies", "1", "2")),
    "DrTuneConfig.trained_steps": ("step", PRFL, [], *objective("drtune", "trained_steps", "1", "3")),
    "DrTuneConfig.spacing": (
        "step", PRFL, ["rollout.steps=6"], *objective("drtune", "trained_steps: 2, spacing", "even", "random"),
    ),
    "DrTuneConfig.early_stop": ("step", PRFL, [], *objective("drtune", "early_stop", "0.0", "0.9")),
    "LeapAlignConfig.alpha": ("step", PRFL, [], *objective("leapalign", "alpha", "0.0", "1.0")),
    "LeapAlignConfig.similarity_floor": ("step", PRFL, [], *objective("leapalign", "similarity_floor", "0.1", "null")),
    "InstructVideoConfig.start": ("step", PRFL, [CLIPS], *objective("instructvideo", "start", "0.25", "0.75")),
    "InstructVideoConfig.last_steps": ("step", PRFL, [CLIPS], *objective("instructvideo", "last_steps", "1", "2")),
    "InstructVideoConfig.temporal_decay": (
        "step", VADER, [CLIPS], *objective("instructvideo", "temporal_decay", "null", "1.0"),
    ),
    "DenseProcessConfig.rewards": ("step", PRFL, [], *objective("dense_process", "rewards", "1", "2")),
    "DenseProcessConfig.handoff": ("step", PRFL, [], *objective("dense_process", "handoff", "next", "clean")),
    "DenseProcessConfig.credit": ("step", PRFL, [], *objective("dense_process", "credit", "chain", "step")),
    "DenseProcessConfig.beta": ("step", PRFL, [], *objective("dense_process", "rewards: 2, beta", "0.0", "1.0")),
    "DenseProcessConfig.steps_range": (
        "step", PRFL, [], *objective("dense_process", "rewards: 1, steps_range", "[0, 0.25]", "[0.75, 1]"),
    ),
    "DataConfig.manifest": ("step", SFT, [], *sides("data.manifest", "manifest.jsonl", "fewer.jsonl")),
    "DataConfig.root": ("step", SFT, [], *sides("data.root", "null", "same-names")),
    "DataConfig.folder": (
        "prompts", SFT, ["data.manifest=null", "data.prompts={}"], *sides("data.folder", "texts", "texts/deep"),
    ),
    "DataConfig.held_out": (
        "prompts", SFT, ["data.manifest=null", "data.folder=texts", "data.prompts={}"],
        *sides("data.held_out", 0.0, 0.5),
    ),
    **{
        f"BucketConfig.{key}": (
            "step", SFT, ["data.frames=9"],  # which no clip fills
            *sides("data.buckets", *("[{frames: 5, height: 16, width: 16, fps: 8}]".replace(*each) for each in two)),
        )
        for key, two in {
            "frames": (("5", "5"), ("5", "1")), "height": (("h", "h"), ("height: 16", "height: 8")),
            "width": (("w", "w"), ("width: 16", "width: 8")), "fps": (("f", "f"), ("fps: 8", "fps: 16")),
        }.items()
    },
    "DataConfig.cache": ("cache", SFT, [], *sides("data.cache", "cache-one", "cache-two")),
    "DataConfig.frames": ("step", SFT, [], *sides("data.frames", 5, 1)),
    "DataConfig.height": ("step", SFT, [], *sides("data.height", 16, 8)),
    "DataConfig.width": ("step", SFT, [], *sides("data.width", 16, 8)),
    "DataConfig.fps": ("step", SFT, [], *sides("data.fps", 8.0, 4.0)),
    "DataConfig.skip_unreadable": (
        "step", SFT, ["data.manifest=broken.jsonl"], *sides("data.skip_unreadable", "false", "true"),
    ),
    "DataConfig.encode_batch": (
        "cache", SFT, [], ["data.encode_batch=1", "data.cache=by-one"], ["data.encode_batch=4", "data.cache=by-four"],
    ),
    "PromptsConfig.train": ("step", PRFL, [], *sides("data.prompts.train", "train.txt", "more.txt")),
    "PromptsConfig.validation": ("prompts", PRFL, [], *sides("data.prompts.validation", "validation.txt", "more.txt")),
    "PromptsConfig.test": ("prompts", PRFL, [], *sides("data.prompts.test", "test.txt", "more.txt")),
    "MixtureConfig.count": ("clips", SFT, SHAPES, *generator("shapes_mixture", "count", 1, 2)),
    "MixtureConfig.wrong": ("clips", SFT, SHAPES, *generator("shapes_mixture, count: 2", "wrong", 0.0, 1.0)),
    "MixtureConfig.unsteady": ("clips", SFT, SHAPES, *generator("shapes_mixture, count: 2", "unsteady", 0.0, 1.0)),
    "MixtureConfig.seed": ("clips", SFT, SHAPES, *generator("shapes_mixture, count: 1", "seed", 0, 1)),
    "CuratedConfig.count": ("clips", SFT, SHAPES, *generator("shapes_curated", "count", 1, 2)),
    "CuratedConfig.seed": ("clips", SFT, SHAPES, *generator("shapes_curated, count: 1", "seed", 0, 1)),
    "SamplesConfig.per_prompt": ("asked", SFT, SHAPES, *generator("shapes_samples, steps: 1", "per_prompt", 2, 3)),
    **{
        f"SamplesConfig.{key}": (
            "asked", SFT, SHAPES, *generator(f"{SAMPLES}{', steps: 1' * (key != 'steps')}", key, *two),
        )
        for key, two in {
            "held_out_per_prompt": (2, 3), "other_captions": (0, 1), "steps": (1, 2), "guidance": ("[1.0]", "[2.0]"),
            "batch": (1, 2), "seed": (0, 1),
        }.items()
    },
    "ClipsConfig.videos": ("asked", SFT, SHAPES, *generator("video_clips", "videos", "clips", "clips/0.mp4")),
    **{
        f"ClipsConfig.{key}": ("asked", SFT, SHAPES, *generator("video_clips, videos: clips", key, *two))
        for key, two in {
            "kinds": ("[blur]", "[noise]"), "crops": (1, 2), "held_out": (0.2, 0.5), "formats": ("[mp4]", "[gif]"),
            "seed": (0, 1),
        }.items()
    },
    **{
        f"TrainingConfig.{key}": ("loop", SFT, ["training.steps=4", *shared], *sides(f"training.{key}", *two))
        for key, shared, two in (
            ("batch", [], (2, 4)), ("accumulation", [], (1, 2)), ("learning_rate", [], (1e-3, 2e-3)),
            ("warmup", [], (0, 3)), ("schedule", [], ("constant", "cosine")), ("weight_decay", [], (0.0, 0.5)),
            ("betas", [], ("[0.9, 0.99]", "[0.5, 0.99]")), ("max_grad_norm", [], ("null", 1e-3)),
            ("ema_decay", [], ("null", 0.5)), ("save_every", ["training.keep=9"], (1, 2)), ("keep", [], (1, 2)),
            ("log_every", [], (1, 4)), ("trackers", [], ("[]", "[tensorboard]")),
        )
    },
    **STEERING_EFFECTS,
    "TrainingConfig.steps": ("loop", SFT, [], *sides("training.steps", 1, 2)),
    **{
        f"EvaluationConfig.{key}": ("sampled", SFT, [], *sides(f"evaluation.{key}", *two))
        for key, two in {"steps": (1, 2), "guidance_scale": (1.0, 3.0), "batch": (1, 2), "seed": (0, 1)}.items()
    },
    "EvaluationConfig.guidance_first_frame": (
        "sampled", SFT, ["evaluation.guidance_scale=3"], *sides("evaluation.guidance_first_frame", "null", 1.0),
    ),
    **{
        f"EvaluationConfig.{key}": ("watched", PRFL, shared, *sides(f"evaluation.{key}", *two))
        for key, shared, two in (
            ("every", [], (0, 1)),
            ("final_samples", [], (0, 1)),
            ("prompts_per_round", ["evaluation.every=1", "data.prompts.validation=more.txt"], (1, 2)),
            ("samples_per_prompt", ["evaluation.every=1"], (1, 2)),
            ("held_out_reward", ["evaluation.every=1"], ("null", "heads/second")),
            ("judge", ["evaluation.every=1"], ("null", "shapes")),
        )
    },
}  # fmt: skip

HACKED = "tests/evaluation/test_hacking.py::test_a_planted_hackable_reward_is_seen_and_ends_the_run"
PUBLIC = "tests/reward/test_public_rewards.py::"
CRITIC = "tests/reward/test_critic.py::"
OPEN_CLIP = f"{PUBLIC}test_open_clip_weights_give_open_clip_embeddings"
TOLD = "tests/factory/test_told.py::"
EXPERTS = "tests/factory/test_experts.py::"
SEVERAL = "tests/reward/test_several.py::"
VIDEOALIGN = "tests/reward/test_qwen_scores.py::test_converted_videoalign_scores_as_the_published_one"
HPSV3 = "tests/reward/test_qwen_scores.py::test_converted_hpsv3_scores_as_the_published_one"
MPS = "tests/reward/test_mps.py::test_score_is_that_of_its_equations"
OBJECT = f"{PUBLIC}test_an_unlikely_object_has_a_gradient_and_labels_are_by_name"
ACTION = f"{PUBLIC}test_action_is_the_log_probability_of_its_label"
COHERENCE = f"{PUBLIC}test_coherence_is_predicted_without_a_look_at_the_future"
REFUSED = {  # one of the two values: what is asked for is not to be had here
    "KernelsConfig.lora_linear", "KernelsConfig.qk_norm_rope", "KernelsConfig.gated_residual_norm",
    "BackboneConfig.kernels", "BackboneConfig.attention", "BackboneConfig.device", "DataConfig.fps",
    "DataConfig.skip_unreadable",
}  # fmt: skip
REASONS: dict[str, str] = {
    "Config.version": "one value is allowed",
    "DataConfig.follow_links": "tests/data/test_manifest.py::test_links_lead_out_where_the_user_says_so",
    "StagesConfig.version": "one value is allowed",
    "StagesConfig.stages": "tests/config/test_stages.py::test_a_later_stage_finds_an_earlier_run",
    "BackboneConfig.revision": "of a hub model: there is no network here",
    "PromptsConfig.first_frames": "tests/runs/test_first_frames.py",
    "WeightsConfig.transformer": "a file of others: tests/backbone/test_single_file.py",
    "WeightsConfig.transformer_2": "a file of others: tests/backbone/test_single_file.py",
    "WeightsConfig.unet": "a file of others: tests/factory/test_base_lora.py",
    "WeightsConfig.vae": "a file of others: tests/backbone/test_single_file.py",
    "BackboneConfig.pipeline": "of a model that serves two pipelines: tests/backbone/test_pinned_frame.py",
    "FirstFrameConfig.motion_bucket_id": f"{TOLD}test_a_config_says_what_the_network_is_told",
    "FirstFrameConfig.noise_aug_strength": f"{TOLD}test_a_config_says_what_the_network_is_told",
    "ExpertsConfig.train": f"{EXPERTS}test_one_expert_is_trained_alone",
    "ExpertsConfig.resident": "tests/factory/test_experts.py::test_one_expert_is_resident",
    "LoraOfEach.high": "files of others: tests/factory/test_experts_lora.py",
    "LoraOfEach.low": "files of others: tests/factory/test_experts_lora.py",
    "ScaleOfEach.high": f"{EXPERTS}test_the_chain_takes_the_low_experts_reward_to_the_high_one",
    "ScaleOfEach.low": f"{EXPERTS}test_samples_are_guided_by_each_experts_scale",
    "RateOfEach.high": f"{EXPERTS}test_each_expert_learns_at_its_rate",
    "RateOfEach.low": f"{EXPERTS}test_each_expert_learns_at_its_rate",
    "BackboneConfig.compile": "tests/backbone/test_kernels.py::test_compiled_blocks",
    "AestheticConfig.mlp": "tests/reward/test_aesthetic.py::test_value_is_that_of_the_plain_path",
    "AestheticConfig.clip": "tests/reward/test_aesthetic.py::test_value_is_that_of_the_plain_path",
    "AestheticConfig.revision": "of a hub CLIP: there is no network here",
    "ModelRewardConfig.model": "tests/reward/test_public_rewards.py::test_clip_score_is_that_of_transformers",
    "ModelRewardConfig.revision": "of a hub model: there is no network here",
    "FileRewardConfig.weights": OPEN_CLIP,
    "FileRewardConfig.tokenizer": OPEN_CLIP,
    "FileRewardConfig.revision": "of a hub tokenizer: there is no network here",
    "MpsConfig.aspect": MPS,
    "PixelRewardConfig.balance": f"{SEVERAL}test_balanced_gradient_is_that_of_its_equation",
    "PixelRewardConfig.latent": f"{SEVERAL}test_a_latent_reward_beside_a_pixel_one_adds_its_gradient",
    "VideoAlignConfig.model": VIDEOALIGN,
    "VideoAlignConfig.frames": "tests/reward/test_qwen_scores.py::test_how_many_frames_videoalign_reads",
    "VideoAlignConfig.dtype": VIDEOALIGN,
    "Hpsv3Config.model": HPSV3,
    "Hpsv3Config.dtype": HPSV3,
    "ObjectConfig.present": OBJECT,
    "ObjectConfig.absent": OBJECT,
    "ActionConfig.label": ACTION,
    "CoherenceConfig.frames": COHERENCE,
    "CriticConfig.questions": f"{CRITIC}test_all_questions_on_one_vision_pass_are_those_of_stock_passes_one_by_one",
    "CriticConfig.frames": f"{CRITIC}test_all_questions_on_one_vision_pass_are_those_of_stock_passes_one_by_one",
    "CriticConfig.most_pixels": "tests/reward/test_qwen_look.py::test_sizes_and_frames_that_patches_do_not_divide",
    "CriticConfig.dtype": f"{CRITIC}test_loads_a_saved_model_and_refuses_others",
    "CallableConfig.function": "tests/reward/test_own_function.py::test_functions_and_classes",
    "CallableConfig.differentiable": "tests/reward/test_own_function.py::test_a_gradient_method_refuses_a_judge",
    "CallableConfig.options": "tests/reward/test_own_function.py::test_functions_and_classes",
    "RolloutConfig.drift_limit": "tests/objective/test_reuse.py::test_drift_above_the_limit_ends_the_use_of_a_rollout",
    "SamplesConfig.policies": "tests/factory/test_samples.py::test_base_and_policy_draw_one_training_set",
    "TrainingConfig.timeout": "tests/training/test_processes.py::test_a_killed_process_ends_the_run_with_a_message",
    "EvaluationConfig.stop_on_hacking": HACKED,
    "LatSearchConfig.spread": "tests/steering/test_methods.py::"
    "test_latsearch_begins_around_one_noise_and_keeps_the_highest_total",
    "FkConfig.potential": "tests/steering/test_methods.py::test_fk_draws_the_tilted_distribution",
    "EvaluationConfig.keep_best": "tests/runs/test_lasting.py::test_the_best_round_is_kept_and_patience_ends_the_run",
    "EvaluationConfig.patience": "tests/runs/test_lasting.py::test_the_best_round_is_kept_and_patience_ends_the_run",
}
