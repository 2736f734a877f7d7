"""A reward that the user wrote: a function of pixels and prompts, tried on a small clip before the first step.

    def sharpness(pixels, prompts, **options):        # pixels (b, 3, f, h, w) in [0, 1], prompts a list of b texts
        return pixels.diff(dim=-1).abs().mean((1, 2, 3, 4))         # (b,), or a dictionary of several such scores

A class is called with its options and ``device``, once; what it returns is called with pixels and prompts.

One that is said not to be differentiable is asked for scores alone, and may use numpy or any other package: it is for
judges, and for steering that needs no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.config.own_code import import_function
from prfl.reward.look import soft_clamp
from prfl.reward.public import FrozenReward
from prfl.reward.scores import Scores
from prfl.utils.console import warn
from prfl.utils.errors import PrflError

KEY = "reward.callable"
TRIED = (2, 3, 5, 32, 32)  # the clip that a function is tried on
STEP = 1e-2  # of the finite difference; its sign alone is compared


class OwnReward(FrozenReward):
    """``reward(pixels, condition)`` gives the function's scores, each (b,), by name.

    name: of the score of a function that returns one tensor.  where: the yaml path of its section.
    Raises PrflError where a trial on a small clip shows that it cannot be followed: another shape, numbers that are not
    finite, no gradient.
    """

    frames_at_once = None

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: torch.device | str = "cpu",
        differentiable: bool = True,
        where: str = KEY,
    ) -> None:
        super().__init__((name,))
        self.name, self.function, self.differentiable = name, function, differentiable
        self.where = f"{where}.function"
        self.dimensions = tuple(self.try_out(device))

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read."""
        return self.scores(pixels, [ask.prompt for ask in condition.asks])

    def scores(self, pixels: Float[Tensor, "b 3 f h w"], prompts: list[str]) -> Scores:
        """Call the function on pixels in [0, 1].  Raises PrflError for a result of another kind or shape."""
        with nullcontext() if self.differentiable else torch.no_grad():
            result = self.function(soft_clamp(pixels / 2 + 0.5), prompts)
        scores = dict(result) if isinstance(result, Mapping) else {self.name: result}
        for name, values in scores.items():
            if not isinstance(values, Tensor) or values.shape != (len(pixels),):
                kind = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                fix = "return a tensor with one score for each video, or a dictionary of such"
                raise PrflError(f"'{name}' is {kind} for {len(pixels)} videos", where=self.where, fix=fix)
        return {
            name: values.to(torch.float32) if values.dtype.itemsize < 4 else values for name, values in scores.items()
        }

    def try_out(self, device: torch.device | str) -> Scores:
        """Score a small clip, and compare the sign of the gradient with that of a finite difference."""
        generator = torch.Generator().manual_seed(0)
        pixels = (torch.rand(TRIED, generator=generator) * 1.2 - 0.6).to(device).requires_grad_()
        prompts = ["a dog runs", "a cat sleeps"]
        try:
            scores = self.scores(pixels, prompts)
            total = torch.stack([values.sum() for values in scores.values()]).sum()
            (gradient,) = torch.autograd.grad(total, pixels, allow_unused=True) if total.requires_grad else (None,)
        except PrflError:
            raise
        except Exception as error:  # whatever a stranger's function raises
            what = f"it fails on a clip of {TRIED[2]} frames, {TRIED[3]} x {TRIED[4]}: {type(error).__name__}: {error}"
            raise PrflError(what, where=self.where, fix="call it by hand on torch.rand(2, 3, 5, 32, 32)") from error

        if not all(values.isfinite().all() for values in scores.values()):
            raise PrflError("its scores are not finite", where=self.where, fix="call it on torch.rand(2, 3, 5, 32, 32)")
        if not self.differentiable:
            return scores
        if gradient is None or not gradient.isfinite().all() or not gradient.abs().amax() > 0:
            what = "no gradient comes back to the pixels" if gradient is None else "its gradient is zero, or not finite"
            fix = "use torch's own operations throughout: no numpy, no .detach(), no rounding or thresholds"
            raise PrflError(what, where=self.where, fix=fix)
        self._check_sign(pixels.detach(), prompts, gradient)
        return scores

    @torch.no_grad()
    def _check_sign(self, pixels: Tensor, prompts: list[str], gradient: Tensor) -> None:
        """Warn where a small step along the gradient lowers the scores."""
        direction = gradient / gradient.abs().amax()
        up, down = (
            sum(values.double().sum() for values in self.scores(pixels + sign * STEP * direction, prompts).values())
            for sign in (1, -1)
        )
        if not up > down:
            warn(f"{self.where}: a step of {STEP:g} along its gradient does not raise it ({float(up - down):.3g})")


def load_own(
    function: str,
    options: Mapping[str, Any] | None = None,
    differentiable: bool = True,
    device: torch.device | str = "cpu",
    where: str = KEY,
) -> OwnReward:
    """Import a function, or make an object of a class, and try it out.  Raises PrflError.

    function: ``module:name``, or the name of an entry point.  options: keyword arguments.
    where: the yaml path of its section.
    """
    key = f"{where}.function"
    try:
        imported = import_function(function)
    except Exception as error:  # whatever a stranger's module raises
        fix = "give module:function, with the module in the current folder or installed"
        raise PrflError(f"cannot be imported: {type(error).__name__}: {error}", where=key, fix=fix) from error

    options = dict(options or {})
    name = function.rpartition(":")[2]
    make: Callable[..., Any] = imported
    if inspect.isclass(imported):
        try:
            return OwnReward(name, make(device=device, **options), device, differentiable, where)
        except TypeError as error:
            fix = "its __init__ takes device and the options by name, its __call__ pixels and prompts"
            raise PrflError(f"cannot be made: {error}", where=key, fix=fix) from error
    return OwnReward(name, lambda pixels, prompts: imported(pixels, prompts, **options), device, differentiable, where)


class Unread(OwnReward):
    """What stands for a user's function where memory is counted: nobody knows what it keeps."""

    def __init__(self) -> None:
        FrozenReward.__init__(self, ("own",))

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        return {"own": pixels.mean((1, 2, 3, 4))}

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())
