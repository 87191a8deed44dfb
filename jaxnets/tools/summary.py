"""Summary of a network: layers, parameters, FLOPs and memory, without allocating any array.

FLOPs are counted in the traced program; only memory needs a compilation.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Batch, Update, tree_path
from jaxnets.models.registry import MODELS
from jaxnets.tools.flops import count_flops
from jaxnets.training.optimizers import OPTIMIZERS
from jaxnets.training.step import create_train_state, make_train_step

_LEARNING_RATE = 1e-3  # a constant of the program that does not affect its cost


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a network.

    Attributes:
        path: such as "stage_1_block_1/conv_1"; "" is the network itself.
        kind: name of its class.
        output: shapes of the arrays returned by its first call.
        num_parameters: including those of all submodules.
        shapes: shape of each of its own parameters.
    """

    path: str
    kind: str
    output: tuple[tuple[int, ...], ...]
    num_parameters: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def depth(self) -> int:
        """Number of modules that enclose it."""
        return self.path.count("/") + 1 if self.path else 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a compiled program, from XLA's analysis for the default device.

    Attributes:
        argument_bytes: of the arguments: parameters, optimizer state, batch.
        temporary_bytes: of the temporary buffers: activations, gradients.
        output_bytes: of the outputs.
        alias_bytes: of the outputs that reuse the buffers of donated arguments.
        compile_seconds: time to trace and compile, shorter with a compilation cache.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    alias_bytes: int
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        """Memory of arguments, temporaries and outputs; aliased outputs count once."""
        total = self.argument_bytes + self.temporary_bytes + self.output_bytes
        return total - self.alias_bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """Cost of a forward pass or of a training step.

    Attributes:
        flops: floating point operations of the definition, as `tools.count_flops` counts them.
        memory: None if it was not asked for.
    """

    flops: float
    memory: Memory | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Layers, parameters and cost of a network; prints as a table.

    Attributes:
        model: name of the network's class.
        inputs: its inputs, such as "float32[32, 28, 28, 1]".
        layers: every module that was called, in pre-order.
        num_parameters: number of trainable elements; a shared parameter counts once.
        parameter_bytes: their size.
        num_state: number of elements in other collections, such as running averages.
        state_bytes: their size.
        forward: forward pass of one batch in evaluation.
        train_step: one training step with a donated state; None without an update.
    """

    model: str
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    num_parameters: int
    parameter_bytes: int
    num_state: int
    state_bytes: int
    forward: Program
    train_step: Program | None = None

    def table(self, *, depth: int | None = None, shapes: bool = False) -> str:
        """Format the layers and the totals as a table.

        Args:
            depth: maximum depth of the modules shown; None shows all.
            shapes: add a column with the shape of each parameter.

        Returns:
            Lines of aligned text.
        """
        shown = [layer for layer in self.layers if depth is None or layer.depth <= depth]
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "output", "parameters", "shapes" if shapes else "")
        ]
        for layer in shown:
            own = ", ".join(f"{name} {list(shape)}" for name, shape in layer.shapes.items())
            name = "  " * layer.depth + (layer.path.rsplit("/", 1)[-1] or "(all)")
            output = ", ".join(str(list(shape)) for shape in layer.output)
            rows.append(
                (name, layer.kind, output, f"{layer.num_parameters:,}", own if shapes else "")
            )
        lines = [f"{self.model} of {', '.join(self.inputs)}", "", *_aligned(rows, right={3})]
        hidden = len(self.layers) - len(shown)
        if hidden:
            lines.append(f"  ({hidden} modules inside these are not shown)")
        totals = f"{self.num_parameters:,} trainable, {_binary(self.parameter_bytes)}"
        if self.num_state:
            totals += f"; {self.num_state:,} in other state, {_binary(self.state_bytes)}"
        lines += ["", f"parameters  {totals}"]
        programs = {"forward": self.forward, "train step": self.train_step}
        costs = {name: _costs(program) for name, program in programs.items() if program}
        rows = [
            ("", *costs),
            *((name, *(cost[name] for cost in costs.values())) for name in costs["forward"]),
        ]
        lines += ["", *_aligned(rows, right={1, 2})]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dict that `json.dumps` takes."""
        content = dataclasses.asdict(self)
        for name in ("forward", "train_step"):
            program = getattr(self, name)
            if program is not None and program.memory is not None:
                content[name]["memory"]["peak_bytes"] = program.memory.peak_bytes
        return content

    def __str__(self) -> str:
        return self.table()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the table in a notebook instead of the fields."""
        printer.text(str(self))


def summarize(
    module: nn.Module,
    *inputs: Any,
    update: Update | None = None,
    batch: Batch | None = None,
    memory: bool = False,
    **keywords: Any,
) -> Summary:
    """Summarize layers, parameters and cost of a network, without allocating any array.

    Corresponds to `flax.linen.tabulate`. Differs from it: FLOPs are those of the forward pass and
    of a training step, counted without a compilation, and memory is that of the compiled ones.

    Args:
        module: any Linen module.
        inputs: its inputs: arrays, `jax.ShapeDtypeStruct`s or trees of them; a tuple of integers
            is the shape of a float32 array.
        update: objective and optimizer of the training step; None skips it.
        batch: batch of that step, of the same types as `inputs`; by default the first input as
            "inputs" and int32 "labels" [batch].
        memory: compile the forward pass and the training step for their memory, which takes
            seconds to minutes for deep networks.
        keywords: further keyword inputs of the module, which are constants of the program.

    Returns:
        Summary.

    Example:
        >>> from jaxnets.models.feedforward import MLP
        >>> print(summarize(MLP(features=(64,)), (32, 28, 28, 1)))
        MLP of float32[32, 28, 28, 1]
        <BLANKLINE>
        layer          kind     output    parameters
        (all)          MLP      [32, 10]      50,890
          hidden_0     Dense    [32, 64]      50,240
          dropout_0    Dropout  [32, 64]           0
            Dropout_0  Dropout  [32, 64]           0
          head         Dense    [32, 10]         650
        <BLANKLINE>
        parameters  50,890 trainable, 198.8 KiB
        <BLANKLINE>
                        forward
        operations  3.257 MFLOP
    """
    shapes = tuple(_abstract(value) for value in inputs)
    variables, calls = _trace(module, shapes, keywords)
    params = jax.tree.leaves(variables.get("params", {}))
    state = jax.tree.leaves({name: tree for name, tree in variables.items() if name != "params"})

    def apply(variables: Any, *values: Any) -> Any:
        rngs = {"params": jax.random.key(0)}  # for every stream
        return module.apply(variables, *values, rngs=rngs, **keywords)

    forward = _program(apply, variables, *shapes, memory=memory)
    train_step = None
    if update is not None:
        if batch is None:
            labels = jax.ShapeDtypeStruct(shapes[0].shape[:1], jnp.int32)
            batch = {"inputs": shapes[0], "labels": labels}
        train_state = jax.eval_shape(
            lambda variables: create_train_state(variables, update, rng=jax.random.key(0)),
            variables,
        )
        batch = {name: _abstract(value) for name, value in batch.items()}
        step = make_train_step(update)
        train_step = _program(step, train_state, batch, donate=(0,), memory=memory)
    return Summary(
        model=type(module).__name__,
        inputs=tuple(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes)),
        layers=_layers(variables.get("params", {}), calls),
        num_parameters=_size(params),
        parameter_bytes=_num_bytes(params),
        num_state=_size(state),
        state_bytes=_num_bytes(state),
        forward=forward,
        train_step=train_step,
    )


def summarize_model(
    name: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    batch_size: int = 32,
    num_outputs: int | None = None,
    optimizer: str = "adamw",
    memory: bool = False,
) -> Summary:
    """Summarize a named architecture and one step of its usual training.

    Args:
        name: key of `models.registry.MODELS`.
        input_shape: of one example; by default the usual one of the model.
        batch_size: number of examples.
        num_outputs: number of classes or tokens; by default the usual one of the model.
        optimizer: key of `training.optimizers.OPTIMIZERS`.
        memory: as for `summarize`.

    Returns:
        Summary.

    Raises:
        ValueError: an unknown name, a size below 1, or an input shape that does not fit.

    Example:
        >>> summarize_model("lenet5").num_parameters
        61706
    """
    model = look_up(MODELS, name, "model")
    make_optimizer = look_up(OPTIMIZERS, optimizer, "optimizer")
    input_shape = model.input_shape if input_shape is None else input_shape
    check_sizes(input_shape=input_shape, batch_size=batch_size)
    module, task = model.network(num_outputs), model.task
    batch = task.batch(batch_size, tuple(input_shape))
    return summarize(
        module,
        *(batch[entry] for entry in task.inputs),
        update=Update(task.objective(module), make_optimizer(_LEARNING_RATE)),
        batch=batch,
        memory=memory,
    )


def look_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Return an entry of a table by its name.

    Args:
        table: by name.
        name: of the entry.
        what: the entries are, for the error.

    Raises:
        ValueError: an unknown name; lists those that are known.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(table)}")
    return table[name]


def _abstract(value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return jax.ShapeDtypeStruct(value, jnp.float32)
    return jax.eval_shape(lambda tree: tree, value)


def _trace(
    module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[Any, dict[tuple[str, ...], Any]]:
    """Return the variables as shapes, and (kind, output shapes) of each module's first call."""
    calls: dict[tuple[str, ...], Any] = {}
    called: set[tuple[str, ...]] = set()  # whose __call__ ran, which counts before other methods

    def intercept(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        module, is_call = context.module, context.method_name == "__call__"
        bound = module.scope is not None and context.method_name != "setup"
        if not bound or module.path in (called if is_call else calls):
            return call(*args, **keywords)
        calls.setdefault(module.path)  # at entry: a module comes before its submodules
        called.update({module.path} if is_call else ())
        output = call(*args, **keywords)
        # A method may also return a function, such as one step of a decoder for a scan.
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(output) if not callable(leaf)]
        calls[module.path] = type(module).__name__, tuple(shapes)
        return output

    def initialize(*inputs: Any) -> Any:
        return module.init(jax.random.key(0), *inputs, **keywords)

    with nn.intercept_methods(intercept):
        variables = jax.eval_shape(initialize, *inputs)
    return nn.meta.unbox(variables), calls


