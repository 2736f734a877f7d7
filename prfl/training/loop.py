"""The loop: ``fit`` (when to log, save, evaluate), ``train_step`` (which objectives), ``update`` (one optimizer step).

It sees an objective, never a reward, a rollout or a backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from prfl.backbone.weights import hold_their_own
from prfl.config.sections.training import TrainingConfig
from prfl.objective import Objective, Stateful
from prfl.training import guards
from prfl.training.checkpoint import (
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_name,
    tidy,
)
from prfl.training.distributed import make_accelerator
from prfl.training.ema import Ema
from prfl.training.learning import Learning, Watched
from prfl.training.logger import Logger
from prfl.training.metrics import average_metrics, peak_gib, reset_peak
from prfl.training.optimizer import adamw, apply, average_gradients, clip_gradients, learning_rate
from prfl.training.regulariser import Regulariser
from prfl.training.run_folder import RunFolder, drop_metrics_after, read_metrics
from prfl.training.signals import StopSignals
from prfl.utils import processes, rng
from prfl.utils.errors import GuardError, PrflError
from prfl.utils.lock import folder_lock
from prfl.utils.streams import lossy_output
from prfl.utils.timing import Clock


@dataclass(frozen=True)
class Hook:
    """A function that runs every ``every`` steps, at the last step, and (``at_start``) before the first.

    call: gets the number of finished steps, and returns metrics of held-out prompts to log.  It runs with the EMA
    weights if there are any, and on every process; all processes go on together.
    """

    every: int
    call: Callable[[int], Mapping[str, float]]
    at_start: bool = False

    def due(self, step: int, steps: int) -> bool:
        return self.at_start if step == 0 else step % self.every == 0 or step == steps


@dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls beside its steps.

    enough: called after the hooks of each step; True ends the run there.  It answers the same on every process.
    finish: a hook for the end of the run, after the last checkpoint; it may put other weights into the model.
    set_aside: moves aside what an earlier training left in the run folder, so that it cannot pass for this run's.
    Called on the main process with (0, True) when the run starts anew, and with (finished steps, False) before the
    first step that is taken here.
    """

    hooks: Sequence[Hook] = ()
    enough: Callable[[], bool] | None = None
    finish: Callable[[int], Mapping[str, float]] | None = None
    set_aside: Callable[[int, bool], object] | None = None


@dataclass(frozen=True)
class Resumption:
    """Where a run starts, and which facts must not have changed.

    start: ``auto`` (the run's last checkpoint, else anew), ``none`` (anew; what lies there is moved aside), or a path.
    identity: JSON-able facts that must be the same when the run is resumed: the config without keys that may change.
    former: facts that checkpoints of older versions store in place of some of ``identity``.
    """

    start: str = "auto"
    identity: Mapping[str, Any] = field(default_factory=dict)
    former: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """step: finished steps.  stopped: the signal that ended the run early, or None.  checkpoint: the last one."""

    step: int
    stopped: str | None
    checkpoint: Path | None


@dataclass(frozen=True)
class Trainer:
    """The parts of a run that do not change while it trains."""

    objective: Objective
    settings: TrainingConfig
    run: RunFolder
    accelerator: Accelerator
    regulariser: Regulariser | None
    seed: int
    group_of: Callable[[str], str] = lambda name: ""


