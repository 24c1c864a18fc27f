"""The parts of a worker that have to do with images: an encoder beside an engine; an encode worker's whole; and where
embeddings land that come from encode workers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from tercet.core import Role
from tercet.kernels.kinds import Kernels
from tercet.models.sources import locate_tower, vision_digest
from tercet.models.vision.config import VisionConfig
from tercet.models.vision.tower import VisionTower
from tercet.roles.embedding_region import EmbeddingRegion
from tercet.roles.embeddings import EncodeWorkers, OwnEncoder
from tercet.roles.encode import Encode
from tercet.roles.encoder import Encoder
from tercet.roles.legs import Legs
from tercet.roles.part import Identity, Part
from tercet.roles.router.policy import capacity
from tercet.spec import ModelSpec
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import Transport
from tercet.transfer.transports.table import AUTO, in_device_memory, usable


def embedding_fingerprint(config: VisionConfig, model: ModelSpec) -> str:
    """Equal in workers between which embeddings may cross. Reads the tower's weights. Raises ModelError."""
    told = json.dumps([asdict(config), model.dtype, vision_digest(model)], sort_keys=True).encode()
    return f"embeddings-{hashlib.sha256(told).hexdigest()}"


def embedding_transports(who: Identity) -> Sequence[Transport]:
    """What embeddings cross by: what the spec names, or any if that is for the memory of GPUs, since embeddings cross
    by the host's. Raises SpecError."""
    transport = who.spec.transfer.transport
    return usable(AUTO, tls=who.tls is not None) if in_device_memory(transport) else who.transports


class Seeing(Part):
    """An encoder beside the engine that computes prompts."""

    def __init__(self, who: Identity, legs: Legs, tower: VisionTower, kernels: Kernels) -> None:
        self._who, self._legs, self._tower, self._kernels = who, legs, tower, kernels

    async def start(self) -> None:
        self._encoder = encoder_of(self._who, self._tower, self._kernels)
        self._legs.images = OwnEncoder(asyncio.get_running_loop(), self._encoder)

    def health(self) -> None:
        self._encoder.health()


class Encoding(Part):
    """An encode worker's whole."""

    def __init__(self, who: Identity, legs: Legs, tower: VisionTower, kernels: Kernels) -> None:
        self._who, self._legs, self._tower, self._kernels = who, legs, tower, kernels
        self.fingerprint = embedding_fingerprint(tower.config, who.spec.model)

    async def start(self) -> None:
        who, spec = self._who, self._who.role_spec
        self._encoder = encoder_of(who, self._tower, self._kernels, keep=_on_host)
        region = EmbeddingRegion(self._tower.config, spec.images.blocks)
        handler = Encode(self._legs, self._encoder, region, capacity(Role.ENCODE, spec.scheduler))
        transports = embedding_transports(who)
        config, on_event = who.mover_config(self.fingerprint), handler.on_event
        handler.send_by(KvSender(config, region.memory, transports, on_event, lambda: self._encoder.progress))
        self._legs.handlers[Role.ENCODE] = handler

    def health(self) -> None:
        self._encoder.health()


class Landing(Part):
    """Where a worker that computes prompts gets embeddings from encode workers."""

    def __init__(self, who: Identity, legs: Legs, config: VisionConfig) -> None:
        self._who, self._legs, self._config = who, legs, config
        self._embeddings = embedding_fingerprint(config, who.spec.model)

    async def start(self) -> None:
        who, transfer = self._who, self._who.spec.transfer
        region = EmbeddingRegion(self._config, who.role_spec.images.blocks)
        source = EncodeWorkers(asyncio.get_running_loop(), region, who.epoch, transfer.quarantine_blocks)
        config = who.mover_config(self._embeddings)
        transports = embedding_transports(who)
        source.receiver = KvReceiver(config, who.epoch, region.memory, transports, source.on_event)
        source.endpoint = source.receiver.start(who.host).encode()
        self._legs.images = source


def _on_host(embeddings: Tensor) -> Tensor:
    """A copy for the region that they cross by: on the encoder's thread, which waits for a device."""
    return embeddings.to("cpu", torch.float32, copy=True)


def encoder_of(
    who: Identity, tower: VisionTower, kernels: Kernels, keep: Callable[[Tensor], Tensor] = Tensor.clone
) -> Encoder:
    """Its thread runs already. Raises ModelError."""
    from tercet.models.vision.processor import ImageProcessor  # it imports transformers' image processors

    return Encoder(
        ImageProcessor(locate_tower(who.spec.model), tower.config).patches,
        tower.encode,
        tower.config.merge,
        who.role_spec.images,
        keep=keep,
        layers=lambda: tower.layers_done,
        prepare=partial(who.prepare_thread, kernels),
    )
