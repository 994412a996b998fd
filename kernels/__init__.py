"""The two operations that decide the speed of this code base: a file each, re-exported here."""
from kernels.causal_attention import causal_attention, causal_attention_reference, causal_attention_triton
from kernels.nearest_code import nearest_code, nearest_code_reference, nearest_code_triton
