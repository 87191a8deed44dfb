"""The steps of every experiment: open the run folder, train, measure, write the result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxnets as jn
from experiments.harness import command_line, process, processes, registry
from experiments.harness.identity import code_version, content_sha256
from experiments.harness.options import Options, check
from experiments.harness.problem import Measured, Problem
from experiments.harness.run_folder import RunFolder, environment, to_json
from experiments.pictures import event_pictures
from jaxnets.tools.comparison import show_number
from jaxnets.tools.results import Result, diverged, make_result
from jaxnets.training.history import Writer


def main(name: str, make_problem: Callable[[Any], Problem], recipes: Mapping[str, Options]) -> None:
    """Run an experiment from the command line.

    Progress goes to standard error. If standard output is not a terminal, its only line is the
    result as JSON.

    Args:
        name: of the experiment, also the default run folder.
        make_problem: options -> problem; loads the data.
        recipes: {name: options}; a recipe named like a model sets that model's defaults.
    """
    advice = "continue with --resume"
    if process.is_command():
        process.exit_on_signals(advice)
    recipes = {
        key: dataclasses.replace(recipe, out=Path("runs") / f"{name}_{key}")
        for key, recipe in recipes.items()
    }
    options = command_line.parse(name, recipes)
    if options.keep_freed_memory:  # a setting of the process, which belongs to the experiment
        jn.keep_freed_memory()
    with command_line.errors_without_traceback(if_stopped=advice):
        result = run(name, options, make_problem)
    if process.is_command():
        process.ignore_signals()
    if jax.process_index() == 0 and not sys.stdout.isatty():
        print(json.dumps(result))


def run(name: str, options: Options, make_problem: Callable[[Any], Problem]) -> dict[str, Any]:
    """Train, evaluate and write the run folder.

    Args:
        name: of the experiment.
        options: of the run.
        make_problem: options -> problem; loads the data.

    Returns:
        The content of `result.json`.
    """
    check(options)
    folder = RunFolder(options.out)
    is_first = processes.join(options)
    with folder.locked() if is_first else contextlib.nullcontext():
        if is_first:
            folder.check(name, options, resume=options.resume, other_code=options.other_code)
            processes.start_others(options, folder.path)
        else:
            processes.agree("the data are there")  # process 0 downloads or records them
        problem = make_problem(options)
        if is_first:
            processes.agree("the data are there")
        digest = None if problem.dataset is None else content_sha256(problem.dataset)
        processes.agree("the code", dict(code_version()))
        processes.agree("the configuration", _described(options))
        processes.agree("the data (sha256)", digest)
        finished = folder.open(name, options, data=digest, kind=Result) if is_first else None
        processes.agree("the run folder")
        if finished is None and not folder.is_finished():
            return _finish(name, problem, folder)
        if is_first:
            print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
        return finished or folder.result(name, Result)


def _described(options: Options) -> dict[str, Any]:
    """Return the options in which the processes of a run must not differ."""
    own = ("data", "keep_freed_memory", "processes")
    return {name: value for name, value in to_json(options).items() if name not in own}


def _finish(name: str, problem: Problem, folder: RunFolder) -> dict[str, Any]:
    """Train from the latest checkpoint on, evaluate, and write the result."""
    options = problem.options
    is_first = jax.process_index() == 0
    states = processes.on_all(problem.create_states())
    states, history = jn.resume(folder.checkpoints, states)
    log: Any = jn.jsonl_writer(folder.metrics)
    writers = [log]
    events: Any = None
    image_hooks: list[jn.Hook] = []
    if options.tensorboard and is_first:
        events = jn.tensorboard_writer(folder.path / "tensorboard")
        writers.append(events)
        image_hooks = [
            event_pictures.NewPictures(folder.path),
            jn.every(options.eval_every or problem.steps_per_epoch, jn.parameter_histograms()),
        ]
    started = time.perf_counter()
    states, history = _train(problem, folder, states, history, writers, image_hooks)
    if history.interrupted:
        raise command_line.Stopped(f"stopped by {history.stopped}; continue with --resume")
    states = processes.own(states)
    if not is_first:
        processes.agree("the result")
        return folder.result(name, Result)
    # If nothing was left to train, no writer was started; the log may have been cut or removed.
    log.start(history, problem.num_steps)
    log.close()
    print(
        f"trained {options.seeds} network(s) for {problem.num_steps} steps: first call "
        f"{history.first_call_seconds:.1f} s (compilation), the others {history.seconds:.1f} s",
        file=sys.stderr,
    )
    trained = time.perf_counter()
    measured = _without_frozen(problem.measure(states), states)
    result = summarize(name, problem, states, history, measured)
    result["captions"] = dict(problem.draw(folder, states, history, measured))
    if events is not None:
        event_pictures.show_last(events, folder.path, history, problem.num_steps)
    result["measure_seconds"] = round(time.perf_counter() - trained, 2)
    result["wall_seconds"] = round(time.perf_counter() - started, 2)
    page = jn.write_report(folder.path, result)
    folder.write("result.json", result)
    processes.agree("the result")
    print(f"{describe(measured)}; see {page}", file=sys.stderr)
    return result


def _train(
    problem: Problem,
    folder: RunFolder,
    states: jn.TrainState,
    history: jn.History,
    writers: list[Writer],
    image_hooks: list[jn.Hook],
) -> tuple[jn.TrainState, jn.History]:
    """Run the remaining stages in order, with one history."""
    options = problem.options
    is_first = jax.process_index() == 0
    validation = jn.every(
        options.eval_every or problem.steps_per_epoch,
        jn.validation(
            problem.eval_step(),
            problem.eval_batches,
            prefix=problem.eval_name,
            evaluated=problem.evaluated,
        ),
    )
    drawing = [*problem.hooks(folder), *image_hooks] if is_first else []
    hooks = [
        *map(processes.OnOwnCopy, [validation, *drawing]),
        jn.Checkpointing(
            folder.checkpoints,
            every=options.checkpoint_every or problem.steps_per_epoch,
            keep=2,
        ),
    ]
    compile_seconds = 0.0
    for stage, last_step in enumerate(problem.stages):
        if not is_first:
            processes.agree("the preparation of a stage")  # reads what process 0 has prepared
        message = problem.prepare(folder, stage, processes.own(states))
        if is_first:
            processes.agree("the preparation of a stage")
            if message:
                print(message, file=sys.stderr)
        if last_step <= int(np.max(states.step)):
            continue  # finished before the run was resumed
        states, history = jn.fit(
            problem.executor(),
            states,
            problem.batches(),
            num_steps=last_step,
            hooks=hooks,
            writers=writers,
            log_every=options.log_every,
            history=history,
        )
        compile_seconds += history.first_call_seconds
        history.first_call_seconds = compile_seconds
        if history.stopped is not None:
            break
    return states, history


def _without_frozen(measured: Measured, states: jn.TrainState) -> Measured:
    """Leave out the values of the networks that froze before the end."""
    goes_on = np.asarray(states.step == states.step.max())
    return dataclasses.replace(measured, values=np.where(goes_on, measured.values, np.nan))


def summarize(
    name: str, problem: Problem, states: jn.TrainState, history: jn.History, measured: Measured
) -> dict[str, Any]:
    """Return the content of `result.json`."""
    options, run_with = problem.options, environment()
    return {
        "experiment": name,
        "model": getattr(options, "model", None),
        **make_result(
            dataset=problem.dataset_name,
            metric=measured.metric,
            values=measured.values,
            unit=measured.unit,
            history=history,
        ),
        "parameters": sum(x.size for x in jax.tree.leaves(states.params)) // options.seeds,
        **measured.details,
        "parameters_sha256": jn.parameters_sha256(states.params),
        **run_with,
        "notes": registry.notes(run_with["command"]),
    }


def describe(measured: Measured) -> str:
    """Return the outcome as text, with its confidence interval over the seeds."""
    finite = np.isfinite(measured.values)
    value, interval = jn.metrics.confidence_interval(measured.values[finite])
    if not np.any(finite):
        return f"{measured.metric} none, because every network diverged"
    shown = show_number(value, measured.unit)
    spread = ""
    if np.isfinite(interval):
        spread = f" +- {show_number(interval, measured.unit)} over the seeds (95%)"
    unit = "" if measured.unit == "%" else f" {measured.unit}"
    lost = diverged([each if np.isfinite(each) else None for each in measured.values])
    return f"{measured.metric} {shown}{spread}{unit}{f' ({lost})' if lost else ''}"
