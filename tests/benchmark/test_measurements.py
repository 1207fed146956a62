"""What follows from measurements, and when nothing may follow from them."""

import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from data2vec_train.benchmark import context
from data2vec_train.benchmark.agreement import gradients_agree, outputs_agree
from data2vec_train.benchmark.attention import measure_attention
from data2vec_train.benchmark.context import Arithmetic, Bench
from data2vec_train.benchmark.encoder import OURS, SDPA, EncoderRun, compare, measure_encoder, write_weights
from data2vec_train.benchmark.measurements import Agreement, Arm, Case
from data2vec_train.benchmark.memory import peak_memory
from data2vec_train.benchmark.peers import PEERS, installed
from data2vec_train.benchmark.picture import draw
from data2vec_train.benchmark.published import base_batch, base_config, base_objective, base_update
from data2vec_train.benchmark.run import _step_run
from data2vec_train.benchmark.steps import our_step
from data2vec_train.benchmark.tables import case_lines, overall, spread_text, time_text
from data2vec_train.benchmark.timing import Effort, interleave
from data2vec_train.benchmark.whole_step import EAGER, FP32, ORIGINAL, StepRun, _flops, measure_step
from data2vec_train.encoders import attention
from data2vec_train.errors import ConfigError
from data2vec_train.plan.flops import count_flops

CPU = torch.device("cpu")
SAME, OTHER = Agreement("outputs", 1e-6, 1e-4, "x"), Agreement("outputs", 0.3, 1e-4, "last_hidden_state")


def bench(*, peers=(), tolerance=1e-4):
    return Bench(
        arithmetic=Arithmetic("cpu", "32-true"),
        effort=Effort(rounds=2, warmups=1, min_seconds=0.0),
        peers=list(peers),
        measures_memory=False,
        threads=1,
        tolerance=tolerance,
    )


def case(theirs, ours, *, agreement=SAME, itself=SAME):
    arms = [Arm("theirs", theirs, theirs, agreements=[itself]), Arm("ours", ours, ours, agreements=[agreement])]
    return Case("encoder", "vision", "theirs", arms)


def test_ratios_are_taken_round_by_round():
    ratio = case([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]).ratio
    found = ratio(Arm("ours", [1.0, 1.0, 3.0], [1.0, 1.0, 3.0]))
    assert found.wall == [2.0, 4.0, 3.0]  # the ratio of the medians would be 4
    assert str(found) == "3.00 [2.00..4.00]"


@pytest.mark.parametrize(
    ("ours", "is_resolved"),
    [([0.9, 0.8, 0.5], True), ([1.2, 1.1, 1.5], True), ([0.8, 0.9, 1.1], False), ([0.8, 0.9, 1.0], False)],
)
def test_a_range_that_includes_1_is_not_resolved(ours, is_resolved):
    measured = case([1.0, 1.0, 1.0], ours)
    ratio = measured.ratio(measured.arm("ours"))
    assert ratio.is_resolved == is_resolved
    assert ("not resolved" in str(ratio)) != is_resolved
    assert measured.as_json()["arms"][1]["ratio"]["is_resolved"] == is_resolved


def test_different_results_have_no_ratio_anywhere():
    measured = case([2.0, 2.0], [1.0, 1.0], agreement=OTHER)
    said = "no ratio: outputs differ by 0.3 (last_hidden_state), allowed 0.0001"
    assert said in "\n".join(case_lines(measured, peak=1.0))
    assert measured.as_json()["arms"][1]["ratio"] == {"refusal": said}
    assert overall([measured, case([2.0], [1.0])]) == {}


def test_a_reference_that_differs_from_itself_has_no_ratios():
    measured = case([2.0, 2.0], [1.0, 1.0], itself=OTHER)
    assert "no ratio" in str(measured.ratio(measured.arm("ours")))


def test_the_mean_over_cases_is_geometric():
    [(name, mean)] = overall([case([8.0], [1.0]), case([1.0], [2.0]), case([2.0, 3.0], [2.5, 2.5])]).items()
    assert name == "encoder: ours against theirs"
    assert (mean.ratio, mean.cases, mean.unresolved) == (pytest.approx((8 * 0.5 * 1.0) ** (1 / 3)), 3, 1)
    assert str(mean) == "1.59 times as fast, the geometric mean of 3 cases, 1 of them not resolved"


