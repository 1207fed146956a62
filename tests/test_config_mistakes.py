"""Mistakes that people make on the command line: each is answered in one line that says what to change.

The table calls what the commands call, in this process; a few run as commands, with a limit of time.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data2vec_train.config.check.overrides import find_faults
from data2vec_train.config.compose import _said_twice

ROOT = Path(__file__).parents[1]
FOLDER = "data=folder data.path=FOLDER "
FINETUNE = "finetune modality=vision head=image init_from=FOLDER " + FOLDER
HEARD = "finetune modality=audio head=ctc init_from=FOLDER " + FOLDER
READ = "finetune modality=text head=sequence init_from=FOLDER " + FOLDER
PUBLISHED = "+recipes=vision/base_imagenet_v2 data.path=FOLDER "
PROBE = "probe modality=vision checkpoint=FOLDER " + FOLDER
EMBED = "embed modality=vision checkpoint=FOLDER out=FOLDER/new.parquet " + FOLDER

# Command -> what its one line holds. FOLDER is an empty folder with a file `here.txt`; `train` is left out.
MISTAKES = {
    # names
    "modality=speech": "there is no modality called 'speech'; did you mean audio?",
    "modality=null": "modality=null: a group is not null; choose one of audio, sound, text, vision",
    "modality=[vision,text]": "takes one choice; for several runs write -m modality=vision,text",
    "modality": "modality: no choice given; write modality=... one of audio, sound, text, vision",
    "modality:vision": "cannot be read; write modality=vision",
    "modality==vision": "one '=' is enough: modality=vision",
    "modality=vision,": "leave out the comma at the end: modality=vision",
    "~objective": "objective cannot be left out; choose one of data2vec, data2vec2",
    "++modality=vision": "a group takes no pluses: modality=vision",
    "head=ctc": "python -m data2vec_train has no head; it has modality, objective",
    FINETUNE + "size=base": "python -m data2vec_train.finetune has no size; it has modality, head",
    "precision=fp17": "there is no precision called 'fp17'",
    "preset=audio_data2vec2": "preset=audio_data2vec2: is for modality=audio, and this is modality=vision",
    "sample=sample_audio": "sample=sample_audio: is for modality=audio, and this is modality=vision",
    "modality.name=audio": "modality.name: expected vision, which was chosen, got audio",
    "learning_rate=0.1": "did you mean optimizer.lr?",
    "epochs=10": "did you mean trainer.max_steps?",
    "gpus=2": "did you mean strategy.devices?",
    "batch_size=32": "did you mean data.batch_size_per_device?",
    "max_steps=100": "did you mean trainer.max_steps?",
    "objective.views=2": "objective.views is now called objective.masks_per_sample",
    "objective.targets.tap=block": "objective.targets.tap is now called objective.targets.target_layer",
    "views=2": "did you mean objective.masks_per_sample?",
    "seed=${objective.views}": "called 'objective.views'; it is now called objective.masks_per_sample",
    "optimzer.lr=0.1": "did you mean optimizer.lr?",
    "+trainer.precision=16-mixed": "trainer.precision: is set by precision; change that instead",
    "+strategy.device=3": "Trainer has no setting called 'device'; did you mean devices?",
    "+modality.chanels=3": "there is no setting called 'modality.chanels'; did you mean modality.channels?",
    "~seed": "~seed: seed cannot be left out; set it to another value",
    "modality=audio data.test_source.path=/b": "'data.test_source.path'; write data.test_source={path:...}",
    "+recipe=vision/cifar10": "there is no setting called 'recipe'; did you mean recipes?",
    "+recipes=cifar10": "there is no recipe called 'cifar10'; did you mean vision/cifar10?",
    "+recipes=audio/ctc_100h_base": "this recipe is for python -m data2vec_train.finetune",
    # how it is typed
    "seed = 1": "seed = 1: write it without spaces: seed=1",
    "seed= 1": "seed= 1: write it without spaces: seed=1",
    "seed=": "seed=: no value given; write seed=VALUE, or seed=null",
    "data=folder data.path=/a(b)": "goes in quotes: 'data.path=\"/a(b)\"'",
    "data=folder data.path=/ünï": "goes in quotes: 'data.path=\"/ünï\"'",
    "size.dim=${size": "a bracket or quote is not closed",
    "data=folder data.path=a,b": "several values make a sweep, which needs -m; for one list write data.path=[a,b]",
    "seed=${oc.env:NOT_SET_ANYWHERE}": "the environment variable NOT_SET_ANYWHERE is not set; set it",
    "seed=${seed}": "seed: cannot work out ${seed}: Recursive interpolation",
    "seed=${nothing}": "seed: refers to ${nothing}, and there is no setting called 'nothing'",
    # values
    "optimizer.lr=abc": "optimizer.lr: expected a number, got 'abc'",
    "optimizer.lr=1e-4x": "optimizer.lr: expected a number, got '1e-4x'",
    "optimizer.lr=-1": "optimizer.lr: expected a number above 0, got -1",
    "optimizer.lr=nan": "optimizer.lr: expected a number above 0, got nan",
    "optimizer.betas=[0.9]": "optimizer.betas: expected two numbers, got [0.9]",
    "trainer.max_steps=1.5": "trainer.max_steps: expected a whole number, got 1.5",
    "trainer.max_steps=null": "trainer.max_steps: expected a whole number, got null",
    "+trainer.max_time=00:01:00:00": "trainer.max_time: the run would count as finished; stop it with SIGTERM",
    "+trainer.max_epochs=3": "trainer.max_epochs: samples come without end, and no epoch is over; set",
    "+trainer.limit_train_batches=9": "trainer.limit_train_batches: the same batches would come again and again",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run: a run of a step would count as finished; choose debug=smoke",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches: expected a whole number of at",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val: expected a number of at least 0, got -1",
    "attention=flex strategy.accelerator=cpu": "no backward pass without a GPU; choose one of eager, sdpa, flash",
    "modality=audio attention=flash": "no position bias; choose one of eager, sdpa",
    "attention=flash modality.encoder.attention_dropout=0.1 strategy.accelerator=cpu": "on a GPU and without padding",
    "attention=flesh": "there is no attention called 'flesh'; did you mean flash?",
    "precision.trainer=16-mixed strategy.accelerator=cpu": "16-mixed needs a GPU, and this run is on the CPU",
    "strategy.devices=0": "strategy.devices: expected a count, a list such as [0,1], or auto, got 0",
    "strategy.num_nodes=0": "strategy.num_nodes: expected a whole number of at least 1, got 0",
    "strategy.strategy=dpp": "strategy.strategy: there is no strategy 'dpp'; auto, ddp",
    "strategy.accelerator=gpuu": "strategy.accelerator: expected one of auto, cpu, gpu",
    "strategy.strategy=ddp": "strategy.strategy: ddp would be Lightning's own; write strategy=ddp",
    "strategy.devices=2": "strategy.devices: 2 devices need strategy=ddp or strategy=fsdp",
    "precision.trainer=bf16-true": "precision.trainer: expected one of auto, 32-true, 32-tf32, bf16-mixed, 16-mixed",
    "strategy.accelerator=mps": "strategy.accelerator: mps is of Apple's computers",
    # what nobody reads
    "+callbacks.mine._target_=data2vec_train.training.optim.adamw": "there is no setting called 'callbacks.mine'",
    "+callbacks.monitr.grace_steps=3": "'callbacks.monitr'; did you mean callbacks.monitor?",
    "+callbacks.x=1": "callbacks has probe, monitor, checkpoint, timing, finite",
    "+modality.probes.raw=1": "'modality.probes'; did you mean modality.probe?",
    "+data.workers=3": "there is no setting called 'data.workers'",
    "+trainer.profiler=simple": "trainer.profiler: has no effect in these runs; choose debug=profile",
    "+trainer.val_check_interval=5": "trainer.val_check_interval: has no effect",
    "trainer.enable_progress_bar=true": "has no effect in these runs; choose callbacks.monitor.progress=bar",
    "+trainer.gradient_clip_algorithm=value": "trainer.gradient_clip_algorithm: expected norm, got 'value'",
    "+logger.x=3": "logger.x: expected the settings of a logger",
    # a recipe's batch on many devices
    PUBLISHED + "strategy=ddp strategy.devices=16": "16 times as large; trainer.accumulate_grad_batches=1 keeps it",
    PUBLISHED + "strategy=ddp strategy.devices=[0,1]": "2 times as large; trainer.accumulate_grad_batches=8 keeps it",
    PUBLISHED + "strategy=fsdp strategy.devices=3": "3 times as large; say trainer.accumulate_grad_batches and data.",
    PUBLISHED + "strategy=ddp strategy.devices=64": "=1 data.batch_size_per_device=4 keeps it",
    "plan +recipes=vision/base_imagenet_v2 strategy.devices=8": "on 8 devices it would be 8 times as large",
    "plan +recipes=vision/base_imagenet_v2 strategy.devices=auto hardware.devices=4": "on 4 devices it would be",
    "finetune +recipes=text/glue_rte init_from=FOLDER data.path=FOLDER strategy=ddp strategy.devices=2": (
        "=1 data.batch_size_per_device=8 keeps it"
    ),
    "seed=-1": "seed: expected a whole number from 0 to 4294967295, got -1",
    "size.depth=-3": "size.depth: expected a whole number of at least 1, got -3",
    "size.dim=0": "size.dim: expected a whole number of at least 1, got 0",
    "size.num_heads=5": "size.dim=96 cannot be split into 5 heads; choose 4 or 6 heads",
    "modality.patch_px=5": "28 pixels cannot be cut into patches of 5",
    "modality.image_px=[28]": "modality.image_px: expected one side, or [height, width], got [28]",
    "modality.channels=0": "modality.channels: expected a whole number of at least 1, got 0",
    "modality.augment.crop_scale=[0.9,0.2]": "modality.augment.crop_scale: expected the smallest and the largest share",
    "modality.visible_block_patches=50": "a square of 50 patches covers the whole image, which has 7 x 7",
    "modality.encoder.dropout=1.5": "modality.encoder.dropout: expected a number from 0 to below 1, got 1.5",
    "modality.encoder.activation=relux": "got 'relux'; did you mean relu?",
    "modality.encoder.prenet_depth=9": "modality.encoder.prenet_depth: expected a number from 0 to below size.depth=4",
    "callbacks.monitor.progress=fancy": "callbacks.monitor.progress: expected one of auto, bar, lines, none",
    "scheduler=tri_stage scheduler.final_factor=0": "scheduler.final_factor: expected a number above 0, got 0",
    "scheduler=tri_stage scheduler.hold_steps=9999": "scheduler.hold_steps: 9999, with scheduler.warmup_steps=",
    "modality=sound modality.mel_bins=100": "100 bins cannot be cut into patches of 16 (modality.patch); the nearest "
    "numbers that work are 96 and 112",
    "modality=sound modality.max_seconds=0.1 modality.min_seconds=0.1": "10 frames are fewer than a patch has",
    "modality=sound modality.crop=last": "modality.crop: expected one of 'random', 'first', got 'last'",
    "modality=audio modality.sample_rate_hz=0": "modality.sample_rate_hz: expected a whole number of at least 1, got 0",
    "modality=audio modality.min_seconds=30": "modality.min_seconds: 30 is more than modality.max_seconds",
    "modality=audio modality.encoder.position_groups=7": "7 groups cannot share the width 96 (size.dim); choose 6",
    "modality=audio modality.encoder.conv_kernel=[10,3]": "2 layers, and modality.encoder.conv_stride has 7",
    "modality=audio modality.encoder.conv_dim=[8,8]": "modality.encoder.conv_dim: 2 widths for the 7 layers",
    "modality=text modality.encodings=[utf-88]": "modality.encodings: there is no encoding called 'utf-88'",
    "modality=text modality.min_tokens=600": "modality.min_tokens: 600 is more than modality.block_tokens=",
    "data.batch_size_per_device=null": "data.batch_size_per_device: expected a whole number of at least 1, got null",
    "data.num_workers=many": "data.num_workers: expected a whole number, got 'many'",
    # what is not there
    "data.path=FOLDER": "data=sample needs none, for your own data choose data=folder, hf, manifest or stream",
    "data=folder": "data.path: not set; say which",
    "data=folder data.path=FOLDER/her.txt": "did you mean FOLDER/here.txt?",
    "data=folder data.path=FOLDER/here.txt": "here.txt is a file, expected a folder; a data set in one",
    "data=folder data.path=https://example.org/x": "is an address, expected a folder on this machine",
    "data=hf data.path=s3://bucket/x": "s3://bucket/x is an address; for files on the web write data.path=parquet",
    "data=manifest modality=audio data.path=FOLDER": "is a folder, expected a manifest (.tsv)",
    "data=manifest data.path=FOLDER/here.txt": "data: a manifest lists recordings, and this is modality=vision",
    "cache_dir=FOLDER/here.txt": "cache_dir: FOLDER/here.txt is a file, expected a folder",
    "hydra.run.dir=FOLDER/here.txt/run": "hydra.run.dir: FOLDER/here.txt is a file, expected a folder",
    "init_from=facebook/data2vec-base": "init_from: there is no file or folder facebook/data2vec-base",
    "init_from=https://x/y.pt": "is an address; weights are only read from this machine",
    # the other commands
    FINETUNE + "freeze.encoder_steps=-1": "freeze.encoder_steps: expected a whole number of at least 0, got -1",
    FINETUNE + "layer_decay.rate=2": "layer_decay.rate: expected a number above 0, at most 1, got 2",
    FINETUNE + "data.train_samples=0": "data.train_samples: expected a whole number of at least 1, got 0",
    FINETUNE + "data=stream": "data: a stream is only for pretraining",
    HEARD + "head.remove='('": "head.remove: '(' is no regular expression",
    HEARD + "head.masks.time_fraction=2": "head.masks.time_fraction: expected a number from 0 to below 1, got 2",
    HEARD.replace("audio", "vision"): "head: CTC is for modality=audio, and this is modality=vision",
    READ + "head.text_columns=text": "head.text_columns: expected a list of items, each text, got 'text'",
    PROBE + "probes=[kn]": "probes: expected one of knn, linear, attentive, got 'kn'; did you mean knn?",
    PROBE + "layers=first": "layers: expected last, all, or numbers such as [0,6,12], got 'first'",
    PROBE + "device=gpu": "device: expected auto, cpu, cuda, cuda:1 or mps, got 'gpu'; did you mean cuda?",
    EMBED + "pooling=max": "pooling: expected one of mean, mean_std, none, got 'max'",
    EMBED.replace(".parquet", ".csv"): "out: expected a file that ends in .parquet",
    EMBED.replace("/new", "/no/new"): "out: there is no folder FOLDER/no",
    "export checkpoint=FOLDER out=FOLDER/new num_heads=abc": "num_heads: expected a whole number of at least 1",
    "export checkpoint=FOLDER out=FOLDER": "out: FOLDER is not an empty folder; choose another, or remove it",
    "export checkpoint=FOLDER out=FOLDER/new format=onx": "got 'onx'; did you mean onnx?",
    "benchmark what=encodr": "what: expected one of all, step, attention, encoder, loader, ema, startup, seed_table",
    "benchmark what=[ema,startupp]": "got 'startupp'; did you mean startup?",
    "benchmark what=[]": "what: nothing is left to measure; name at least one",
    "benchmark what=ema,encoder": "several values make a sweep, which needs -m; for one list write what=[ema,encoder]",
    "benchmark against=fairsec": "expected one of all, transformers, fairseq, got 'fairsec'; did you mean fairseq?",
    "benchmark modalities=[speech]": "modalities: expected one of all, audio, text, vision, got 'speech'",
    "benchmark rounds=0": "rounds: expected a whole number of at least 1, got 0",
    "benchmark tolerance=-1": "tolerance: expected a number above 0, got -1",
    "benchmark size=tinny": "there is no size called 'tinny'; did you mean tiny?",
    "benchmark modality=vision": "data2vec_train.benchmark has no modality; it has size, attention, precision",
    "benchmark encoder.batch_size=[4]": "did you mean encoder.batch_sizes?",
    "benchmark encoder.batch_sizes=[0]": "encoder.batch_sizes: expected a whole number of at least 1, got [0]",
    "benchmark encoder.modes=training": "encoder.modes: expected a list, got 'training'",
    "benchmark encoder.image_px=225": "encoder.image_px: 225 pixels cannot be cut into patches of 16",
    "benchmark backends.shapes=[[8,12,197]]": "expected [[rows,heads,length,width of a head],...], got [8, 12, 197]",
    "benchmark backends.names=[flas]": "backends.names: expected one of",
    "benchmark seed_table.training_px=[1048]": "seed_table.training_px: expected [height,width]",
    "benchmark +loader.batchs=3": "there is no setting called 'loader.batchs'; did you mean loader.batches?",
    "benchmark device=gpu": "device: expected auto, cpu, cuda, cuda:1 or mps, got 'gpu'; did you mean cuda?",
}


def test_a_batch_that_is_said_is_taken_on_many_devices():
    for said in ("trainer.accumulate_grad_batches=1", "data.batch_size_per_device=4"):
        given = ["+recipes=vision/base_imagenet_v2", "strategy=ddp", "strategy.devices=16", said]
        assert find_faults(given, config_name="plan", multirun=False, on_this_machine=True) == []


def test_torchrun_counts_as_many_devices(monkeypatch, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    given = ["+recipes=vision/base_imagenet_v2", f"data.path={tmp_path}", "strategy=ddp", f"hydra.run.dir={tmp_path}"]
    given += ["strategy.devices=4", "strategy.num_nodes=2"]
    [fault] = find_faults(given, config_name="train", multirun=False, on_this_machine=True)
    assert "on 8 devices it would be 8 times as large; trainer.accumulate_grad_batches=2 keeps it" in fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("folder")
    (made / "here.txt").write_text("x")
    return made


def words_of(command, folder):
    """(the name of the command's config, its overrides)."""
    words = command.replace("FOLDER", str(folder)).replace("'('", "\"'('\"").split()
    words = ["head.remove='('" if word.startswith("head.remove") else word for word in words]
    return (
        (words[0], words[1:])
        if words[0] in ("finetune", "probe", "embed", "export", "benchmark", "plan")
        else ("train", words)
    )


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_one_line(command, folder):
    name, words = words_of(command, folder)
    if words[-1] == "data=stream":
        words.remove("data=folder")
    faults = find_faults(words, config_name=name, multirun=False, on_this_machine=True)
    assert len(faults) == 1, faults
    fault = faults[0].replace(", eeg,", ",")  # the plugin of other tests of the same process
    assert MISTAKES[command].replace("FOLDER", str(folder)) in fault
    assert "\n" not in fault


def test_all_groups_that_are_missing_are_said_together():
    faults = find_faults(["seed=x", "trainer.max_stps=3"], config_name="finetune", multirun=False)
    for group in ("modality", "head", "data"):
        assert any(f"{group} is not set; say which: {group}=... one of" in fault for fault in faults)
    assert any("did you mean trainer.max_steps?" in fault for fault in faults)


def test_a_setting_that_is_given_twice_is_named():
    [fault] = _said_twice(["seed=1", "modality=vision", "seed=2", "size=tiny", "size=tiny"])
    assert fault == "seed: is set 2 times, to 1 and 2; the last counts"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed_is_named():
    [fault] = find_faults(["logger=wandb"], config_name="train", multirun=False, on_this_machine=True)
    assert fault == "logger=wandb: needs the package wandb: pip install 'data2vec-train[wandb]'"


# What a process does that runs a command: its exit status, what it said, what it imported, and its time on the CPU.
MEASURED = """
import json, resource, runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__")
    status = 0
except SystemExit as stopped:
    status = stopped.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "lightning", "datasets", "numpy") if name in sys.modules]
print(json.dumps({"status": status, "heavy": heavy, "seconds": used.ru_utime + used.ru_stime}))
"""
COMMANDS = {
    "data2vec_train modality=visoin optimizer.lr=abc size.depth=-3 size.num_heads=5": 4,
    "data2vec_train data=folder data.path=/nowhere seed=1 seed=2 trainer.max_steps=1.5": 2,
    "data2vec_train -m seed=0,x modality=vision,adio": 2,
    "data2vec_train vision --lr 0.1": 3,
    "data2vec_train.finetune head=cct init_from=/nowhere": 4,
    "data2vec_train.probe checkpoint=/nowhere modality=vision data=folder data.path=/nowhere": 2,
    "data2vec_train.embed modality=vision data=sample out=x.csv device=gpu": 4,
    "data2vec_train.predict checkpoint=/nowhere modality=audio data=hf out=x.jsonl": 2,
    "data2vec_train.export checkpoint=/nowhere out=x format=onx": 2,
    "data2vec_train.benchmark what=[ema,encodr] rounds=0 size=tinny": 3,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_with_mistakes_ends_at_once_with_status_2(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    heading, *faults = done.stderr.splitlines()
    assert measured["status"] == 2
    assert len(faults) == COMMANDS[command] == int(heading.split()[0]), done.stderr
    assert "Traceback" not in done.stderr
    assert measured["heavy"] == []
    assert measured["seconds"] < 2
    assert list(tmp_path.iterdir()) == []  # nothing is left on the disk
