"""Rewards that see what is in a video: objects (YOLOS), an action (VideoMAE), a coherent course (V-JEPA 2).

None of them reads the prompt: labels are named in the config, for prompts that all ask for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VJEPA2Config,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
)

from prfl.backbone.condition import Condition
from prfl.reward.look import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Look,
    computed_again,
    each_frame,
    evenly_spaced,
    frames_of,
    seen,
)
from prfl.reward.public import FrozenReward, load_network
from prfl.reward.scores import Scores
from prfl.utils.errors import PrflError
from prfl.utils.text import did_you_mean


def label_number(label: str, names: Mapping[int, str], where: str) -> int:
    """Return the number of a class by its name, blind to case.  Raises PrflError where there is none."""
    numbers = {name.lower(): number for number, name in names.items()}
    if label.lower() not in numbers:
        fix = did_you_mean(label, list(names.values())[:1000])[:400]
        raise PrflError(f"the model knows no '{label}'", where=where, fix=fix)
    return numbers[label.lower()]


class ObjectReward(FrozenReward):
    """``reward(pixels, condition)`` gives {label: (b,)}: how surely each object is in the frames, or is not.

    present: log of the sum over all detections of p(label), the mean over frames; it has a gradient however unlikely
    the object is (VADER's threshold has none below 0.2).  absent: log(1 - the largest p), named ``no LABEL``.
    Frames keep their proportions, as YOLOS's own processor leaves them.
    """

    frames_at_once = 1  # of 768 x 1328: gigabytes of activations each

    def __init__(self, network: YolosForObjectDetection, present: Sequence[str], absent: Sequence[str] = ()) -> None:
        super().__init__([*present, *(f"no {label}" for label in absent)], network)
        names = network.config.id2label
        self.present = [label_number(label, names, "reward.object.present") for label in present]
        self.absent = [label_number(label, names, "reward.object.absent") for label in absent]
        self.look = Look(min(network.config.image_size), "whole", "bilinear", IMAGENET_MEAN, IMAGENET_STD)
        self.network = network

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  condition, times: not read."""
        scores = each_frame(self.score_frames, frames_of(pixels), frames_at_once=self.frames_at_once)
        return dict(zip(self.dimensions, scores.unflatten(0, (len(pixels), -1)).mean(1).unbind(1), strict=True))

    def score_frames(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n labels"]:
        dtype = next(self.network.parameters()).dtype
        log_p = self.network(pixel_values=seen(frames.to(dtype), self.look)).logits.log_softmax(2)  # (n, detections, k)
        scores = [log_p[..., number].logsumexp(1) for number in self.present]
        scores += [torch.log1p(-log_p[..., number].exp().amax(1)) for number in self.absent]
        return torch.stack(scores, dim=1)


def load_object(
    model: str,
    present: Sequence[str],
    absent: Sequence[str] = (),
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> ObjectReward:
    """Load a YOLOS from a folder or hub id.  Raises PrflError, also for a label that it does not know."""
    network = load_network(YolosForObjectDetection, model, revision, "hustvl/yolos-tiny")
    return ObjectReward(network, present, absent).to(device)


class ActionReward(FrozenReward):
    """``reward(pixels, condition)`` gives {"action": (b,)}: log p(the action), from frames over the whole video."""

    frames_at_once = None  # one network reads all of a video's frames together

    def __init__(self, network: VideoMAEForVideoClassification, label: str) -> None:
        super().__init__(("action",), network)
        self.number = label_number(label, network.config.id2label, "reward.action.label")
        self.look = Look(network.config.image_size, "crop", "bilinear", IMAGENET_MEAN, IMAGENET_STD)
        self.network = network

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  condition, times: not read."""
        chosen = pixels[:, :, evenly_spaced(pixels.shape[2], self.network.config.num_frames)]
        frames = seen(frames_of(chosen).to(next(self.network.parameters()).dtype), self.look)
        logits = computed_again(self.network, frames.unflatten(0, (len(pixels), -1))).logits
        return {"action": logits.log_softmax(1)[:, self.number]}


def load_action(
    model: str, label: str, revision: str | None = None, device: torch.device | str = "cpu"
) -> ActionReward:
    """Load a VideoMAE from a folder or hub id.  Raises PrflError, also for a label that it does not know."""
    example = "MCG-NJU/videomae-base-finetuned-kinetics"
    return ActionReward(load_network(VideoMAEForVideoClassification, model, revision, example), label).to(device)


class CoherenceReward(FrozenReward):
    """``reward(pixels, condition)`` gives {"coherence": (b,)}: how well the second half follows from the first.

    V-JEPA 2 predicts the features of the second half of ``frames`` evenly spaced frames from those of the first half;
    the score is less the mean absolute difference to the true features.  The first half is encoded alone: transformers'
    own masking encodes the whole video and hides features afterwards, so the future would leak into the prediction.
    A still video is coherent: follow it beside a reward that asks for motion.
    """

    frames_at_once = None

    def __init__(self, network: VJEPA2Model, frames: int = 16) -> None:
        super().__init__(("coherence",), network)
        together = network.config.tubelet_size
        if frames % (2 * together):
            fix = f"a multiple of {2 * together}"
            raise PrflError(
                f"{frames} frames are not two halves of {together} each", where="reward.coherence.frames", fix=fix
            )
        size = network.config.crop_size
        short = int(size * 256 / 224)  # as V-JEPA 2's own processor
        self.look = Look(size, "crop", "bilinear", IMAGENET_MEAN, IMAGENET_STD, short)
        self.network, self.frames = network, frames

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  condition, times: not read."""
        chosen = pixels[:, :, evenly_spaced(pixels.shape[2], self.frames)]
        frames = seen(frames_of(chosen).to(next(self.network.parameters()).dtype), self.look)
        return {"coherence": computed_again(self.surprise, frames.unflatten(0, (len(pixels), -1))).neg()}

    def surprise(self, frames: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, " b"]:
        """Return the mean absolute difference of predicted and true features of the second half."""
        settings = self.network.config
        half = frames.shape[1] // 2
        tokens = half // settings.tubelet_size * (settings.crop_size // settings.patch_size) ** 2  # of one half

        context = self.network.encoder(pixel_values_videos=frames[:, :half]).last_hidden_state
        future = self.network.encoder(pixel_values_videos=frames).last_hidden_state[:, tokens:]
        if frames.is_meta:  # the predictor looks into its masks; beside the encoder it is small
            return (context - future).abs().mean((1, 2))
        places = torch.arange(2 * tokens, device=frames.device).expand(len(frames), -1)
        predicted = self.network.predictor(
            encoder_hidden_states=F.pad(context, (0, 0, 0, tokens)),  # it takes the context's by their places
            context_mask=[places[:, :tokens]],
            target_mask=[places[:, tokens:]],
        ).last_hidden_state
        return (predicted - future).abs().mean((1, 2))


def load_coherence(
    model: str, frames: int = 16, revision: str | None = None, device: torch.device | str = "cpu"
) -> CoherenceReward:
    """Load a V-JEPA 2 from a folder or hub id.  Raises PrflError."""
    return CoherenceReward(load_network(VJEPA2Model, model, revision, "facebook/vjepa2-vitl-fpc64-256"), frames).to(
        device
    )


def untrained_object() -> ObjectReward:
    """Build one of YOLOS-base's size, whose bytes are counted on ``meta``."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = YolosConfig(**sizes, image_size=[800, 1344], num_detection_tokens=100, num_labels=91)
    return ObjectReward(YolosForObjectDetection(config), [config.id2label[0]])


def untrained_action() -> ActionReward:
    """Build one of VideoMAE-base's size, whose bytes are counted on ``meta``."""
    config = VideoMAEConfig(num_labels=400)
    return ActionReward(VideoMAEForVideoClassification(config), config.id2label[0])


def untrained_coherence() -> CoherenceReward:
    """Build one of V-JEPA 2's size L, whose bytes are counted on ``meta``."""
    return CoherenceReward(VJEPA2Model(VJEPA2Config(crop_size=256, frames_per_clip=64)))
