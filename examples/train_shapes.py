"""Train a small vision tower and its projection in front of the frozen SmolLM2-135M, on synthetic pictures.

    python examples/train_shapes.py [--minutes 35] [--out examples/shapes/model]

First the tower alone learns to name what a scene is made of (it is small, so it sees many pictures), then tower and
projection learn to make the language model answer. Both parts stop by the clock; everything else is seeded. Takes the
packages of `make setup`. The weights are those of an Idefics3 model without its text model.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from shapes.pictures import COLOURS, NUMBERS, PLACES, SHAPES, SIDE, Scene, picture, question, scene
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, Idefics3Config, LlamaConfig, LlamaForCausalLM
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer

from tercet.models.config_gguf import config_from_gguf
from tercet.models.gguf_file import GgufFile
from tercet.models.sources import load_tokenizer, locate
from tercet.models.weights import GgufWeights
from tercet.spec import ModelSpec

IMAGE_TOKEN = "<empty_output>"  # noqa: S105  # of SmolLM2's vocabulary, in whose place an embedding stands
TOKENS = 16  # of a picture
KINDS = (*SHAPES, "digit")
VISION = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": 8,
}
Loss = Callable[[list[Scene], Tensor, list[tuple[str, str, str]]], Tensor]
HELD_OUT = 10**9  # seeds from here on are for tests


def pixels_of(images: list) -> Tensor:
    """As the model's preprocessor_config.json says: [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