def fit(
    objective: Objective,
    settings: TrainingConfig,
    run: RunFolder,
    *,
    seed: int = 0,
    regulariser: Regulariser | None = None,
    accelerator: Accelerator | None = None,
    callbacks: Callbacks | None = None,
    resumption: Resumption | None = None,
    watched: Watched | None = None,
    group_of: Callable[[str], str] = lambda name: "",
) -> TrainResult:
    """Train ``objective.parameters()`` in place for ``settings.steps`` steps.

    watched: weights that must not change during the training, and weights that must (learning.py).
    group_of: maps a parameter's name to its entry of ``settings.rates``, the learning rates.
    On Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 the step is finished (an evaluation is left at once), a checkpoint is saved,
    and the function returns.  On any other error it saves if it can, says what it saved, and raises the error again;
    when a guard stops the run, nothing is saved.
    Raises PrflError from guards.py and checkpoint.py; a run that is refused before its first step writes nothing.
    """
    accelerator = accelerator or make_accelerator(run, trackers=settings.trackers)
    callbacks, resumption = callbacks or Callbacks(), resumption or Resumption()
    hooks, enough, finish, set_aside = callbacks.hooks, callbacks.enough, callbacks.finish, callbacks.set_aside
    trainer = Trainer(objective, settings, run, accelerator, regulariser, seed, group_of)
    log = Logger(run, accelerator, every=settings.log_every, steps=settings.steps)

    with lossy_output(), folder_lock(run.path) as lock:
        state, checkpoint = prepare(trainer, resumption, log, set_aside)
        learning = Learning(state.parameters, watched or Watched(), log.warn, settings.learning_rate)
        learning.recall(processes.gather(read_metrics(run.metrics) if accelerator.is_main_process else [])[0])

        with StopSignals() as stop, log, saved_on_the_way_out(trainer, state, stop, log):
            run_hooks(hooks, state, trainer, log, stop)
            stopped = stop.anywhere(accelerator)
            while state.step < settings.steps and not stopped and not (enough and enough()):
                if set_aside and state.step == log.start and accelerator.is_main_process:
                    set_aside(state.step, False)

                # One step, and the checks of whether it learns.
                metrics = train_step(trainer, state)
                lock.check()
                log.step(state.step, metrics)
                learning.after_step(state.step, metrics)

                # A checkpoint if one is due, then the hooks; a signal ends the run after either.
                if state.step % settings.save_every == 0 or state.step == settings.steps or learning.stuck:
                    checkpoint = save(trainer, state, stop, learning)
                    learning.check_stuck(state.step, str(checkpoint))
                stopped = stop.anywhere(accelerator)
                if not stopped:
                    run_hooks(hooks, state, trainer, log, stop)
                    stopped = stop.anywhere(accelerator)

            # The end: always a checkpoint; ``finish`` only if no signal ended the run.
            if stopped or checkpoint is None or checkpoint.name != step_name(state.step):  # else it is saved
                checkpoint = save(trainer, state, stop, learning)
            if not stopped:
                learning.at_end(state.step)
            if finish and not stopped:
                run_hooks([Hook(1, finish, at_start=True)], state, trainer, log, stop)
                stopped = stop.anywhere(accelerator)
            if stopped:
                log.say(f"{stopped}: stopped after step {state.step}, saved {checkpoint}")
    return TrainResult(state.step, stopped, checkpoint)


def prepare(
    trainer: Trainer, resumption: Resumption, log: Logger, set_aside: Callable[[int, bool], object] | None
) -> tuple[TrainState, Path | None]:
    """Return the state to start from, and the checkpoint that it was loaded from; None if the run starts anew.

    The run folder is written to only after every check has passed.
    """
    objective, settings, run, accelerator = trainer.objective, trainer.settings, trainer.run, trainer.accelerator
    parameters = objective.parameters()
    guards.check_trainable(parameters)
    if trainer.regulariser:
        guards.check_same_parameters(parameters, trainer.regulariser.objective.parameters())
    check_batch(settings, accelerator.num_processes)

    # The state at step 0.
    sizes = group_sizes(list(parameters), settings.rates, trainer.group_of)
    optimizer = adamw(list(parameters.values()), betas=settings.betas, weight_decay=settings.weight_decay, sizes=sizes)
    guards.check_optimizer(optimizer, parameters)
    ema = Ema(parameters, settings.ema_decay) if settings.ema_decay is not None else None
    stateful = objective if isinstance(objective, Stateful) else None
    identity = dict(resumption.identity)
    state = TrainState(parameters, optimizer, ema, steps=settings.steps, identity=identity, objective=stateful)
    state.former = resumption.former

    # The checkpoint to go on from, if there is one.
    if accelerator.is_main_process:
        for damaged in tidy(run.checkpoints, resumption.start):
            log.say(f"{damaged} is damaged: it is now called damaged-{damaged.name}, and the run goes on before it")
    accelerator.wait_for_everyone()
    path = find_checkpoint(run.checkpoints, resumption.start)
    if path:
        former_steps = load_checkpoint(path, state)
        if former_steps != settings.steps and settings.schedule != "constant":
            log.say(
                f"training.steps was {former_steps} and is {settings.steps}: from step {state.step} on the rate falls "
                f"along the {settings.schedule} of the new length"
            )
    guards.check_same_on_ranks(parameters, accelerator)

    # Every check has passed: from here on the run folder is written to.
    log.start = state.step
    if accelerator.is_main_process:
        if path is None and set_aside:
            set_aside(0, True)
        elif path is None and list_checkpoints(run.checkpoints):
            fix = "resume with `auto`, use another run folder, or give Callbacks.set_aside"
            raise PrflError("the run folder has checkpoints of an earlier training", where=str(run.path), fix=fix)
        run.begin()
        if lost := drop_metrics_after(run.metrics, state.step):
            log.warn(f"{run.metrics}: {lost} damaged lines, as a crash leaves them, are left out")
    return state, path


