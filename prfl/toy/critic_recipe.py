"""Trains the critic inside the package: a small Qwen3-VL that answers questions about moving shapes.

    python -m prfl.toy.critic_recipe FOLDER

It learns from rendered clips, and from clips that the shapes world's VAE decodes from noisy and mixed latents; the
oracle answers.  It sees no sample of the generator.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prfl.backbone.base import Backbone
from prfl.backbone.families import load_backbone
from prfl.reward.critic import CriticReward
from prfl.reward.questions import Question
from prfl.toy import oracle, questions, renderer
from prfl.toy.clips import CLIP, model_folder
from prfl.toy.recipe import cosine, say

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
           "<|image_pad|>")  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
FRAMES = 4  # that it sees of a clip: 0, 5, 11 and 16, in two groups
GAP = 5  # frames between the two of a group
SECONDS = (CLIP.frames - 1) / CLIP.fps
WIDTH = 64
MOST_NOISE = 0.6  # on the latents, whose own deviation is 1


@dataclass(frozen=True)
class Lesson:
    """A question about one of the videos of a batch, with its right answer."""

    video: int
    ask: str
    answer: str


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words; the time of a group of frames is one token."""
    texts = ["user assistant yes no ? .", questions.DESCRIBE, questions.UNCLEAR, *questions.STEADY.values()]
    texts += [*questions.YES_OR_NO.values(), *questions.FREE.values(), "and"]
    texts += [attributes.caption for attributes in renderer.all_attributes()]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)} - {"{}", "{}?"})
    stamps = [f"<{tenth / 10:.1f} seconds>" for tenth in range(round(SECONDS * 10) + 1)]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in stamps])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=CHAT
    )


