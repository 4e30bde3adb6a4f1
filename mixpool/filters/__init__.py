"""What a filter is: tensors only.

spectrum   its power spectrum, centre frequency, orientation, bandwidth
partner    its analytic partner: the imaginary part that makes it one-sided
theory     what its centre frequency says of both poolings, in closed form
packets    the dual-tree complex wavelet packets that the theory is about
gabor, wavelets   banks of filters to start a training from
"""
