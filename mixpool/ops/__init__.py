"""The operation: convolution and pooling as functions of tensors.

geometry   where a convolution and a pooling look
modes      how an operation runs: one by one, compiled, transformed, in half precision
modulus, moments   the parts with derivatives of their own
reference  the poolings in plain PyTorch, and their table
norm       the norm layer after pooling
functional the one pass, and `mixpool2d`
renamed    keywords of version 0.1, refused with their present spelling
backend -> fused   the same in Triton, and when it runs
"""
