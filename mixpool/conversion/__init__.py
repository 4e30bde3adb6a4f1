"""A model's stem found, replaced and put back.

find       the stem in a model, by data flow
stock      the stock modules and state dicts behind a converted stem
swap       the steps of the replacement, each with its way back; placeholders where the parts were
convert    the replacement, all or nothing, and `revert`
report     what it did
checkpoint files of weights, whoever wrote them
initialize a filter bank for training from scratch
"""
