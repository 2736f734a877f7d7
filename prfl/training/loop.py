"""The loop: ``fit`` (when to log, save, evaluate), ``train_step`` (whose turn), ``update`` (one optimizer step).

It sees an objective, never a reward, a rollout or a backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from prfl.backbone.weights import hold_their_own
from prfl.config.sections.training import TrainingConfig
from prfl.objective import Objective, Stateful
from prfl.training import guards, memory
from prfl.training.averages import average_metrics
from prfl.training.checkpoint import (
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_name,
    tidy,
)
from prfl.training.ema import Ema
from prfl.training.learning import Learning, Watched
from prfl.training.log import Log, RunFolder, drop_metrics_after, make_accelerator, read_metrics
from prfl.training.optimizer import adamw, apply, average_gradients, clip_gradients, learning_rate
from prfl.training.regulariser import Regulariser
from prfl.training.signals import StopSignals
from prfl.utils import processes, rng
from prfl.utils.errors import GuardError, PrflError
from prfl.utils.lock import folder_lock
from prfl.utils.streams import lossy_output
from prfl.utils.timing import Clock


@dataclass(frozen=True)
class Hook:
    """Something done every ``every`` steps, at the last step, and (``at_start``) before the first.

    It gets the number of finished steps, runs under the averaged weights where there are any, and returns numbers to
    log.  It runs on every process, and all of them go on together.
    """

    every: int
    call: Callable[[int], Mapping[str, float]]
    at_start: bool = False

    def due(self, step: int, steps: int) -> bool:
        return self.at_start if step == 0 else step % self.every == 0 or step == steps


@dataclass(frozen=True)
class TrainResult:
    """step: finished steps.  stopped: the signal that ended the run early, or None.  checkpoint: the last one."""

    step: int
    stopped: str | None
    checkpoint: Path | None


@dataclass(frozen=True)
class Trainer:
    """What does not change while a run trains."""

    objective: Objective
    settings: TrainingConfig
    run: RunFolder
    accelerator: Accelerator
    regulariser: Regulariser | None
    seed: int


def fit(
    objective: Objective,
    settings: TrainingConfig,
    run: RunFolder,
    *,
    seed: int = 0,
    regulariser: Regulariser | None = None,
    accelerator: Accelerator | None = None,
    hooks: Sequence[Hook] = (),
    enough: Callable[[], bool] | None = None,
    finish: Callable[[int], Mapping[str, float]] | None = None,
    set_aside: Callable[[int, bool], object] | None = None,
    resume: str = "auto",
    identity: Mapping[str, Any] | None = None,
    watched: Watched | None = None,
    former: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``objective.parameters()`` in place for ``settings.steps`` steps.

    enough: asked after the hooks of each step, with the same answer on every process; True ends the run there.
    finish: a hook for the end of the run, after the last checkpoint: it may put other weights into the model.
    set_aside: called on the main process before the run starts anew (0, True), and before the first step that it takes
    here (finished steps, False): what an earlier training left must not pass for this one's.
    resume: ``auto`` (the run's last checkpoint, or anew), ``none`` (anew; refused where checkpoints are), or a path.
    identity: json-able facts that must be the same when the run is resumed (the config less what may change).
    watched: what must not change while this is trained, and what must (learning.py).
    former: what checkpoints of older versions have under other names.
    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step (an evaluation is left at once), save, and return.
    Whatever else ends it saves too, if it can, says what it saved, and is raised again; a guard saves nothing.
    Raises PrflError from guards.py and checkpoint.py; what is refused before the first step leaves no trace.
    """
    accelerator = accelerator or make_accelerator(run, trackers=settings.trackers)
    trainer = Trainer(objective, settings, run, accelerator, regulariser, seed)
    log = Log(run, accelerator, every=settings.log_every, steps=settings.steps)
    with lossy_output(), folder_lock(run.path) as lock:
        state, checkpoint = prepare(trainer, resume, dict(identity or {}), log, former or {}, set_aside)
        learning = Learning(state.parameters, watched or Watched(), log.say, settings.learning_rate)
        learning.recall(processes.gather(read_metrics(run.metrics) if accelerator.is_main_process else [])[0])
        with StopSignals() as stop, log, saved_on_the_way_out(trainer, state, stop, log):
            run_hooks(hooks, state, trainer, log, stop)
            stopped = stop.anywhere(accelerator)
            while state.step < settings.steps and not stopped and not (enough and enough()):
                if set_aside and state.step == log.start and accelerator.is_main_process:
                    set_aside(state.step, False)
                metrics = train_step(trainer, state)
                lock.check()
                log.step(state.step, metrics)
                learning.after_step(state.step, metrics)
                if state.step % settings.save_every == 0 or state.step == settings.steps or learning.stuck:
                    checkpoint = save(trainer, state, stop, learning)
                    learning.check_stuck(state.step, str(checkpoint))
                stopped = stop.anywhere(accelerator)
                if not stopped:
                    run_hooks(hooks, state, trainer, log, stop)
                    stopped = stop.anywhere(accelerator)
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
    trainer: Trainer,
    resume: str,
    identity: dict[str, Any],
    log: Log,
    former: Mapping[str, Any],
    set_aside: Callable[[int, bool], object] | None,
) -> tuple[TrainState, Path | None]:
    """The state to go on from.  The run folder is written to only when nothing stands against the run any more."""
    parameters = trainer.objective.parameters()
    guards.check_trainable(parameters)
    if trainer.regulariser:
        guards.check_same_parameters(parameters, trainer.regulariser.objective.parameters())
    settings = trainer.settings
    if settings.batch // settings.accumulation < trainer.accelerator.num_processes:
        raise PrflError(
            f"a batch of {settings.batch} in {settings.accumulation} parts is too small for "
            f"{trainer.accelerator.num_processes} processes",
            where="training.batch",
            fix="give every process at least one sample of each part",
        )
    optimizer = adamw(list(parameters.values()), betas=settings.betas, weight_decay=settings.weight_decay)
    guards.check_optimizer(optimizer, parameters)
    ema = Ema(parameters, settings.ema_decay) if settings.ema_decay is not None else None
    carrier = trainer.objective if isinstance(trainer.objective, Stateful) else None
    state = TrainState(parameters, optimizer, ema, steps=settings.steps, identity=identity, objective=carrier)
    state.former = former
    if trainer.accelerator.is_main_process:
        for damaged in tidy(trainer.run.checkpoints, resume):
            log.say(f"{damaged} is damaged: it is now called damaged-{damaged.name}, and the run goes on before it")
    trainer.accelerator.wait_for_everyone()
    path = find_checkpoint(trainer.run.checkpoints, resume)
    if path:
        before = load_checkpoint(path, state)
        if before != settings.steps and settings.schedule != "constant":
            log.say(
                f"training.steps was {before} and is {settings.steps}: from step {state.step} on the rate falls "
                f"along the {settings.schedule} of the new length"
            )
    guards.check_same_on_ranks(parameters, trainer.accelerator)
    log.start = state.step
    if trainer.accelerator.is_main_process:
        if path is None and set_aside:
            set_aside(0, True)
        trainer.run.begin()
        if lost := drop_metrics_after(trainer.run.metrics, state.step):
            log.say(f"warning: {trainer.run.metrics}: {lost} damaged lines, as a crash leaves them, are left out")
    return state, path


