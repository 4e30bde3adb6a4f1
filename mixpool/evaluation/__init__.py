"""The evaluation of classifiers under shifts, from the image to the figure; `evaluate` runs it.

views        from a photo to a square of bytes, and what input a model wants
protocols    which crops of an image a model sees, and what is taken from its outputs
loader       these crops, made by workers
stem_change  how much the output of the stem alone moves
result       values per image, their means with intervals, paired differences, the record
table, plots records side by side, for people
"""
