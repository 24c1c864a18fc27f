"""A small random model in float32, the tokens that transformers gives for it, and specs of its workers.

They compute on a GPU if there is one. Else all of it runs on the CPU: not for what it says of a GPU, but so that the
tests themselves are tried.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tercet.core import Role
from tercet.spec import ClusterSpec
from tests.triton_interpreter import DEVICE

ON_GPU = DEVICE.type == "cuda"
KIND = "gpu" if ON_GPU else "cpu"
VOCAB, OUTPUTS, HIDDEN = 512, 16, 192
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200, 333, 512, 513, 700) if ON_GPU else (1, 15, 16, 17, 65, 200)
_rng = random.Random(5)
PROMPTS = [[_rng.randrange(VOCAB) for _ in range(n)] for n in LENGTHS]
PATIENCE_S = 150.0  # for an answer: kernels are compiled meanwhile, and workers start
GREEDY = {"max_tokens": OUTPUTS, "ignore_eos": True, "timeout_s": PATIENCE_S}


@functools.cache
def small_model() -> str:
    """-> its directory."""
    directory = tempfile.mkdtemp(prefix="tercet-gpu-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # so that no two tokens all but tie
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@functools.cache
def expected() -> list[list[int]]:
    """The tokens that transformers gives on the CPU, of each prompt."""
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUTS, do_sample=False, pad_token_id=0
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def spec_of(
    prefill: str = KIND, decode: str = KIND, transport: str = "tcp", kernels: str = "auto", **role: object
) -> ClusterSpec:
    """prefill, decode: pools. kernels: of workers on a GPU. role: more of what a role's spec may say."""

    def of_pool(pool: str) -> dict[str, object]:
        on_gpu = pool == "gpu"
        common = {"pool": pool, "gpus": int(on_gpu), "kernels": kernels if on_gpu else "auto"}
        return common | {"kv": {"blocks": 512}, "scheduler": {"token_budget": 256}} | role

    return ClusterSpec.model_validate(
        {
            "model": {"source": small_model(), "dtype": "float32", "max_context": 1024},
            "pools": {"cpu": {}, "gpu": {"accelerator": "gpu", "gpus": 2}},
            "roles": {Role.PREFILL: of_pool(prefill), Role.DECODE: of_pool(decode)},
            "transfer": {"transport": transport},
            "limits": {"worker_wait_s": PATIENCE_S},
        }
    )
