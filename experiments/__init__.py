"""Results that can be repeated: `python -m experiments` lists what there is."""
