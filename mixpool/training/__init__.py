"""Training on timm's own parts, from the options to the checkpoint; `mixpool.train` runs them.

options     what a configuration can say: timm's keys, read from YAML and the command line
data        batches that depend on the seed, the epoch and the position alone
model       the network, its stock twin as teacher, and what goes around it
checks      what can be found out before hours are spent
checkpoint  the whole state of a run in one file, written all or nothing
"""
