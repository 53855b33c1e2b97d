"""Roles: adapters on one frozen base behave as three separate copies do, gradient by gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import some_state
from stepladder.backbones import backbones
from stepladder.roles import FAKE_SCORE, STUDENT, AdapterRoles, CopyRoles

NAMES = sorted(backbones())


def randomise(parameters, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def states(backbone, seed=0):
    x = some_state(backbone, torch.Generator().manual_seed(seed))
    return x, torch.tensor([700.0, 300.0]), backbone.encode(["a red circle", "a star"])


def tangled_losses(roles, backbone):
    """Three roles called in turn before any backward, as one training update does."""
    x, t, conditioning = states(backbone)
    student = roles.student(x, t, conditioning)
    with torch.no_grad():
        real = roles.teacher(student.x0.detach(), t, conditioning)
    fake = roles.fake_score(student.x0.detach(), t, conditioning)
    student_again = roles.student(0.5 * x, t, conditioning)
    return (student.x0 - real.x0).square().mean() + student_again.eps.mean(), (fake.x0 - student.x0.detach()).square().mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_equal_those_of_three_separate_copies(name, checkpointing):
    shared = backbones()[name].tiny()
    roles = AdapterRoles(shared, rank=4, gradient_checkpointing=checkpointing)
    for seed, role in enumerate((STUDENT, FAKE_SCORE)):
        randomise(roles.parameters(role), seed)
    shared.network.train(checkpointing)
    student_loss, fake_loss = tangled_losses(roles, shared)
    fake_loss.backward()
    student_loss.backward()

    class Separate:
        """Three networks of their own, each with at most one adapter."""

    separate = Separate()
    for role in (STUDENT, FAKE_SCORE, "teacher"):
        own = backbones()[name].tiny()
        own.network.load_state_dict(clean(shared))
        single = AdapterRoles(own, rank=4)
        if role != "teacher":
            with torch.no_grad():
                for key, parameter in single.parameters(role).items():
                    parameter.copy_(roles.parameters(role)[key])
        setattr(separate, role, getattr(single, role))
        setattr(separate, f"{role}_parameters", single.parameters(role) if role != "teacher" else {})
    student_loss, fake_loss = tangled_losses(separate, shared)
    student_loss.backward()
    fake_loss.backward()
    for role in (STUDENT, FAKE_SCORE):
        largest = max(parameter.grad.abs().max().item() for parameter in roles.parameters(role).values())
        for key, parameter in getattr(separate, f"{role}_parameters").items():
            torch.testing.assert_close(
                roles.parameters(role)[key].grad, parameter.grad, rtol=1e-4, atol=1e-6 * max(1, largest), msg=key
            )
        assert any(parameter.grad.abs().max() > 0 for parameter in roles.parameters(role).values())


def clean(backbone):
    """The base's own weights, without adapters."""
    tensors = backbone.network.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items() if "lora_" not in name}


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_is_bit_equal_to_the_base(name):
    plain, shared = backbones()[name].tiny(), backbones()[name].tiny()
    shared.network.load_state_dict(plain.network.state_dict())
    roles = AdapterRoles(shared, rank=4)
    randomise(roles.parameters(STUDENT), 0)
    x, t, conditioning = states(shared)
    with torch.no_grad():
        roles.student(x, t, conditioning)
        expected = plain.denoise(plain.network, x, t, conditioning)
        got = roles.teacher(x, t, conditioning)
        moved = roles.student(x, t, conditioning)
    assert torch.equal(got.x0, expected.x0)
    assert not torch.equal(moved.x0, expected.x0)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_base(name):
    backbone = backbones()[name].tiny()
    roles = AdapterRoles(backbone, rank=4)
    x, t, conditioning = states(backbone)
    roles.student(x, t, conditioning).x0.sum().backward()
    for key, parameter in backbone.network.named_parameters():
        if "lora_" not in key or ".fake_score." in key:
            assert parameter.grad is None, key


@pytest.mark.parametrize("name", NAMES)
def test_fresh_roles_all_agree_with_the_teacher(name):
    backbone = backbones()[name].tiny()
    x, t, conditioning = states(backbone)
    for roles in (AdapterRoles(backbone, rank=2), CopyRoles(backbones()[name].tiny())):
        with torch.no_grad():
            teacher = roles.teacher(x, t, conditioning).x0
            torch.testing.assert_close(roles.student(x, t, conditioning).x0, teacher)
            torch.testing.assert_close(roles.fake_score(x, t, conditioning).x0, teacher)


def test_copies_share_nothing():
    backbone = backbones()["sd3"].tiny()
    before = copy.deepcopy(backbone.network.state_dict())
    roles = CopyRoles(backbone)
    randomise(roles.parameters(STUDENT), 0)
    randomise(roles.parameters(FAKE_SCORE), 1)
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, before[name])