def _layers(params: Any, calls: Mapping[tuple[str, ...], Any]) -> tuple[Layer, ...]:
    num_parameters: Counter[tuple[str, ...]] = Counter()
    shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {path: {} for path in calls}
    for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = tuple(tree_path(key).split("/"))
        owners = [names[:length] for length in range(len(names)) if names[:length] in calls]
        num_parameters.update(dict.fromkeys(owners, leaf.size))
        if owners:
            shapes[owners[-1]]["/".join(names[len(owners[-1]) :])] = tuple(leaf.shape)
    return tuple(
        Layer("/".join(path), kind, output, num_parameters[path], shapes[path])
        for path, (kind, output) in calls.items()
    )


def _program(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), memory: bool
) -> Program:
    flops = count_flops(function, *arguments)
    if not memory:
        return Program(flops)
    return Program(flops, memory_of(jax.jit(function, donate_argnums=donate), *arguments)[1])


def memory_of(function: Any, *arguments: Any) -> tuple[Any, Memory]:
    """Compile a function for its memory on one device.

    Args:
        function: from `jax.jit`.
        arguments: arrays or their shapes.

    Returns:
        The compiled function, and its memory.
    """
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    return compiled, Memory(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        compile_seconds=seconds,
    )


def _size(leaves: list[Any]) -> int:
    return sum(leaf.size for leaf in leaves)


def _num_bytes(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _costs(program: Program) -> dict[str, str]:
    costs, memory = {"operations": _decimal(program.flops, "FLOP")}, program.memory
    if memory is not None:
        costs |= {
            "peak memory": _binary(memory.peak_bytes),
            "  arguments": _binary(memory.argument_bytes),
            "  temporaries": _binary(memory.temporary_bytes),
            "  output": _binary(memory.output_bytes),
            "  of it donated": _binary(memory.alias_bytes),
            "compiled in": f"{memory.compile_seconds:.1f} s",
        }
    return costs


def _decimal(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"


def _binary(num_bytes: float) -> str:
    if num_bytes < 1024:
        return f"{num_bytes} B"
    for prefix in ("Ki", "Mi", "Gi"):
        num_bytes /= 1024
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {prefix}B"
    return f"{num_bytes / 1024:.1f} TiB"


def _aligned(rows: list[tuple[str, ...]], *, right: set[int]) -> list[str]:
    """Format rows as aligned columns; columns in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
