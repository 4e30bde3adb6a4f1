"""The stem as one module.

parts      which modules of a stock stem it can take over
module     MixPoolStem
"""
