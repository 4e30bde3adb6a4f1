"""Which channels take the modulus, and why.

images, pictures   what filters are shown: the user's images, or synthetic pictures
compare    two poolings of the same maps
predict -> stats   what both poolings of a filter will do on photographs, from its weights
plan, rules        the decision and its reasons
calibrate  the swapped channels' affine maps
plot       the filters as a picture
"""
