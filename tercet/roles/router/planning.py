"""Which workers an attempt at a request gets: the pair that computes and decodes it, and who encodes its images.
Pure."""

from __future__ import annotations

from dataclasses import replace

from tercet.core import GenerateRequest, Role
from tercet.roles.router.directory import Directory
from tercet.roles.router.encoders import Holders, spread
from tercet.roles.router.policy import History, Plan, choose, is_faulty


def is_encoded_apart(request: GenerateRequest, directory: Directory) -> bool:
    """Whether encode workers have a part in it."""
    return bool(request.images) and directory.encodes


def plan_for(request: GenerateRequest, history: History, directory: Directory, holders: Holders) -> Plan | None:
    """None: for now there are no workers with room for all of it."""
    if not can_be_encoded(request, directory):
        return None
    firsts = directory.with_room(directory.first)
    lasts = firsts if directory.first is directory.last else directory.with_room(directory.last)
    plan = choose(firsts, lasts, history)
    if plan is None or not is_encoded_apart(request, directory):
        return plan
    workers = directory.with_room(Role.ENCODE)
    # One that says that it cannot reach who computes the prompt is asked only if all say so.
    reach = [view for view in workers if not is_faulty(view, plan.prefill)]
    encode = spread(request.images, reach or workers, holders, history)
    return None if encode is None else replace(plan, encode=encode)


def can_be_encoded(request: GenerateRequest, directory: Directory) -> bool:
    """Whether there is room for its images, if it has any."""
    return not is_encoded_apart(request, directory) or bool(directory.with_room(Role.ENCODE))


def missing_for(request: GenerateRequest, directory: Directory) -> list[str]:
    """Roles that it needs and that have no live worker."""
    apart = is_encoded_apart(request, directory)
    return [role for role in directory.missing_roles() if apart or role != Role.ENCODE]
