"""The evaluation of classifiers under shifts, from the image to the figure; `evaluate` runs it.

dataset      labelled images through timm's readers; photos, the user's own
model_input  what input a model wants
views        from a photo to a square of bytes
protocols    which crops of an image a model sees, and what is taken from its outputs
loader       their bytes, made by workers; runner, the model that sees them
shifts       what moves, and how much a stem's output then changes
stem_change  how much the output of the stem alone moves
result       values per image, their means with intervals, paired differences, the record
table, plots records side by side, for people; demo, demo_plot, the demonstration
"""
