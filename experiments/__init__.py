"""Results that can be repeated: `python -m experiments` lists what there is."""

from experiments.harness import process

if process.is_command():
    process.exit_on_signals("run it again")
