"""The stem on the GPU in Triton: convolution and pooling in one kernel, so that the convolution's output never exists.

    geometry   what a kernel has to know of a stem, as integers
    patches    pixels of the windows, as rows of a matrix;  packing  filters as its counterpart, and gradients back
    windows    channels that look at a whole pooling window: max pooling and the blurred modulus;  windows_backward
    centers    channels that look at its centre: the modulus without blur
    moments    batch statistics from the kernels' partial sums
    blocks -> launch    which kernel with which blocks and which grid
    gradients -> ops    the operator that PyTorch sees
    groups     these operators beside the reference's poolings that have no kernel

Only `patches` to `moments` and `launch` import triton, and only when an operator runs. Nothing here chooses itself:
`backend` does. The affine step, the activation and the merge are the reference's.
"""
