"""The operation: convolution and pooling as functions of tensors.

geometry   where a convolution and a pooling look
modes      how an operation runs: one by one, compiled, transformed, in half precision
modulus, moments   the parts with derivatives of their own
reference  the definition in plain PyTorch
norm       the norm layer after pooling
functional `mixpool2d`
backend -> fused   the same in Triton, and when it runs
"""
