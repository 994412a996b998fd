"""The two operations that decide the speed of this code base, a file each."""
from kernels.causal_attention import causal_attention, causal_attention_reference
from kernels.nearest_code import nearest_code, nearest_code_reference

__all__ = ["causal_attention", "causal_attention_reference", "nearest_code", "nearest_code_reference"]
