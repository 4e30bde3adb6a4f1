"""The stem on the GPU in Triton: convolution and pooling in one kernel, so that the convolution's output never exists.

    geometry   what a kernel has to know of a stem, as integers
    patches    pixels of the windows, as rows of a matrix;  packing  filters as its counterpart, and gradients back
    windows    channels that look at a whole pooling window: max pooling and the blurred modulus;  windows_backward
    centers    channels that look at its centre: the modulus without blur
    affine     scale, shift and ReLU at pooled size;  moments  batch statistics from the kernels' partial sums
    blocks -> launch    which kernel with which blocks and which grid
    gradients -> affine_op -> ops    the operators that PyTorch sees;  flops  their cost
    groups     these operators beside the reference's poolings that have no kernel

Only `patches` to `affine` and `launch` import triton, and only when an operator runs. Nothing here chooses itself:
`backend` does. The stem does not use the operators' epilogue: its norm layer is the reference's.
"""