def check_batch(settings: TrainingConfig, processes: int) -> None:
    """Raise PrflError if a process would get no sample of a part of the batch."""
    if settings.batch // settings.accumulation < processes:
        raise PrflError(
            f"a batch of {settings.batch} in {settings.accumulation} parts is too small for {processes} processes",
            where="training.batch",
            fix="give every process at least one sample of each part",
        )


def run_hooks(hooks: Sequence[Hook], state: TrainState, trainer: Trainer, log: Logger, stop: StopSignals) -> None:
    """Run the hooks that are due.  A signal ends them; they change nothing that is saved, and run again on resuming."""
    for hook in hooks:
        if hook.due(state.step, trainer.settings.steps) and not stop.left_early:
            metrics: Mapping[str, float] = {}
            # In this order: the average must not be interrupted while it gives the parameters back.
            with state.ema.applied() if state.ema else nullcontext(), stop.at_once(trainer.accelerator):
                metrics = hook.call(state.step)
            if metrics:
                log.event(state.step, metrics)
            log.samples(state.step)
            processes.wait()  # what the main process wrote is there for all


def save(trainer: Trainer, state: TrainState, stop: StopSignals, learning: Learning) -> Path:
    """Check the weights and write a checkpoint of them on the main process; returns its folder on every process."""
    guards.check_same_on_ranks(state.parameters, trainer.accelerator)
    guards.check_finite_weights(state.parameters, state.step)
    guards.check_optimizer(state.optimizer, trainer.objective.parameters())
    learning.at_save(state.step)
    if trainer.accelerator.is_main_process:
        with stop.undisturbed():
            save_checkpoint(trainer.run.checkpoints, state, trainer.settings.keep)
    trainer.accelerator.wait_for_everyone()
    return trainer.run.checkpoints / step_name(state.step)


@contextmanager
def saved_on_the_way_out(trainer: Trainer, state: TrainState, stop: StopSignals, log: Logger) -> Iterator[None]:
    """Save when an error ends the run, so that the steps since the last checkpoint are not lost; not for a guard's
    error.

    Only the main process saves, and it does not wait for the others.
    """
    try:
        yield
    except GuardError:
        raise
    except BaseException as error:
        if trainer.accelerator.is_main_process:
            with stop.undisturbed():
                how = "ended by an error" if isinstance(error, Exception) else "interrupted"
                log.say(f"{how} after step {state.step}: {last_save(trainer, state)}")
        raise


def last_save(trainer: Trainer, state: TrainState) -> str:
    """Save a checkpoint if the state allows it; return what was saved, or why nothing was."""
    checkpoints = list_checkpoints(trainer.run.checkpoints)
    newest = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint"
    if state.step == 0 or (checkpoints and checkpoints[-1].name == step_name(state.step)):
        return newest
    if state.changing or not hold_their_own(state.parameters):
        return f"not saved, since the step after it had begun to change the weights; {newest}"
    try:
        guards.check_finite_weights(state.parameters, state.step)
        return f"saved {save_checkpoint(trainer.run.checkpoints, state, trainer.settings.keep)}"
    except Exception as error:  # the error that ends the run matters more
        return f"not saved: {getattr(error, 'what', error)}; {newest}"


