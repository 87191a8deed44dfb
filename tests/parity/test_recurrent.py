"""Recurrent stacks against torch.nn.RNN, LSTM and GRU. Optional: run with `-m parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.recurrence.cells import ElmanCell
from jaxnets.models.recurrent import Recurrent

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
pytestmark = pytest.mark.parity

SIZE, CHANNELS, TIME = 5, 3, 7
LENGTHS = np.array([7, 3, 1, 5], np.int32)
NETWORKS = {
    "rnn": ("rnn", "RNN", {}),
    "rnn_relu": (ElmanCell(activation=jax.nn.relu), "RNN", {"nonlinearity": "relu"}),
    "lstm": ("lstm", "LSTM", {}),
    "gru": ("gru", "GRU", {}),
}


def torch_parameters(network, name, *, gradients):
    """Return torch's parameters, or their gradients, under the names of `Recurrent`."""

    def array(parameter):
        return np.array((parameter.grad if gradients else parameter.detach()).numpy())

    params = {}
    for index in range(network.num_layers):
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            if suffix and not network.bidirectional:
                continue
            parts = {
                key: array(getattr(network, f"{key}_l{index}{suffix}"))
                for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            layer = {
                "input_kernel": parts["weight_ih"].T,
                "recurrent_kernel": parts["weight_hh"].T,
                # torch adds two biases; the gradient of each is the gradient of their sum.
                "bias": parts["bias_ih"] + (0 if gradients else parts["bias_hh"]),
            }
            if name == "gru":
                inner = 2 * SIZE  # the reset gate multiplies the candidate's second bias
                layer["candidate_bias"] = parts["bias_hh"][inner:]
                layer["bias"][inner:] = parts["bias_ih"][inner:]
            params[f"{direction}_{index}"] = layer
    return params


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_and_its_gradients_equal_torch(name, bidirectional, lengths):
    cell, kind, options = NETWORKS[name]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    theirs = getattr(torch.nn, kind)(
        CHANNELS, SIZE, num_layers=2, batch_first=True, bidirectional=bidirectional, **options
    )
    ours = Recurrent(SIZE, cell=cell, num_layers=2, bidirectional=bidirectional)
    x = rng.normal(size=(4, TIME, CHANNELS)).astype(np.float32)
    states = [
        rng.normal(size=(2 * (1 + bidirectional), 4, SIZE)).astype(np.float32)
        for _ in range(2 if name == "lstm" else 1)
    ]
    names = list(ours.zero_carry(1))  # torch's order: layer by layer, forward first
    start = {key: tuple(state[i] for state in states) for i, key in enumerate(names)}

    tx = torch.tensor(x, requires_grad=True)
    tstates = tuple(torch.tensor(state, requires_grad=True) for state in states)
    packed = tx
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            tx, torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
    toutputs, tfinal = theirs(packed, tstates if name == "lstm" else tstates[0])
    if lengths is not None:
        toutputs, _ = torch.nn.utils.rnn.pad_packed_sequence(toutputs, batch_first=True)
    tfinal = tfinal if name == "lstm" else (tfinal,)
    final = {
        key: tuple(state.detach().numpy()[i] for state in tfinal) for i, key in enumerate(names)
    }

    def run(params, x, start):
        return ours.apply({"params": params}, x, lengths, carry=start)

    params = torch_parameters(theirs, name, gradients=False)
    actual, pullback = jax.vjp(run, params, jnp.asarray(x), start)
    assert_close(actual, (toutputs.detach().numpy(), final))

    noise = jax.tree.map(lambda y: rng.normal(size=y.shape).astype(np.float32), actual)
    loss = (toutputs * torch.tensor(noise[0])).sum()
    for index, state in enumerate(tfinal):
        stacked = np.stack([noise[1][key][index] for key in names])
        loss = loss + (state * torch.tensor(stacked)).sum()
    loss.backward()
    start_gradients = {
        key: tuple(state.grad.numpy()[i] for state in tstates) for i, key in enumerate(names)
    }
    expected = (torch_parameters(theirs, name, gradients=True), tx.grad.numpy(), start_gradients)
    assert_close(pullback(jax.tree.map(jnp.asarray, noise)), expected)


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b).max()))
