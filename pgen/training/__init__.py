"""What `pgen.run.Run` is made of.

loop.py         the training loop: steps, roll-backs, early stopping, interruptions
batches.py      rows and random numbers as pure functions of the seed and the step
players.py      who optimises what: parameters, loss, optimiser
optimizers.py   optimisers, learning-rate schedules, moving averages
checkpoints.py  checkpoints of a run in progress
options.py      what each field of a run may be
"""