def test_a_busy_machine_has_ratios_by_cpu_time_too():
    measured = case([2.0, 2.0], [1.0, 3.0])
    measured.arm("ours").cpu_seconds = [1.0, 1.0]
    heads, _, ours = case_lines(measured, peak=1.0)[1:]
    assert heads.endswith("times as fast as theirs         by CPU time")
    assert ours.endswith("1.33 [0.67..2.00] not resolved  2.00 [2.00..2.00]")


def test_what_is_not_a_number_agrees_with_nothing():
    a = {"x": torch.tensor([1.0, math.nan]), "y": torch.ones(2)}
    assert not outputs_agree(a, a, what="outputs", atol=1.0).holds
    assert not outputs_agree({"x": torch.ones(2)}, {"x": torch.ones(3)}, what="outputs", atol=1.0).holds
    assert not outputs_agree({"x": torch.ones(2)}, {}, what="outputs", atol=1.0).holds
    assert not outputs_agree({}, {}, what="outputs", atol=1.0).holds


def test_gradients_are_compared_by_their_own_size_and_rounding_is_passed_over():
    expected = {"large": torch.tensor([100.0]), "small": torch.tensor([0.01]), "rounding": torch.tensor([1e-9])}
    found = {"large": torch.tensor([100.001]), "small": torch.tensor([0.011]), "rounding": torch.tensor([-1e-9])}
    agreement = gradients_agree(expected, found, what="gradients", share=1e-4)
    assert (agreement.where, agreement.largest) == ("small", pytest.approx(0.1, rel=1e-3))
    assert not agreement.holds


def test_arms_take_turns_and_short_ones_are_called_often():
    calls: list[str] = []
    arms = [Arm("a"), Arm("b")]
    runs = {"a": lambda: (calls.append("a"), time.sleep(0.2)), "b": lambda: (calls.append("b"), time.sleep(0.02))}
    interleave(runs, effort=Effort(rounds=2, warmups=0, min_seconds=0.1), device=CPU, arms=arms)
    assert arms[0].calls == 1
    assert 2 <= arms[1].calls <= 5
    once = "a" + "b" * arms[1].calls
    assert "".join(calls) == "ab" + once + once
    assert min(arms[0].seconds) >= 0.2
    assert 0.02 <= min(arms[1].seconds) < 0.1  # of one call, not of all
    assert max(arms[0].cpu_seconds) < 0.1  # asleep


def test_peak_memory_is_that_of_the_work():
    count = 40_000_000
    work = partial(torch.ones, count)
    idle, peak = peak_memory(partial(partial, work), device=CPU, threads=1, calls=2)
    assert 4 * count < peak - idle < 4 * count * 1.2


def test_what_fails_in_the_process_that_measures_memory_is_said():
    with pytest.raises(RuntimeError, match="negative"):
        peak_memory(partial(partial, partial(torch.ones, -1)), device=CPU, threads=1, calls=1)


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(PEERS, "no_such_program", ("step",))
    monkeypatch.setitem(PEERS, "torch", ("step",))
    both = ["torch", "no_such_program"]
    assert installed(both, ["ema", "step"]) == (["torch"], ["no_such_program is not installed: step without it"])
    assert installed(both, ["ema"]) == (["torch"], [])


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.01234, "12.3 ms"), (1.2e-6, "1.2 us"), (0, "0 us")]
)
def test_times_have_a_unit_that_suits_them(seconds, text):
    assert time_text(seconds) == text


def test_a_spread_is_median_and_range():
    assert spread_text([3.0, 1.0, 2.0]) == "2 s [1 s..3 s]"