def train_step(trainer: Trainer, state: TrainState) -> dict[str, float]:
    """Take the regulariser's optimizer step if one is due, then the objective's; then update the EMA."""
    device = trainer.accelerator.device
    clock = Clock(device)
    reset_peak(device)
    metrics: dict[str, float] = {}
    with clock("step"):
        if trainer.regulariser and trainer.regulariser.due(state.step):
            regularised = update(trainer, state, trainer.regulariser.objective, "regulariser")
            metrics |= {f"regulariser/{name}": value for name, value in regularised.items()}
        metrics |= update(trainer, state, trainer.objective, "objective")
        if state.ema:
            state.ema.update()
    state.step += 1
    state.changing = False
    peaks = [peak for peak in processes.gather(peak_gib(device)) if peak is not None]
    return metrics | clock.metrics() | ({"peak_gib": max(peaks)} if peaks else {})


def update(trainer: Trainer, state: TrainState, objective: Objective, name: str) -> dict[str, float]:
    """Take one optimizer step: accumulate, average over processes, check, clip, step."""
    settings, accelerator = trainer.settings, trainer.accelerator
    parameters, step = list(state.parameters.values()), state.step
    seed_generators(trainer, step, name)
    for parameter in parameters:
        parameter.grad = None

    # Gradients and metrics of this process's parts of the batch.
    rank, count = accelerator.process_index, accelerator.num_processes
    parts = split_indices(step, settings.batch, settings.accumulation, rank, count)
    records = [objective.accumulate(step, indices) for indices in parts]

    # Means over the whole batch, of all processes.
    clock = Clock(accelerator.device)
    with clock("processes") if count > 1 else nullcontext():  # waits for the slowest one
        metrics = average_metrics(records, [len(part) for part in parts])
        average_gradients(parameters, len(parts[0]) / settings.batch, accelerator)
    if step == 0:  # after the average: a process whose own samples are all beyond the hinge is no fault
        guards.check_gradient_arrived(state.parameters, name, metrics)

    # The step itself, unless a number is not finite.
    with clock("optimizer"):
        norm = clip_gradients(parameters, settings.max_grad_norm)
        indices = [index for part in parts for index in part]
        guards.check_finite(objective, trainer.run.path, step, indices, metrics | {"gradient_norm": norm}, rank)
        state.changing = True
        if isinstance(objective, Stateful):  # not before: a failed step is described as it was
            objective.after_step(metrics)
        now = partial(learning_rate, step, warmup=settings.warmup, schedule=settings.schedule, steps=settings.steps)
        rates = {name: now(peak=peak) for name, peak in settings.rates.items()}
        apply(state.optimizer, list(rates.values()))
    told = {f"learning_rate/{name}" if name else "learning_rate": rate for name, rate in rates.items()}
    return metrics | {"gradient_norm": norm} | told | clock.metrics()


def group_sizes(names: Sequence[str], rates: Mapping[str, float], group_of: Callable[[str], str]) -> list[int]:
    """Return how many parameters each rate is of; they come group by group.  Raises PrflError for a rate of none."""
    if len(rates) == 1:
        return [len(names)]
    groups = [group_of(name) for name in names]
    assert groups == sorted(groups, key=list(rates).index), "the parameters of one rate are not together"
    sizes = {rate: groups.count(rate) for rate in rates}
    if unused := [rate for rate, size in sizes.items() if not size]:
        what = f"nothing is trained at the rate of {unused[0]}"
        raise PrflError(what, where="training.learning_rate", fix="give one number, of what is trained")
    return list(sizes.values())


def split_indices(step: int, batch: int, accumulation: int, rank: int, processes: int) -> list[list[int]]:
    """Return process ``rank``'s global sample indices of a step, in ``accumulation`` parts, each shared out alike.

    Indices run on over the whole training: step k has k * batch .. (k + 1) * batch - 1.
    """
    size, first = batch // accumulation, step * batch
    low, high = size * rank // processes, size * (rank + 1) // processes
    return [list(range(first + part * size + low, first + part * size + high)) for part in range(accumulation)]


def seed_generators(trainer: Trainer, step: int, name: str) -> None:
    """Seed the global generators (Python's, numpy's, torch's on every device) before an update.

    So what draws from them depends on the step only too, and a checkpoint has no generator to save.
    """
    rank = trainer.accelerator.process_index
    set_seed(rng.generator(trainer.seed, f"dropout/{name}", step, rank).initial_seed() % 2**32)  # numpy takes 32 bits
