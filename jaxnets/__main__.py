"""The commands of `python -m jaxnets`: doctor, summary, fit-memory, compare, report, ..."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxnets.models import registry
from jaxnets.pretrained import inspect, load, save
from jaxnets.tools import comparison, doctor, memory_fit, summary
from jaxnets.tools.report import write_report
from jaxnets.training.optimizers import OPTIMIZERS
from jaxnets.training.sharding import device_mesh


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: after `python -m jaxnets`; by default those of this process.

    Returns:
        Exit code: 0, or 1 where the doctor finds a problem.

    Raises:
        SystemExit: with code 2 after an error in the arguments, with 0 after --help.
    """
    parser = argparse.ArgumentParser(prog="python -m jaxnets", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object")

    examine = "check versions, devices, data and a training step"
    commands.add_parser(
        "doctor", help=examine, description=examine, parents=[as_json], allow_abbrev=False
    )
    contrast = "compare runs, and test which of their differences are significant"
    compare = commands.add_parser(
        "compare", help=contrast, description=contrast, parents=[as_json], allow_abbrev=False
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished run")
    show = "write report.html from the log, the result and the pictures of a run"
    report = commands.add_parser("report", help=show, description=show, allow_abbrev=False)
    report.add_argument("run", metavar="RUN", help="folder of a run, finished or not")
    list_tensors = "names, shapes, types and sizes of the tensors in a file or folder"
    inspection = commands.add_parser(
        "inspect",
        help=list_tensors,
        description=list_tensors,
        parents=[as_json],
        allow_abbrev=False,
    )
    inspection.add_argument(
        "path", metavar="FILE_OR_FOLDER", help="in any format of jn.pretrained.read_tensors"
    )
    change = "write a pretrained network anew, in another layout"
    conversion = commands.add_parser("convert", help=change, description=change, allow_abbrev=False)
    conversion.add_argument(
        "source", metavar="IN", help="folder or file of a network, as for jn.pretrained.load"
    )
    conversion.add_argument("target", metavar="OUT", help="folder that does not exist yet")
    conversion.add_argument(
        "--layout",
        choices=("jaxnets", "torch"),
        default="jaxnets",
        help="names of this library, or those of transformers and torch (default %(default)s)",
    )
    conversion.add_argument(
        "--architecture",
        metavar="NAME",
        help="class of transformers other than the one of config.json, or function of torchvision",
    )
    describe = "layers, parameters, FLOPs and, on request, memory of a network"
    summarize = commands.add_parser(
        "summary",
        help=describe,
        description=describe,
        epilog=f"models: {', '.join(registry.MODELS)}",
        parents=[as_json],
        allow_abbrev=False,
    )
    shared = [summarize, _fit_memory_command(commands, as_json)]
    for command in shared:
        command.add_argument("model", metavar="MODEL", help="name, see the list below")
        command.add_argument(
            "--input",
            type=int,
            nargs="+",
            metavar="SIZE",
            help="shape of one example",
        )
        command.add_argument("--batch", type=int, default=32, help="examples (default %(default)s)")
        command.add_argument(
            "--outputs", type=int, help="number of classes or tokens (default: the model's own)"
        )
        command.add_argument(
            "--optimizer",
            default="adamw",
            help=f"{', '.join(OPTIMIZERS)} (default %(default)s)",
        )
    summarize.add_argument(
        "--depth", type=int, default=1, help="levels of modules shown (default %(default)s)"
    )
    summarize.add_argument("--shapes", action="store_true", help="show the shape of each parameter")
    summarize.add_argument(
        "--memory", action="store_true", help="compile for the memory: seconds to minutes"
    )

    options = parser.parse_args(arguments)
    if options.command == "doctor":
        found = doctor.examine()
        print(json.dumps(found.to_json()) if options.json else found)
        return 0 if found.healthy else 1
    try:
        if options.command == "compare":
            compared = comparison.compare([comparison.read_run(run) for run in options.runs])
            print(json.dumps(compared.to_json()) if options.json else compared)
            return 0
        if options.command == "report":
            print(write_report(options.run))
            return 0
        if options.command == "inspect":
            inspected = inspect(options.path)
            print(json.dumps(inspected.to_json()) if options.json else inspected)
            return 0
        if options.command == "convert":
            print(_convert(options.source, options.target, options.layout, options.architecture))
            return 0
        if options.command == "fit-memory":
            fitted = _fit_memory(options)
            print(json.dumps(fitted.to_json()) if options.json else fitted)
            return 0
        result = summary.summarize_model(
            options.model,
            input_shape=tuple(options.input) if options.input else None,
            batch_size=options.batch,
            num_outputs=options.outputs,
            optimizer=options.optimizer,
            memory=options.memory,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if options.json:
        print(json.dumps(result.to_json()))
    else:
        print(result.table(depth=options.depth, shapes=options.shapes))
    return 0


def _fit_memory_command(commands: Any, as_json: argparse.ArgumentParser) -> Any:
    """Add the command and the options that it alone has."""
    plan = "memory of a training step on each device of a mesh, and its collectives"
    command = commands.add_parser(
        "fit-memory",
        help=plan,
        description=f"{plan}; it compiles the step, and allocates nothing",
        epilog=f"models: {', '.join(registry.MODELS)}",
        parents=[as_json],
        allow_abbrev=False,
    )
    command.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="devices of the mesh; virtual CPU devices where there are fewer (default %(default)s)",
    )
    for axis, splits in (
        ("fsdp", "batch and parameters"),
        ("tensor", "features"),
        ("sequence", "time"),
    ):
        command.add_argument(
            f"--{axis}",
            type=int,
            default=1,
            metavar="N",
            help=f"devices that split the {splits} (default %(default)s)",
        )
    command.add_argument(
        "--gigabytes",
        type=float,
        metavar="GB",
        help="memory of one device (10^9 bytes): search the largest batch that fits",
    )
    return command


def _fit_memory(options: argparse.Namespace) -> memory_fit.MemoryFit:
    if options.devices < 1:
        raise ValueError(f"--devices is {options.devices}; give 1 or more")
    if options.gigabytes is not None and not options.gigabytes > 0:
        raise ValueError(f"--gigabytes is {options.gigabytes}; give a positive number")
    if options.devices > 1:
        with contextlib.suppress(RuntimeError):  # devices that are there already stay
            jax.config.update("jax_num_cpu_devices", options.devices)
    devices = jax.devices() if len(jax.devices()) >= options.devices else jax.devices("cpu")
    if len(devices) < options.devices:
        raise ValueError(
            f"--devices is {options.devices} and this process has {len(devices)}; set "
            f"JAX_NUM_CPU_DEVICES={options.devices} before it starts"
        )
    sizes = {axis: getattr(options, axis) for axis in ("fsdp", "tensor", "sequence")}
    return memory_fit.fit_memory(
        options.model,
        device_mesh(**sizes, devices=devices[: options.devices]),
        batch_size=options.batch,
        input_shape=tuple(options.input) if options.input else None,
        num_outputs=options.outputs,
        optimizer=options.optimizer,
        budget_bytes=None if options.gigabytes is None else round(options.gigabytes * 1e9),
    )


def _convert(
    source: str, target: str, layout: Literal["jaxnets", "torch"], architecture: str | None
) -> str:
    """Write a network in another layout, and return what was written."""
    if Path(target).exists():  # before gigabytes are read
        raise FileExistsError(f"{target} exists; give another folder, or remove it first")
    network = load(source, architecture=architecture)
    save(target, network, layout=layout)
    parameters = sum(array.size for array in jax.tree.leaves(network.variables["params"]))
    size = sum(file.stat().st_size for file in Path(target).rglob("*") if file.is_file())
    name = type(network.module).__name__
    return f"wrote {target}: {name}, {parameters:,} parameters, {size:,} bytes, layout {layout}"


if __name__ == "__main__":
    sys.exit(main())
