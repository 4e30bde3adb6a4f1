"""A trained network made steady as a whole: every decimation low-passed, what reads it refitted in closed form.

pictures   images for a repair: squares, crops, synthetic ones
flow       what reads what, from one pass
lowpass -> treat    layers with a low-pass; which layers get one
statistics, ridge -> repair    norm layers and linear layers brought back to what the stock network computes
agreement -> report    how far from stock, how steady
stabilize  the whole, and the way back
files      the result in a file, and back
"""
