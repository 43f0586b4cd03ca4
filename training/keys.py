"""Numbers of a training's random draws (`schedulers/draws.py`): `make_keys(seed, positions, STREAM)` are the keys of
samples, and `fold_in(keys, DRAW)` those of one draw for each."""

# Streams: samples of the training, slices of the validation, and slices of its picture.
TRAINING, VALIDATION, PREVIEW = range(3)

# Draws of one sample. `UPDATE` starts anew for every update on a batch.
AFFINE, INTENSITY, ANOMALY, ANNOTATION, UPDATE, TIMESTEP, NOISE, LABEL, BOX, CELLS, MODALITY = range(11)
