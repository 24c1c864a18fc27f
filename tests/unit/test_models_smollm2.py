"""SmolLM2, the embedded model, in float32: the same greedy tokens as transformers on the same dequantised weights."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers

from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.sources import load_config, load_model, load_tokenizer, locate, served_name
from tercet.spec import ModelSpec

SPEC = ModelSpec(dtype="float32")
BLOCK, BLOCKS, NEW = 16, 96, 12
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Liebe Grüße aus Zürich: heute 3 °C, morgen 12 °C. 日本語のテキスト",
    "Once upon a time, " * 40,
)
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def loaded():
    return load_model(SPEC)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(SPEC)
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def reference():
    """transformers' Llama with the file's weights, read by gguf's own reader."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = dict(hf_weight(tensor) for tensor in gguf.GGUFReader(locate(SPEC)).tensors)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def hf_weight(tensor):
    weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    if not tensor.name.startswith("blk."):
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[tensor.name[:-7]] + ".weight", weight
    _, layer, part, _ = tensor.name.split(".")
    if part in ("attn_q", "attn_k"):  # row 2i + j of a head is row 32j + i of Hugging Face's
        rows = torch.arange(len(weight)).view(-1, 64)
        weight = weight[torch.cat((rows[:, 0::2], rows[:, 1::2]), 1).flatten()]
    return f"model.layers.{layer}.{HF_NAMES[part]}.weight", weight


@pytest.fixture(scope="module")
def expected(reference, prompts):
    def greedy(ids):
        prompt = torch.tensor([ids])
        out = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist()

    return [greedy(ids) for ids in prompts]


class Sequence:
    """One request: its tokens, and scattered blocks for as many as it may get."""

    def __init__(self, ids, free):
        self.ids, self.start, self.written = list(ids), len(ids), 0
        self.table = torch.tensor([free.pop() for _ in range(-(-(len(ids) + NEW) // BLOCK))])

    def slots(self, start, stop):
        at = torch.arange(start, stop)
        return self.table[at // BLOCK] * BLOCK + at % BLOCK

    @property
    def new(self):
        return self.ids[self.start :]


def step(loaded, cache, decodes, prefills):
    """One step: a decode of each of `decodes` and the next n prompt tokens of each (sequence, n) of `prefills`."""
    pieces = [(s, 1) for s in decodes] + prefills
    rows, chunks = 0, []
    for sequence, length in pieces:
        stop = sequence.written + length
        chunks.append(PrefillChunk(rows, length, stop, sequence.table[: -(-stop // BLOCK)]))
        rows += length
    spans = [(s, s.written, s.written + n) for s, n in pieces]
    tables = [s.table for s in decodes] or [torch.zeros(0, dtype=torch.int64)]
    batch = StepBatch(
        token_ids=torch.tensor([i for s, a, b in spans for i in s.ids[a:b]]),
        positions=torch.cat([torch.arange(a, b) for _, a, b in spans]),
        slots=torch.cat([s.slots(a, b) for s, a, b in spans]),
        num_decodes=len(decodes),
        decode_block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)[: len(decodes)],
        decode_context_lens=torch.tensor([s.written + 1 for s in decodes], dtype=torch.int64),
        chunks=tuple(chunks[len(decodes) :]),
        logit_rows=torch.tensor([c.start_row + c.length - 1 for c in chunks]),
    )
    tokens = loaded.model.forward(batch, cache).argmax(-1).tolist()
    for (sequence, length), token in zip(pieces, tokens, strict=True):
        sequence.written += length
        if sequence.written == len(sequence.ids) and len(sequence.new) < NEW:
            sequence.ids.append(token)


def test_config():
    config = load_config(SPEC)
    assert served_name(SPEC) == "smollm2-135m-instruct"
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.eos_token_ids, config.max_context) == (49152, (2, 0), 2048)
    assert config.tie_word_embeddings


@pytest.mark.parametrize("budget", [10_000, 37])
def test_greedy_tokens_with_mixed_batches(budget, loaded, prompts, expected):
    """Requests join one after the other, so that steps hold decodes and chunks, whole prompts or pieces of 37."""
    free = torch.randperm(BLOCKS).tolist()
    config = loaded.config
    cache = torch.zeros(config.num_layers, BLOCKS, 2, BLOCK, config.num_kv_heads, config.head_dim)
    running, waiting = [], [Sequence(ids, free) for ids in prompts]
    everyone = list(waiting)
    while any(len(s.new) < NEW for s in everyone):
        decodes = [s for s in running if s.written == len(s.ids) - 1 and len(s.new) < NEW]
        prefills = [(s, min(budget, s.start - s.written)) for s in running if s.written < s.start]
        if waiting:
            running.append(waiting.pop(0))
        if decodes or prefills:
            step(loaded, cache, decodes, prefills)
    assert [s.new for s in everyone] == expected


def test_on_layer_comes_when_the_layer_is_written(loaded, prompts):
    config, free = loaded.config, [1, 3]
    cache = torch.zeros(config.num_layers, 4, 2, BLOCK, config.num_kv_heads, config.head_dim)
    sequence, seen = Sequence(prompts[0], free), []
    length = len(prompts[0])
    none = torch.zeros(0, 0, dtype=torch.int64)
    chunk = PrefillChunk(0, length, length, sequence.table)
    slots = sequence.slots(0, length)
    batch = StepBatch(
        torch.tensor(prompts[0]), torch.arange(length), slots, 0, none, none.flatten(), (chunk,), torch.tensor([0])
    )

    def on_layer(i):
        written = cache[:, sequence.table[0], :, : length % BLOCK].abs().sum((2, 3)).gt(0).all(-1)  # [layers, K and V]
        seen.append((i, int(written.all(-1).sum())))

    loaded.model.forward(batch, cache, on_layer)
    assert seen == [(i, i + 1) for i in range(config.num_layers)]


def test_bfloat16_is_close(loaded, prompts):
    """The same prompt in bfloat16, prefilled and then decoded token by token: near the float32 logits."""
    small = load_model(ModelSpec(dtype="bfloat16"))
    logits = []
    for model in (loaded, small):
        config = model.config
        shape = (config.num_layers, BLOCKS, 2, BLOCK, config.num_kv_heads, config.head_dim)
        cache, ids = torch.zeros(shape, dtype=model.model.dtype), prompts[1] + [500]
        sequence = Sequence(prompts[1], list(range(BLOCKS)))
        step(model, cache, [], [(sequence, sequence.start)])
        table, last = sequence.table.unsqueeze(0), sequence.start
        end = torch.tensor([last + 1])
        row = torch.tensor([0])
        batch = StepBatch(torch.tensor(ids[-1:]), end - 1, sequence.slots(last, last + 1), 1, table, end, (), row)
        logits.append(model.model.forward(batch, cache)[0])
    assert small.fingerprint != loaded.fingerprint
    assert torch.cosine_similarity(*logits, dim=0) > 0.999
