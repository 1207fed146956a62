import copy

import pytest
import torch
from torch import nn

from data2vec_train.encoders.base import EncoderOutput, ModalityEncoder
from data2vec_train.objective.teacher import EMATeacher, tau_at


class Toy(ModalityEncoder):
    """Two linear maps with dropout between them, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.depth, self.prenet_depth, self.num_prefix_tokens, self.grid = 4, 1, 0, 0, None
        self.embedder = nn.Linear(3, 4)
        self.mix = nn.Linear(4, 4)
        self.mixture = nn.Linear(4, 4)  # a name that starts like another one
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("index", torch.arange(5))
        self.register_buffer("mean", torch.zeros(2))

    def embed(self, inputs, attention_mask):
        return self.embedder(inputs), attention_mask

    def contextualize(self, tokens, attention_mask, *, masks=None, mode="replace", target_layer=None, top_k_layers=0):
        x = self.mixture(self.dropout(self.mix(tokens)))
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=[x] * top_k_layers)


@pytest.fixture
def student() -> Toy:
    torch.manual_seed(0)
    return Toy()


def teacher_of(student: Toy, *, share_embeddings: bool = False, copied: tuple[str, ...] = ()) -> EMATeacher:
    return EMATeacher(student, share_embeddings=share_embeddings, copied=list(copied))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def change(student: nn.Module) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.randn(parameter.shape))


def test_the_teacher_starts_as_a_copy_that_shares_no_memory(student):
    teacher = teacher_of(student)
    before = weights(student)
    change(student)
    for name, parameter in teacher.encoder.named_parameters():
        assert torch.equal(parameter, before[name])


def test_after_n_steps_the_teacher_is_the_closed_form(student):
    """theta_n = prod(tau) theta_0 + sum_k (1 - tau_k) prod_{j > k} tau_j s_k, in float64."""
    teacher, taus = teacher_of(student), [tau_at(n, start=0.5, end=0.9, anneal_steps=4) for n in range(1, 7)]
    values = [weights(student)]
    for tau in taus:
        change(student)
        values.append(weights(student))
        teacher.update(student, tau)
    factors = [torch.tensor(taus[k:], dtype=torch.float64).prod() for k in range(len(taus) + 1)]
    for name, parameter in teacher.encoder.named_parameters():
        wanted = factors[0] * values[0][name].double()
        for k, tau in enumerate(taus, start=1):
            wanted += (1 - tau) * factors[k] * values[k][name].double()
        torch.testing.assert_close(parameter.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_tau_of_one_or_more_freezes_the_teacher(student, tau):
    teacher = teacher_of(student)
    before = weights(teacher)
    change(student)
    teacher.update(student, tau)
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


def test_tau_of_zero_copies(student):
    teacher = teacher_of(student)
    change(student)
    teacher.update(student, 0.0)
    for name, parameter in teacher.encoder.named_parameters():
        torch.testing.assert_close(parameter, student.get_parameter(name))


def test_prefixes_in_copied_are_copied_and_nothing_else(student):
    teacher = teacher_of(student, copied=("mixture.", "embedder.bias"))
    before = weights(teacher.encoder)
    change(student)
    teacher.update(student, 0.75)
    equal = {n for n, p in teacher.encoder.named_parameters() if torch.equal(p, student.get_parameter(n))}
    assert equal == {"mixture.weight", "mixture.bias", "embedder.bias"}
    for name in ("mix.weight", "mix.bias", "embedder.weight"):
        wanted = 0.75 * before[name] + 0.25 * student.get_parameter(name)
        torch.testing.assert_close(teacher.encoder.get_parameter(name), wanted)


def test_copied_parameters_follow_a_student_even_when_averaging_is_off(student):
    teacher = teacher_of(student, copied=("mixture.",))
    change(student)
    teacher.update(student, 1.0)
    assert torch.equal(teacher.encoder.mixture.weight, student.mixture.weight)


def test_frozen_parameters_of_the_student_are_copied(student):
    student.mix.weight.requires_grad_(False)
    teacher = teacher_of(student)
    change(student)
    teacher.update(student, 0.9)
    assert torch.equal(teacher.encoder.mix.weight, student.mix.weight)
    assert not torch.equal(teacher.encoder.mix.bias, student.mix.bias)


def test_a_prefix_that_matches_nothing_is_an_error(student):
    with pytest.raises(ValueError, match="starts with 'conv'.*mix.weight"):
        teacher_of(student, copied=("conv",))


def test_integer_and_float_buffers_are_copied_not_averaged(student):
    teacher = teacher_of(student)
    student.index.copy_(torch.tensor([4, 3, 2, 1, 0]))
    student.mean.fill_(8.0)
    teacher.update(student, 0.999)
    assert teacher.encoder.index.tolist() == [4, 3, 2, 1, 0]
    assert teacher.encoder.index.dtype == torch.int64
    assert teacher.encoder.mean.tolist() == [8.0, 8.0]


# ------------------------------------------------------------------------------------------------------- forward


def run(teacher: EMATeacher, student: Toy, inputs: torch.Tensor, mask=None):
    embedded = student.embed(inputs, mask)
    return embedded, teacher(inputs, mask, student_tokens=embedded, target_layer="ffn", top_k_layers=1)


def test_shared_embeddings_start_from_the_students_tokens(student):
    teacher, inputs = teacher_of(student, share_embeddings=True), torch.randn(2, 5, 3)
    change(student)  # now an embedding of the teacher's own would differ
    mask = torch.ones(2, 5, dtype=torch.bool)
    (tokens, _), (output, token_mask) = run(teacher, student, inputs, mask)
    wanted = teacher.encoder.mixture(teacher.encoder.mix(tokens))
    torch.testing.assert_close(output.tokens, wanted)
    assert token_mask is mask
    assert not [name for name, _ in teacher.named_parameters() if "embedder" in name]
    teacher.update(student, 0.5)  # and the missing part disturbs no update


def test_an_embedding_of_its_own_is_used_when_nothing_is_shared(student):
    teacher, inputs = teacher_of(student), torch.randn(2, 5, 3)
    before = copy.deepcopy(student).eval()
    change(student)
    _, (output, _) = run(teacher, student, inputs)
    torch.testing.assert_close(output.tokens, before(inputs).tokens)


@pytest.mark.parametrize("share", [True, False])
def test_no_gradient_flows_into_or_through_the_teacher(student, share):
    teacher, inputs = teacher_of(student, share_embeddings=share), torch.randn(2, 5, 3, requires_grad=True)
    (tokens, _), (output, _) = run(teacher, student, inputs)
    assert tokens.requires_grad
    assert not output.tokens.requires_grad
    assert not any(layer.requires_grad for layer in output.layers)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_drops_nothing_even_in_training(student):
    module = nn.ModuleDict({"student": student, "teacher": teacher_of(student)}).train()
    assert student.dropout.training
    assert not any(child.training for child in module["teacher"].modules())
    inputs = torch.randn(2, 5, 3)
    first, other = (run(module["teacher"], student, inputs)[1][0].tokens for _ in range(2))
    assert torch.equal(first, other)


# ------------------------------------------------------------------------------------------------- half precision


def test_the_teacher_of_a_bfloat16_student_is_float32(student):
    teacher = teacher_of(student.bfloat16())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert teacher.encoder.index.dtype == torch.int64


def test_the_teacher_stays_float32_when_its_parent_is_converted(student):
    """As Lightning's `bf16-true` does with the whole module."""
    module = nn.ModuleDict({"student": student, "teacher": teacher_of(student)}).to(torch.bfloat16)
    assert {parameter.dtype for parameter in module["student"].parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in module["teacher"].parameters()} == {torch.float32}


def test_updates_below_the_resolution_of_bfloat16_accumulate(student):
    """Weights at 1, student at 2: a step of 2e-4 is far below bfloat16's 2^-7, and 500 of them make 1 - 0.9998^500."""
    student.bfloat16()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1.0)
    teacher = teacher_of(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(2.0)
    teacher.update(student, 0.9998)
    moved = teacher.encoder.mix.weight - 1
    assert (moved > 0).all()
    assert moved.max().item() == pytest.approx(2e-4, rel=1e-2)
    for _ in range(499):
        teacher.update(student, 0.9998)
    torch.testing.assert_close(teacher.encoder.mix.weight, torch.full((4, 4), 2 - 0.9998**500), rtol=0, atol=1e-4)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
