"""Training on timm's own parts, from the options to the checkpoint; `train` runs them.

options        what a run can be told: timm's keys, and a few of ours
configuration  those options, read from a YAML file and the command line
data           batches that depend on the seed, the epoch and the position alone
model          the network, its conversion, and its stock twin as teacher
splits         both data sets, compared with each other and with the model
checks         what can be found out before hours are spent
run            all of it put together, and where the run stands
loop           one epoch of training, one validation
saving         which state is saved, and how all processes get it back
state_file     the whole state of a run in one file, written all or nothing
curves         what a run leaves for people to look at
"""
