"""The frozen language model, as it is trained through: what a chat client's question about a picture makes it answer.

N pictures   T tokens of each   E hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tercet.models.config_gguf import config_from_gguf
from tercet.models.gguf_file import GgufFile
from tercet.models.sources import load_tokenizer, locate
from tercet.models.weights import GgufWeights
from tercet.spec import ModelSpec

IMAGE_TOKEN = "<empty_output>"  # noqa: S105  # of SmolLM2's vocabulary, in whose place an embedding stands


class Speaker:
    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(ModelSpec(control_tokens_in_text=True))
        self._model = _language_model()
        self.embeddings = self._model.get_input_embeddings().weight  # [V, E]
        self._reply, self._behind = cache(self._reply_ids), cache(self._ids_behind)
        (self.image_token,) = self._tokenizer.encode(IMAGE_TOKEN)
        ids = self._prompt("")
        with torch.no_grad():  # the same before every picture
            before = torch.tensor([ids[: ids.index(self.image_token)]])
            self._before = self._model(before, use_cache=True).past_key_values

    def embedding(self, word: str) -> Tensor:
        """Of the last token of a word within a text, [E]."""
        return self.embeddings[self._tokenizer.encode(f" {word}")[-1]].float()

    def loss(self, seen: Tensor, asked: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """seen: [N, T, E], of the pictures; asked: a question about each, and its answer. -> the mean loss of a token
        of the answers, and [N], whether greedy decoding says all of an answer."""
        behind = [self._behind(question) for question, _ in asked]
        replies = [self._reply(answer) for _, answer in asked]
        length = max(len(b) + len(r) for b, r in zip(behind, replies, strict=True)) - 1
        ids, labels = torch.zeros(2, len(asked), length, dtype=torch.int64)
        labels[:] = -1
        for i, (prompt, reply) in enumerate(zip(behind, replies, strict=True)):
            known = torch.tensor([*prompt, *reply[:-1]])
            ids[i, : len(known)] = known
            labels[i, len(prompt) - 1 : len(known)] = torch.tensor(reply)
        whole = torch.cat((seen.to(self.embeddings.dtype), self.embeddings[ids]), 1)
        hidden = self._model.model(inputs_embeds=whole, past_key_values=self._cache(len(asked))).last_hidden_state
        rows, columns = (labels >= 0).nonzero(as_tuple=True)
        logits, wanted = self._model.lm_head(hidden[rows, seen.shape[1] + columns]).float(), labels[rows, columns]
        wrong = torch.zeros(len(asked)).index_add(0, rows, (logits.argmax(-1) != wanted).float())
        return functional.cross_entropy(logits, wanted), wrong == 0

    def _prompt(self, question: str) -> list[int]:
        return self._tokenizer.encode_chat([{"role": "user", "content": f"{IMAGE_TOKEN}{question}"}])

    def _ids_behind(self, question: str) -> list[int]:
        """Of the prompt, behind the picture."""
        ids = self._prompt(question)
        return ids[ids.index(self.image_token) + 1 :]

    def _reply_ids(self, answer: str) -> list[int]:
        return [*self._tokenizer.encode(answer), self._tokenizer.eos_token_ids[0]]

    def _cache(self, count: int) -> DynamicCache:
        cache = DynamicCache()
        for i, layer in enumerate(self._before.layers):
            cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), i)
        return cache


def _language_model() -> LlamaForCausalLM:
    """Of the package's GGUF, in bfloat16."""
    file = GgufFile(locate(ModelSpec()))
    config = config_from_gguf(file, 2048)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
    )
    source = GgufWeights(file, config)
    weights = {name: source.read(name) for name in source.names()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model.bfloat16().eval().requires_grad_(False)
