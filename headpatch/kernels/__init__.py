"""Fused kernels that adapters share. Engine-neutral: tensors in, tensors out; Triton is imported when first needed."""