@pytest.mark.slow
def test_a_backend_that_refuses_is_a_line_and_one_that_is_wrong_has_no_ratio(monkeypatch):
    def refuse(*_):
        raise ConfigError("attention=picky needs a GPU; choose attention=sdpa")

    def wrong(*arguments):
        return 1.01 * attention.BACKENDS["eager"](*arguments)

    monkeypatch.setitem(attention.BACKENDS, "picky", refuse)
    monkeypatch.setitem(attention.BACKENDS, "wrong", wrong)
    found = measure_attention(
        bench(), shapes=[[2, 2, 9, 4]], key_mask=[True], bias=["relative", "linear"], backward=[False, True], names=None
    )
    for measured in found:
        lines = case_lines(measured, peak=1e9)
        assert any("picky" in line and "choose attention=sdpa" in line for line in lines)
        assert measured.ratio(measured.arm("picky")) is None
        assert "outputs differ" in measured.ratio(measured.arm("wrong")).refusal
        assert measured.ratio(measured.arm("sdpa")).refusal is None
        assert measured.arm("sdpa").flops == 2 * 2 * 2 * 9 * 9 * 4 * 2 * (3 if "backward" in measured.name else 1)


def test_an_encoder_with_other_weights_gets_no_ratio(tmp_path):
    pytest.importorskip("transformers")
    size = {"dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 32}
    for name, depth in (("a", 2), ("b", 1)):
        options = {"size": size | {"depth": depth}, "image_px": 32, "patch_px": 16, "max_tokens": 0, "vocab_size": 0}
        write_weights("vision", tmp_path / name, **options)

    def compared_with(ours):
        def make(arm):
            folder = tmp_path / (ours if arm.startswith(OURS) else "a")
            return EncoderRun("vision", str(folder), (2, 3, 32, 32), 0, "training", Arithmetic("cpu", "32-true"), arm)

        case = Case("encoder", "vision", SDPA)
        return compare(bench(peers=["transformers"]), case, make, batch_size=2, backend="sdpa")

    compared = [compared_with("a"), compared_with("b")]
    same, different = (measured.ratio(measured.arm(OURS)) for measured in compared)
    assert same.refusal is None
    assert "outputs differ" in different.refusal
    assert compared[0].arm(OURS).items == {"samples": 2, "tokens": 10}


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_speech_and_text_encoders_agree_in_outputs_and_gradients(modality):
    pytest.importorskip("transformers")
    found = measure_encoder(
        bench(peers=["transformers"]),
        modalities=[modality],
        modes=["training"],
        batch_sizes=[2],
        size={"dim": 32, "depth": 2, "num_heads": 2, "ffn_dim": 32, "conv_dim": 16},
        image_px=0,
        patch_px=0,
        audio_seconds=0.2,
        text_tokens=9,
        vocab_size=50,
        backend="eager",
    )
    [measured] = found
    for arm in measured.arms:
        assert [agreement.holds for agreement in arm.agreements] == [True, True]
    assert measured.ratio(measured.arm(OURS)).refusal is None


def test_without_transformers_our_encoder_is_measured_alone(tmp_path):
    size = {"dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 32}
    write_weights("text", tmp_path, size=size, image_px=0, patch_px=0, max_tokens=12, vocab_size=50)
    make = partial(EncoderRun, "text", str(tmp_path), (2, 12), 50, "inference", Arithmetic("cpu", "32-true"))
    measured = compare(bench(), Case("encoder", "text", SDPA), make, batch_size=2, backend="eager")
    assert [arm.name for arm in measured.arms] == [OURS]
    assert measured.reference is None
    assert measured.ratio(measured.arms[0]) is None
    # 24 tokens: 4 projections of 16 x 16 and 2 of 16 x 32, each 2 operations a weight, 2 products of attention, and
    # the pooler on the first tokens
    assert measured.arms[0].flops == 2 * 24 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 2 * 12 * 12 * 16 + 2 * 2 * 16 * 16


def test_an_unknown_precision_is_one_line():
    with pytest.raises(ConfigError, match=r"precision.trainer=64-true: expected one of 32-true"):
        Arithmetic("cpu", "64-true")


def step_run(*, shift=0.0):
    """A tiny step of ours; `shift` moves its weights away from those of other calls."""
    sizes = ["size.dim=32", "size.depth=2", "size.num_heads=4", "size.ffn_dim=64", "modality.image_px=32"]
    cfg = base_config("vision", "data2vec", *sizes, "modality.patch_px=8", "objective.targets.top_k_layers=1")
    ours = base_objective(cfg)
    with torch.no_grad():
        ours.student.class_token.mul_(1 + shift).add_(shift * torch.linspace(-1, 1, 32))
    batch = base_batch(cfg, ours, samples=2, length=0)
    return StepRun(our_step(ours, batch, base_update(cfg)), batch, Arithmetic("cpu", "32-true"))


def refuse():
    raise ConfigError("the original program does not import here; pip install it")


@pytest.mark.parametrize(
    ("original", "said"),
    [
        (step_run, None),
        (partial(step_run, shift=0.1), "gradients differ by"),
        (refuse, "the original program does not"),
    ],
)
def test_a_step_is_compared_with_an_original_that_computes_the_same(original, said):
    make = {ORIGINAL: original, OURS: step_run}.get
    whole, parts = measure_step(bench(peers=["fairseq"]), name="images", make=make, beside=[], loss_tolerance=1e-5)
    ratio = whole.ratio(whole.arm(OURS))
    if said is None:
        assert ratio.refusal is None
        assert [agreement.what for agreement in whole.arm(OURS).agreements] == ["losses", "gradients"]
        assert whole.arm(OURS).flops == whole.arm(ORIGINAL).flops > 0
    else:
        assert said in "\n".join(case_lines(whole, peak=1e9))
        assert ratio is None or ratio.wall is None
    assert whole.arm(OURS).items == {"samples": 2, "masks": 2, "tokens": 32}
    assert len(parts.arms) == 5
    assert all(len(arm.seconds) == 2 for arm in parts.arms)


SMALL = ("size.dim=32", "size.depth=2", "size.num_heads=4", "size.ffn_dim=64", "modality.image_px=32")
SMALL += ("modality.patch_px=8", "objective.targets.top_k_layers=1")


@pytest.mark.slow
def test_a_compiled_step_is_compared_with_a_plain_one_in_float32():
    settings = (*SMALL, "attention.backend=sdpa")
    make = partial(partial, _step_run, "vision", "data2vec", settings, 2, 0, True, Arithmetic("cpu", "32-true"))
    whole, _ = measure_step(bench(), name="images", make=make, beside=[FP32, EAGER], loss_tolerance=1e-5)
    assert [arm.name for arm in whole.arms] == [FP32, EAGER, OURS]
    assert whole.reference == FP32
    assert [whole.ratio(arm).refusal for arm in whole.arms[1:]] == [None, None]
    assert len({arm.flops for arm in whole.arms}) == 1


def test_operations_of_a_step_are_those_that_it_computes():
    run = step_run()
    assert _flops(run) == count_flops(run) > 0


def test_on_a_gpu_memory_is_that_of_the_arm_that_is_timed(monkeypatch):
    measured = []
    monkeypatch.setattr(context, "peak_memory", lambda make, **_: measured.append(make()) or (3, 7))
    on_gpu = replace(bench(), arithmetic=Arithmetic("cuda", "32-true"), measures_memory=True)
    arm = Arm("ours")
    built = on_gpu.build(arm, lambda: partial(int))
    assert measured == [built]
    assert (arm.idle_bytes, arm.peak_bytes) == (3, 7)
    assert replace(on_gpu, measures_memory=False).build(arm, lambda: int) is int


def test_shares_of_a_stated_rate_have_a_column():
    measured = case([2.0, 2.0], [1.0, 1.0])
    measured.arm("ours").flops = 10**12
    heads, _, ours = case_lines(measured, peak=2e12, stated_peak=4e12)[1:]
    assert "of 4 TFLOP/s" in heads
    assert [word for word in ours.split() if "%" in word] == ["50%", "25%"]
    assert "TFLOP" not in case_lines(measured, peak=2e12)[1]


def test_a_picture_of_refusals_shows_times(tmp_path):
    measured = case([2.0, 2.0], [1.0, 1.0], agreement=OTHER)
    measured.arms.append(Arm("picky", refused="it needs a GPU"))
    draw([measured, case([2.0, 2.0], [1.0, 1.0])], tmp_path / "a.png", title="a machine")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