def run_hooks(hooks: Sequence[Hook], state: TrainState, trainer: Trainer, log: Log, stop: StopSignals) -> None:
    """The hooks that are due.  A signal ends them: they change nothing that is saved, and run again on resuming."""
    for hook in hooks:
        if hook.due(state.step, trainer.settings.steps) and not stop.left_early:
            metrics: Mapping[str, float] = {}
            # In this order: the average must not be interrupted while it gives the parameters back.
            with state.ema.applied() if state.ema else nullcontext(), stop.at_once(trainer.accelerator):
                metrics = hook.call(state.step)
            if metrics:
                log.event(state.step, metrics)
            processes.wait()  # what the main process wrote is there for all


def save(trainer: Trainer, state: TrainState, stop: StopSignals, learning: Learning) -> Path:
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
def saved_on_the_way_out(trainer: Trainer, state: TrainState, stop: StopSignals, log: Log) -> Iterator[None]:
    """An error that is no guard's must not cost the steps since the last checkpoint.  The others wait for nobody."""
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
    """Save what can still be saved; returns what was, or why not."""
    there = list_checkpoints(trainer.run.checkpoints)
    newest = f"the last checkpoint is {there[-1]}" if there else "there is no checkpoint"
    if state.step == 0 or (there and there[-1].name == step_name(state.step)):
        return newest
    if state.changing or not hold_their_own(state.parameters):
        return f"not saved, since the step after it had begun to change the weights; {newest}"
    try:
        guards.check_finite_weights(state.parameters, state.step)
        return f"saved {save_checkpoint(trainer.run.checkpoints, state, trainer.settings.keep)}"
    except Exception as error:  # the one that is on its way says more
        return f"not saved: {getattr(error, 'what', error)}; {newest}"


