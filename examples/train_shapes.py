"""Train a small vision tower to stand before the frozen SmolLM2-135M, on synthetic pictures.

    python -m examples.train_shapes [--out examples/shapes/model]

First sixteen embeddings, the notes on a picture, learn to make the language model answer questions about what they say
(shapes/notes.py); there are few of them, so it takes few passes through the model. Then the tower learns to write the
notes that belong to a picture, which takes many pictures and no language model. Both are so many steps, from seeds.

Takes the packages of `make setup`. The weights are those of an Idefics3 model without its text model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer

from examples.shapes.notes import Notes
from examples.shapes.pictures import HELD_OUT, scene, seen
from examples.shapes.questions import QUESTIONS, answer, asked
from examples.shapes.speaker import IMAGE_TOKEN, Speaker

SIDE = 64  # pixels that the tower sees
VISION = {
    "model_type": "idefics3_vision",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": 8,
}
SCALE_FACTOR = 2  # squares of so many patches a side become one embedding
Learnt = tuple[Tensor, dict[str, float]]  # the loss of a batch, and what share of it was right in which respect
NOISE = 0.5  # that the notes learn to be understood with, in units of their scale
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%} IMAGE {%- endfor -%}
{%- for part in message.content if part.type == 'text' -%} {{ part.text }} {%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


class Tower(nn.Module):
    """Idefics3's vision model and connector, under the names of its weights."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.vision_model, self.connector = Idefics3VisionTransformer(config.vision_config), Idefics3Connector(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """-> [N, T, hidden size of the text]."""
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.connector(self.vision_model(pixels).last_hidden_state)
        return out.float()


def pixels_of(images: Iterable[Image.Image]) -> Tensor:
    """[N, 3, SIDE, SIDE], as the directory's preprocessor_config.json says."""
    small = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learn(name: str, module: nn.Module, rate: float, steps: int, loss_of: Callable[[int], Learnt]) -> None:
    """Adam, the rate rising for some steps and falling to 0 as a cosine. loss_of: of a step."""
    optimizer = torch.optim.Adam(module.parameters(), rate, betas=(0.9, 0.98))
    rising, recent = max(1, min(200, steps // 20)), dict[str, float]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=steps)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))
            loss, shares = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            for each, share in shares.items():
                recent[each] = recent.get(each, share) + 0.05 * (share - recent.get(each, share))
            told = f"{name}, right: " + ", ".join(f"{each} {share:.0%}" for each, share in recent.items())
            bar.update(task, advance=1, description=told)
            if step % 100 == 99:
                bar.console.print(f"step {step + 1} of {told}; loss {loss.item():.3f}", highlight=False)


def learn_notes(speaker: Speaker, steps: int, batch: int) -> Notes:
    """From scenes and questions; no picture is drawn."""
    scale = speaker.embeddings.float().std().item()
    notes, chance = Notes(speaker.embedding, scale), random.Random(0)  # noqa: S311

    def loss_of(_: int) -> Learnt:
        scenes, kinds = [scene(chance) for _ in range(batch)], chance.choices([*QUESTIONS], k=batch)
        spoken = [
            (asked(kind, chance.randrange(len(QUESTIONS[kind])), one), answer(kind, one))
            for one, kind in zip(scenes, kinds, strict=True)
        ]
        written = notes(scenes)
        loss, exact = speaker.loss(written + NOISE * scale * torch.randn_like(written), spoken)
        return loss, {"answers": exact.float().mean().item()}

    learn("notes", notes, 0.1, steps, loss_of)
    return notes.requires_grad_(False)


def learn_tower(tower: Tower, notes: Notes, steps: int, batch: int) -> None:
    learn("tower", tower, 1e-3, steps, lambda at: read_off(tower, notes, range(at * batch, (at + 1) * batch)))


def read_off(tower: Tower, notes: Notes, seeds: Iterable[int]) -> Learnt:
    """`Notes.loss` of the pictures of these seeds."""
    scenes, images = zip(*map(seen, seeds), strict=True)
    return notes.loss(tower(pixels_of(images)), scenes)


def config_of(image_token: int, hidden_size: int) -> dict[str, object]:
    """config.json; hidden_size: of the text model."""
    text = {"model_type": "llama", "hidden_size": hidden_size}
    own = {"model_type": "idefics3", "scale_factor": SCALE_FACTOR, "image_token_id": image_token}
    return own | {"text_config": text, "vision_config": VISION}


def save(tower: Tower, config: dict[str, object], image_token: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value.detach().bfloat16().contiguous() for name, value in tower.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    processor = {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": False,
        "size": {"longest_edge": SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for name, content in (("config", config), ("preprocessor_config", processor)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", image_token))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shapes" / "model")
    parser.add_argument("--note-steps", type=int, default=300, help="of 16 questions")
    parser.add_argument("--tower-steps", type=int, default=1500, help="of 64 pictures")
    parser.add_argument(
        "--threads", type=int, default=2, help="other weights come of another number, as of another CPU"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    speaker = Speaker()
    notes = learn_notes(speaker, arguments.note_steps, 16)
    config = config_of(speaker.image_token, speaker.embeddings.shape[1])
    torch.manual_seed(1)
    tower = Tower(Idefics3Config(**config))
    learn_tower(tower, notes, arguments.tower_steps, 64)
    save(tower, config, IMAGE_TOKEN, arguments.out)
    with torch.no_grad():
        _, shares = read_off(tower, notes, range(HELD_OUT, HELD_OUT + 500))
    print("written rightly, of 500 other pictures:", ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))


if __name__ == "__main__":
    main()
