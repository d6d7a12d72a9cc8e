"""Ten small causal LMs in plain PyTorch, each spelled the way some well-known code base spells it.

Every class has `supports_padding` and `positions`: the position column that enters its
token stream ("dense": the column index; "from_mask": counted from the mask; None: no positions).
"""

from .complex_rotary import ComplexRotaryLM
from .gpt2_conv1d import GPT2Conv1D
from .half_rotary import HalfRotaryLM
from .multi_query import MultiQueryLM
from .nano_gpt import NanoGPT
from .parallel_gptj import ParallelGPTJ
from .torch_mha import TorchMHALM
from .torch_mha_weights import TorchMHAWeightsLM
from .tril_buffer import TrilBufferGPT
from .triu_inf import TriuInfLM

ZOO = {
    "nano_gpt": NanoGPT,
    "tril_buffer": TrilBufferGPT,
    "triu_inf": TriuInfLM,
    "half_rotary": HalfRotaryLM,
    "parallel_gptj": ParallelGPTJ,
    "complex_rotary": ComplexRotaryLM,
    "multi_query": MultiQueryLM,
    "torch_mha": TorchMHALM,
    "torch_mha_weights": TorchMHAWeightsLM,
    "gpt2_conv1d": GPT2Conv1D,
}