class Tower(nn.Module):
    """Idefics3's vision model and connector, under the names of its weights."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.vision_model, self.connector = Idefics3VisionTransformer(config.vision_config), Idefics3Connector(config)

    def features(self, pixels: Tensor) -> Tensor:
        return self.vision_model(pixels).last_hidden_state

    def forward(self, pixels: Tensor) -> Tensor:
        """-> [N, TOKENS, hidden size of the text]."""
        return self.connector(self.features(pixels))


class Heads(nn.Module):
    """What the first part learns by: one guess for each property of a scene, from the mean and from the largest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (len(KINDS), len(COLOURS), len(NUMBERS), len(PLACES), 10)
        self.heads = nn.ModuleList(nn.Linear(2 * width, size) for size in sizes)

    def loss(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        pooled = torch.cat((features.mean(1), features.amax(1)), -1)
        labels = torch.tensor([
            [
                KINDS.index(s.kind), [*COLOURS].index(s.colour), s.count - 1,
                PLACES.index(s.place) if s.place else -1, -1 if s.digit is None else s.digit,
            ]
            for s in scenes
        ])  # fmt: skip
        losses = [
            functional.cross_entropy(head(pooled).float(), labels[:, i], ignore_index=-1)
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()


def language_model() -> LlamaForCausalLM:
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


class Speaker:
    """The frozen language model, asked about pictures as a chat client would."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(ModelSpec(control_tokens_in_text=True))
        self._model = language_model()
        (self.image_token,) = self._tokenizer.encode(IMAGE_TOKEN)
        before, _ = self._prompt("?")
        with torch.no_grad():  # the same before every picture
            self._before = self._model(torch.tensor([before]), use_cache=True).past_key_values

    def answers(self, seen: Tensor, asked: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """seen [N, TOKENS, E], and questions with their answers -> the loss, and whether each answer, to its end, is
        what greedy decoding says."""
        prompts = [self._prompt(text)[1] for text, _ in asked]
        replies = [[*self._tokenizer.encode(text), self._tokenizer.eos_token_ids[0]] for _, text in asked]
        length = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
        ids, labels = torch.zeros(2, len(asked), length, dtype=torch.int64)
        labels[:] = -1
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            ids[i, : len(prompt) + len(reply)] = torch.tensor([*prompt, *reply])
            labels[i, len(prompt) - 1 : len(prompt) + len(reply) - 1] = torch.tensor(reply)
        words = self._model.get_input_embeddings()(ids)
        hidden = self._model.model(
            inputs_embeds=torch.cat((seen.to(words.dtype), words), 1), past_key_values=self._cache(len(asked))
        ).last_hidden_state[:, TOKENS:]
        said = labels >= 0
        logits = self._model.lm_head(hidden[said]).float()
        wrong = torch.zeros(len(asked)).index_add(0, said.nonzero()[:, 0], (logits.argmax(-1) != labels[said]).float())
        return functional.cross_entropy(logits, labels[said]), wrong == 0

    def _prompt(self, text: str) -> tuple[list[int], list[int]]:
        """-> the ids before and behind the picture."""
        ids = self._tokenizer.encode_chat([{"role": "user", "content": f"{IMAGE_TOKEN}{text}"}])
        at = ids.index(self.image_token)
        return ids[:at], ids[at + 1 :]

    def _cache(self, count: int) -> DynamicCache:
        cache = DynamicCache()
        for i, layer in enumerate(self._before.layers):
            cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), i)
        return cache


def examples(seed: int, count: int) -> tuple[list[Scene], Tensor, list[tuple[str, str, str]]]:
    chance = random.Random(seed)  # noqa: S311  # pictures, not secrets
    scenes = [scene(chance) for _ in range(count)]
    return scenes, pixels_of([picture(s, chance) for s in scenes]), [question(s, chance) for s in scenes]


def learn(
    tower: Tower, parameters: list[nn.Parameter], loss_of: Loss, seconds: float, batch: int, rate: float, name: str
) -> None:
    """AdamW, the rate rising for a twentieth of the time and falling to 0 as a cosine."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.02)
    start, step, mean = time.monotonic(), 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=1.0)
        while (done := (time.monotonic() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(done / 0.05 + 1e-3, 0.5 * (1 + np.cos(np.pi * done)))
            loss = loss_of(*examples(step * batch if name == "tower" else 10**8 + step * batch, batch))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step, mean = step + 1, 0.98 * mean + 0.02 * loss.item()
            bar.update(task, completed=done, description=f"{name}: {step * batch} pictures, loss {mean:.3f}")
            if step % 200 == 0:
                bar.console.print(f"{name} {done:.2f} {step * batch} {mean:.4f}")


@torch.no_grad()
def held_out(tower: Tower, speaker: Speaker, count: int) -> dict[str, float]:
    """Share of exact answers to pictures that the training did not see, by what was asked for."""
    right, total = Counter[str](), Counter[str]()
    for at in range(0, count, 50):
        _, pixels, asked = examples(HELD_OUT + at, 50)
        _, exact = speaker.answers(tower(pixels), [(q, a) for _, q, a in asked])
        for (about, _, _), good in zip(asked, exact.tolist(), strict=True):
            right[about] += good
            total[about] += 1
    return {about: right[about] / total[about] for about in sorted(total)}


def save(tower: Tower, config: Idefics3Config, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value.detach().bfloat16().contiguous() for name, value in tower.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "idefics3", "scale_factor": config.scale_factor, "image_token_id": config.image_token_id}
    vision = VISION | {"model_type": "idefics3_vision"}
    (out / "config.json").write_text(json.dumps(fields | {"vision_config": vision}, indent=2) + "\n")
    processor = {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": False,
        "do_pad": True,
        "size": {"longest_edge": SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shapes" / "model")
    parser.add_argument("--held-out", type=int, default=2000, help="pictures to test with")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    speaker = Speaker()
    text = {"model_type": "llama", "hidden_size": 576}
    config = Idefics3Config(text_config=text, vision_config=VISION, image_token_id=speaker.image_token, scale_factor=2)
    tower = Tower(config)
    heads = Heads(VISION["hidden_size"])
    seconds = arguments.minutes * 60

    def guessed(scenes: list[Scene], pixels: Tensor, _: list) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return heads.loss(tower.features(pixels), scenes)

    def said(_: list[Scene], pixels: Tensor, asked: list) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower(pixels)
        return speaker.answers(seen, [(q, a) for _, q, a in asked])[0]

    learn(tower, [*tower.vision_model.parameters(), *heads.parameters()], guessed, seconds * 0.35, 64, 1e-3, "tower")
    learn(tower, [*tower.parameters()], said, seconds * 0.65, 32, 5e-4, "answers")
    save(tower, config, arguments.out)
    for about, share in held_out(tower, speaker, arguments.held_out).items():
        print(f"{about:8} {share:.1%}")


if __name__ == "__main__":
    main()