def train_step(trainer: Trainer, state: TrainState) -> dict[str, float]:
    """The regulariser's optimizer step where one is due, then the objective's, then the average."""
    device = trainer.accelerator.device
    clock = Clock(device)
    memory.reset_peak(device)
    metrics: dict[str, float] = {}
    with clock("step"):
        if trainer.regulariser and trainer.regulariser.due(state.step):
            own = update(trainer, state, trainer.regulariser.objective, "regulariser")
            metrics |= {f"regulariser/{name}": value for name, value in own.items()}
        metrics |= update(trainer, state, trainer.objective, "objective")
        if state.ema:
            state.ema.update()
    state.step += 1
    state.changing = False
    peaks = [peak for peak in processes.gather(memory.peak_gib(device)) if peak is not None]
    return metrics | clock.metrics() | ({"peak_gib": max(peaks)} if peaks else {})


def update(trainer: Trainer, state: TrainState, objective: Objective, name: str) -> dict[str, float]:
    """One optimizer step: accumulate, average over processes, check, clip, step."""
    settings, parameters, step = trainer.settings, list(state.parameters.values()), state.step
    seed_generators(trainer, step, name)
    for parameter in parameters:
        parameter.grad = None
    accelerator = trainer.accelerator
    parts = split_indices(
        step, settings.batch, settings.accumulation, accelerator.process_index, accelerator.num_processes
    )
    records = [objective.accumulate(step, indices) for indices in parts]
    clock = Clock(accelerator.device)
    with clock("processes") if accelerator.num_processes > 1 else nullcontext():  # waits for the slowest one
        metrics = average_metrics(records, [len(part) for part in parts])
        average_gradients(parameters, len(parts[0]) / settings.batch, accelerator)
    if step == 0:  # after the average: a process whose own samples are all beyond the hinge is no fault
        guards.check_gradient_arrived(state.parameters, name)
    with clock("optimizer"):
        norm = clip_gradients(parameters, settings.max_grad_norm)
        indices = [index for part in parts for index in part]
        numbers = metrics | {"gradient_norm": norm}
        guards.check_finite(objective, trainer.run.path, step, indices, numbers, accelerator.process_index)
        state.changing = True
        if isinstance(objective, Stateful):  # not before: a failed step is described as it was
            objective.observe(metrics)
        rate = learning_rate(
            step, peak=settings.learning_rate, warmup=settings.warmup, schedule=settings.schedule, steps=settings.steps
        )
        apply(state.optimizer, rate)
    return metrics | {"gradient_norm": norm, "learning_rate": rate} | clock.metrics()


def split_indices(step: int, batch: int, accumulation: int, rank: int, processes: int) -> list[list[int]]:
    """Process ``rank``'s global sample indices of a step, in ``accumulation`` parts: every part is shared out alike.

    Indices run on over the whole training: step k has k * batch .. (k + 1) * batch - 1.
    """
    size, first = batch // accumulation, step * batch
    low, high = size * rank // processes, size * (rank + 1) // processes
    return [list(range(first + part * size + low, first + part * size + high)) for part in range(accumulation)]


def seed_generators(trainer: Trainer, step: int, name: str) -> None:
    """Whatever draws from a global generator (Python's, numpy's, torch's on every device): reseeded before each update,
    it too depends on the step only, and a checkpoint has no generator to save."""
    rank = trainer.accelerator.process_index
    set_seed(rng.generator(trainer.seed, f"dropout/{name}", step, rank).initial_seed() % 2**32)  # numpy takes 32 bits