def new_network(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=ids["<|endoftext|>"],
        rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_heads=4, patch_size=8, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=WIDTH, num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def new_critic(seed: int = 0) -> CriticReward:
    tokenizer = new_tokenizer()
    network = new_network(tokenizer, seed)
    return CriticReward(network, tokenizer, questions.all_questions(), frames=FRAMES, seconds=SECONDS)


# -------------------------------------------------------------------------------------------------------- the videos


def rendered(seed: int, index: int, count: int) -> Tensor:
    """Draw clips of random captions, two in five with a flaw."""
    captions = [attributes.caption for attributes in renderer.all_attributes()]
    return renderer.render(renderer.sample_scenes(seed, index, count, captions, unsteady=0.4))


@torch.no_grad()
def decoded(model: Backbone, seed: int, index: int, count: int) -> Tensor:
    """Decode clips from noisy latents, a third of them mixed from two: pictures as a generator's may be."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    latents = model.encode(rendered(seed, index, count))
    share = torch.rand(count, 1, 1, 1, 1, generator=generator) * 0.5
    share *= torch.rand(share.shape, generator=generator) < 1 / 3
    latents = (1 - share) * latents + share * latents.roll(1, 0)
    noise = torch.rand(count, 1, 1, 1, 1, generator=generator) * MOST_NOISE
    latents = latents + noise * torch.randn(latents.shape, generator=generator)
    return model.decode(latents).clamp(-1, 1)


def measured(pixels: Tensor) -> list[dict[str, str]]:
    """Return the oracle's answers about each video."""
    verdicts = oracle.measure(pixels)
    return [questions.answers(verdicts, video) for video in range(len(pixels))]


# ------------------------------------------------------------------------------------------------------- the lessons


def lessons(answers: Sequence[dict[str, str]], each: int, rng: random.Random, closed: int = 1) -> list[Lesson]:
    """Draw so many questions of each video; of the first ``closed`` the answer is yes or no, and each as often."""
    drawn = []
    for video, named in enumerate(answers):
        for number in range(each):
            name = rng.choice((*oracle.DIMENSIONS, "all"))
            if name == "all":
                drawn.append(Lesson(video, questions.DESCRIBE, questions.described(named)))
            elif number < closed and name == "steadiness":
                yes = named[name] == questions.STEADY[True]
                drawn.append(Lesson(video, questions.YES_OR_NO[name], "yes" if yes else "no"))
            elif number < closed:
                drawn.append(yes_or_no(video, name, named[name], rng))
            else:
                drawn.append(Lesson(video, questions.FREE[name], named[name]))
    return drawn


def descriptions(answers: Sequence[dict[str, str]]) -> list[Lesson]:
    """Ask for a description of each video: one sentence says all that there is, and teaches most."""
    return [Lesson(video, questions.DESCRIBE, questions.described(named)) for video, named in enumerate(answers)]


def yes_or_no(video: int, name: str, value: str, rng: random.Random) -> Lesson:
    """Ask of an attribute's value: of the right one, where there is one, as often as of another."""
    others = [other for other in renderer.ATTRIBUTES[name] if other != value]
    right = value != questions.UNCLEAR and rng.random() < 0.5
    asked = value if right else rng.choice(others)
    return Lesson(video, questions.YES_OR_NO[name].format(asked), "yes" if right else "no")


def lesson_logits(critic: CriticReward, pixels: Tensor, drawn: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
    """Return logits (n, length, words) and the answers' tokens (n, length), -100 elsewhere.

    Shorter sequences are filled up behind, where no token before looks.
    """
    chosen = critic.chosen(pixels.shape[2])
    seconds = [frame / (pixels.shape[2] - 1) * SECONDS for frame in chosen]
    values, grid = critic.look.seen(pixels[:, :, chosen])
    features = critic.watched(values, grid)

    asks = [[Question(lesson.answer, lesson.ask, lesson.answer)] for lesson in drawn]
    texts = critic.tokens_of(asks, features[0].shape[1], seconds)
    tokens = [item.tokens for (item,) in texts]
    answers = [critic.chat.encode(lesson.answer) for lesson in drawn]
    longest = max(len(before) + len(answer) for before, answer in zip(tokens, answers, strict=True))
    ids, targets = (torch.full((len(drawn), longest), fill) for fill in (0, -100))
    for row, (before, answer) in enumerate(zip(tokens, answers, strict=True)):
        end = len(before) + len(answer)
        ids[row, :end] = torch.tensor([*before, *answer])
        targets[row, len(before) - 1 : end - 1] = torch.tensor(answer)

    rows = torch.tensor([lesson.video for lesson in drawn])
    logits = critic.continued(ids, grid[rows], seconds, [each[rows] for each in features])
    return logits, targets


def lesson_loss(critic: CriticReward, pixels: Tensor, drawn: Sequence[Lesson]) -> Tensor:
    """Average the negative log-probability of the answers' tokens, first over an answer's, then over answers."""
    logits, targets = lesson_logits(critic, pixels, drawn)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (losses.sum(1) / (targets != -100).sum(1)).mean()


@torch.no_grad()
def examined(critic: CriticReward, pixels: Tensor, seed: int = 0, batch: int = 32) -> dict[str, float]:
    """Measure the share of right answers by the kind of question: ``free/colour``, ``yes or no/colour``.

    A free answer is right where its likeliest token is the oracle's word.  Of yes or no: one question about a value
    that the oracle finds, where it finds one, and one about another.
    """
    rng, right = random.Random(seed), dict[str, list[bool]]()
    for part in pixels.split(batch):
        named, drawn, kinds = measured(part), list[Lesson](), list[str]()
        for video, answers in enumerate(named):
            for name, value in answers.items():
                drawn.append(Lesson(video, questions.FREE[name], value))
                kinds.append(f"free/{name}")
                for lesson in both_ways(video, name, value, rng):
                    drawn.append(lesson)
                    kinds.append(f"yes or no/{name}")
        logits, targets = lesson_logits(critic, part, drawn)
        hit = (logits.argmax(2) == targets)[targets != -100]
        for kind, good in zip(kinds, hit.tolist(), strict=True):
            right.setdefault(kind, []).append(good)
    return {kind: sum(each) / len(each) for kind, each in sorted(right.items())}


def both_ways(video: int, name: str, value: str, rng: random.Random) -> list[Lesson]:
    """Ask by yes or no of the value that the oracle finds, and of another; of steadiness there is one question."""
    if name == "steadiness":
        return [Lesson(video, questions.YES_OR_NO[name], "yes" if value == questions.STEADY[True] else "no")]
    other = rng.choice([each for each in renderer.ATTRIBUTES[name] if each != value])
    asked = [(other, "no")] + ([(value, "yes")] if value != questions.UNCLEAR else [])
    return [Lesson(video, questions.YES_OR_NO[name].format(each), answer) for each, answer in asked]


# ------------------------------------------------------------------------------------------------------- the training


def train_tower(critic: CriticReward, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    """Teach the vision tower alone to see: shape, colour, where the shape is, how far it moves between two frames.

    Without it the tower stays blind to all but colour for long: one word a question says little of a picture.  The
    heads, which are dropped, read the mean of the tokens, as attention over them does.
    """
    step_frames = critic.look.step
    heads = torch.nn.Linear(WIDTH, len(renderer.SHAPES) + len(renderer.COLOURS) + 2 * step_frames + 2)
    trained = [*critic.network.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    captions = [attributes.caption for attributes in renderer.all_attributes()]
    for step in range(steps):
        scenes = renderer.sample_scenes(seed + 5000, step, batch, captions, unsteady=0.4)
        clips = renderer.render(scenes)
        first = step % (clips.shape[2] - GAP)
        frames = clips[:, :, [first, first + GAP]]

        # Where the shape is in each frame, as the middle of what is not background; from -1 to 1.
        strength = (frames / 2 + 0.5 - renderer.BACKGROUND).norm(dim=1)
        line = torch.linspace(-1, 1, renderer.SIZE)
        mass = strength.sum((2, 3))
        places = torch.stack([(strength.sum(2) * line).sum(2) / mass, (strength.sum(3) * line).sum(2) / mass], dim=2)

        (tokens, *_) = critic.watched(*critic.look.seen(frames + 0.05 * torch.randn_like(frames)))
        shapes, colours, where, moved = heads(tokens.mean(1)).split([3, 6, 2 * step_frames, 2], dim=1)
        names = [(renderer.SHAPES.index(s.drawn.shape), list(renderer.COLOURS).index(s.drawn.colour)) for s in scenes]
        shape, colour = torch.tensor(names).T
        loss = F.cross_entropy(shapes, shape) + F.cross_entropy(colours, colour)
        loss = loss + 10 * F.mse_loss(where, places.flatten(1))
        loss = loss + 2 * F.mse_loss(moved, 8 * (places[:, 1] - places[:, 0]))

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            right = (shapes.argmax(1) == shape).float().mean()
            off = F.l1_loss(where, places.flatten(1)) * renderer.SIZE / 2
            say(f"tower step {step + 1}: loss {loss:.3f}, shapes right {right:.2f}, off by {off:.2f} px")


@dataclass(frozen=True)
class Round:
    """steps: of so many videos.  described, free_until: shares of the steps with descriptions alone (of twice as many
    videos), and without questions of yes or no.  closed: of three questions, those of yes or no behind that."""

    steps: int
    learning_rate: float
    described: float
    free_until: float
    closed: int


ROUNDS = (Round(600, 3e-3, 0.25, 0.5, 1), Round(800, 2e-3, 0.0, 0.0, 2))
BATCH, EACH, POOL, TOWER_STEPS = 16, 3, 128, 450


def learn(critic: CriticReward, round_: Round, clips: Tensor, seed: int) -> None:
    """Train all of a critic on fresh clips and on those of the pool, half and half."""
    network, answered = critic.network, measured(clips)
    tower = list(network.model.visual.parameters())
    words = [weights for name, weights in network.named_parameters() if ".visual." not in name]
    rate, steps = round_.learning_rate, round_.steps
    groups = [{"params": tower, "lr": 0.3 * rate}, {"params": words, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, warmup=30))
    rng, total = random.Random(seed), 0.0
    for step in range(steps):
        describing = step < steps * round_.described
        count = 2 * BATCH if describing else BATCH
        fresh = rendered(seed + 4000, step, count // 2)
        kept = rng.sample(range(len(clips)), count - len(fresh))
        pixels = torch.cat([fresh, clips[kept]])
        answers = measured(fresh) + [answered[index] for index in kept]
        closed = 0 if step < steps * round_.free_until else round_.closed
        drawn = descriptions(answers) if describing else lessons(answers, EACH, rng, closed)

        loss = lesson_loss(critic, pixels, drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % 100 == 99 or step == steps - 1:
            say(f"step {step + 1}: loss {total / (step % 100 + 1):.4f}")
            marks, total = examined(critic, rendered(9000, 0, 32)), 0.0
            say(", ".join(f"{kind} {share:.2f}" for kind, share in marks.items()))


def train(folder: Path, begun: Path | None = None, seed: int = 0) -> None:
    """Train a critic and save it with its tokenizer.  begun: one behind the first round, saved before."""
    critic = new_critic(seed)
    network = critic.network.requires_grad_(True).train()
    say(f"{sum(weights.numel() for weights in network.parameters()):,} parameters")
    if begun is None:
        train_tower(critic, TOWER_STEPS, batch=32, learning_rate=ROUNDS[0].learning_rate, seed=seed)
    else:
        saved = Qwen3VLForConditionalGeneration.from_pretrained(begun, use_safetensors=True)
        network.load_state_dict(saved.state_dict())
    model = load_backbone(model_folder())
    clips = torch.cat([decoded(model, seed + 3000, index, 32) for index in range(POOL // 32)])
    say(f"{len(clips)} decoded clips")
    critic.chat.tokenizer.save_pretrained(folder)
    for number, each in enumerate(ROUNDS[1 if begun else 0 :]):
        learn(critic, each, clips, seed + number + bool(begun))
        network.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--begun", type=Path, metavar="FOLDER", help="go on with what the first round saved")
    options = parser.parse_args()
    train(options.folder, options.begun)
