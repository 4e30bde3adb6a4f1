"""A model's stem found, replaced and put back.

find       the stem in a model, by data flow
stock      the stock modules and state dicts behind a converted stem
convert    the replacement, all or nothing, and its way back
report     what it did
initialize a filter bank for training from scratch
"""
