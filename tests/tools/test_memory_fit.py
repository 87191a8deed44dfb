"""Memory of a step on a mesh, and its collectives, against arrays and programs that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import jaxnets as jn
from jaxnets.__main__ import main
from jaxnets.tools.memory_fit import Collective, _largest, count_collectives, fit_memory

PROGRAM = """HloModule jit_step

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.2 (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %reduced = f32[8,4]{1,0} all-reduce(%x), channel_id=1, to_apply=%add.1
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %reduced)
}

%condition.3 (carry: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.4 (x: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition.3, body=%body.2, \
backend_config={"known_trip_count":{"n":"12"}}
  %both = (bf16[16]{0}, pred[3]{0}) all-gather(%a, %b), dimensions={0}
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    assert count_collectives(PROGRAM) == {
        "all-gather": Collective(1, 16 * 2 + 3),
        "all-reduce": Collective(12, 12 * 8 * 4 * 4),
    }


@pytest.mark.four_devices
def test_collectives_of_a_compiled_loop_are_those_that_run():
    mesh = jn.data_mesh(jax.devices()[:4])

    def summed(x):
        def body(x, _):
            return jax.lax.psum(x, "data") / 4 + x, None

        return jax.lax.scan(body, x, length=5)[0]

    split = jax.shard_map(
        summed, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    program = jax.jit(split).lower(jnp.ones((8, 3))).compile().as_text()
    assert count_collectives(program) == {"all-reduce": Collective(5, 5 * 2 * 3 * 4)}


@pytest.mark.parametrize("start", [1, 7, 1000])
@pytest.mark.parametrize("budget", [0, 99, 100, 110, 5_000, 5_003])
def test_the_largest_batch_is_that_of_trying_all(start, budget):
    def peak(count):
        return 90 + 10 * count + count // 7

    expected = max((count for count in range(600) if peak(count) <= budget), default=0)
    expected = expected if peak(1) <= budget else 0
    assert _largest(peak, budget, start) == expected


@pytest.mark.four_devices
def test_the_memory_of_a_split_state_is_that_of_its_arrays():
    mesh = jn.device_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    fit = fit_memory("mlp", mesh, batch_size=8, budget_bytes=1)
    module = jn.MLP(num_outputs=10)
    update = jn.Update(jn.classification(module), jn.training.optimizers.OPTIMIZERS["adamw"](1e-3))
    key = jax.random.key(0)
    variables = jn.initialize(module, key, jnp.zeros((1, 28, 28, 1)))
    state = jn.create_train_state(variables, update, rng=key)
    placed = jax.device_put(state, jn.state_sharding(state, mesh, jn.sharding_rules("feedforward")))

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert (fit.parameter_bytes, fit.optimizer_bytes) == (
        held(placed.params),
        held(placed.opt_state),
    )
    assert fit.parameter_bytes < 0.3 * fit.num_parameters * 4
    assert fit.step.argument_bytes >= fit.parameter_bytes + fit.optimizer_bytes
    assert fit.largest_batch == 0


BLOCK = jn.BlockConfig(features=64, num_heads=2)
LANGUAGE = {"input_shape": (16,), "num_outputs": 64, "num_layers": 2, "config": BLOCK}


@pytest.mark.four_devices
@pytest.mark.lowering
@pytest.mark.parametrize(("name", "fields"), [("mlp", {}), ("transformer_lm", LANGUAGE)])
def test_fully_sharded_parameters_are_gathered_and_activations_are_not(name, fields):
    mesh = jn.device_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    small, large = (fit_memory(name, mesh, batch_size=size, **fields) for size in (8, 512))
    assert small.collectives == large.collectives  # nothing that grows with the batch
    parameters = 4 * small.num_parameters
    assert large.collectives["all-gather"].result_bytes <= parameters
    assert large.collectives["all-reduce"].result_bytes <= parameters + 64  # and loss and metrics


def test_the_command_prints_a_table_or_json_and_names_what_is_wrong(capsys):
    assert main(["fit-memory", "lenet5", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameter_bytes"], found["collectives"]) == (4 * 61_706, {})
    assert main(["fit-memory", "lenet5", "--batch", "8"]) == 0
    assert "0.2 MiB" in capsys.readouterr().out
    for arguments, message in {
        ("--devices", "0"): "--devices is 0; give 1 or more",
        ("--gigabytes", "-1"): "--gigabytes is -1.0; give a positive number",
        ("--fsdp", "2"): "does not use 1 devices",
        ("--devices", "64"): "set JAX_NUM_CPU_DEVICES=64",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["fit-memory", "lenet5", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.four_devices
def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = jn.data_mesh(jax.devices()[:4])
    with pytest.raises(ValueError, match=r"batch size 33 .* by the 4 parts .* such as 36"):
        fit_memory("lenet5", mesh, batch_size=33)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' peak memory")
def test_the_stated_memory_is_what_the_process_takes(optimized_processes):
    script = Path(__file__).parents[1] / "memory_run.py"
    done = subprocess.run(
        [sys.executable, script, "vit_tiny16", "16"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.85 < found["stated"] / found["measured"] < 1.15
