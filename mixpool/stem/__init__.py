"""The stem as one module.

parts      which modules of a stock stem it can take over
state      a plan as numbers in a checkpoint, and what follows from it
module     MixPoolStem
"""
