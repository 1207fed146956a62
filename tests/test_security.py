"""A config, a file of weights or a data set of a stranger cannot run code, and nothing uses the network unasked.

Every payload would make a file, the canary, if it ran.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data2vec_train.config.build import build
from data2vec_train.config.check.overrides import find_faults, nodes_of, preflight
from data2vec_train.config.check.security import target_fault
from data2vec_train.data.sources.files import ArraySource
from data2vec_train.data.sources.hf import HFSource
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.paths import config_directory, recipes_parent
from data2vec_train.weights.convert import load_pretrained
from data2vec_train.weights.pickles import read_checkpoint

ROOT = Path(__file__).parents[1]
TOUCH = "touch CANARY"

CALLS = {
    "os.system": {"_target_": "os.system", "command": TOUCH},
    "posix.system": {"_target_": "posix.system", "_args_": [TOUCH]},
    "os.popen": {"_target_": "os.popen", "cmd": TOUCH},
    "os.mkdir": {"_target_": "os.mkdir", "path": "CANARY"},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["touch", "CANARY"]},
    "subprocess.Popen": {"_target_": "subprocess.Popen", "args": ["touch", "CANARY"]},
    "builtins.open": {"_target_": "builtins.open", "file": "CANARY", "mode": "w"},
    "io.open": {"_target_": "io.open", "file": "CANARY", "mode": "w"},
    "builtins.eval": {"_target_": "builtins.eval", "_args_": ["open('CANARY', 'w')"]},
    "builtins.exec": {"_target_": "builtins.exec", "_args_": ["open('CANARY', 'w')"]},
    "timeit": {"_target_": "timeit.timeit", "stmt": "open('CANARY', 'w')", "number": 1},
    "runpy": {"_target_": "runpy.run_path", "path_name": "SCRIPT"},
    "pathlib": {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["CANARY"]}]},
    "shutil": {"_target_": "shutil.copyfile", "src": "SCRIPT", "dst": "CANARY"},
    "importlib": {"_target_": "importlib.import_module", "name": "evil_module"},
    "pickle.load": {"_target_": "pickle.loads", "data": "x"},
    "torch.load": {"_target_": "torch.load", "f": "PICKLE", "weights_only": False},
    "torch.serialization": {"_target_": "torch.serialization.load", "f": "PICKLE", "weights_only": False},
    "torch.save": {"_target_": "torch.save", "obj": 1, "f": "CANARY"},
    "torch.hub": {"_target_": "torch.hub.load", "repo_or_dir": "DIR", "model": "x", "source": "local"},
    "torch.jit": {"_target_": "torch.jit.load", "f": "PICKLE"},
    "fabric": {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": "PICKLE", "weights_only": False},
    "load_from_checkpoint": {
        "_target_": "lightning.pytorch.LightningModule.load_from_checkpoint",
        "_args_": ["PICKLE"],
    },
    "lightning cli": {"_target_": "lightning.pytorch.cli.LightningCLI", "args": ["fit"]},
    "lightning demo": {"_target_": "lightning.pytorch.demos.mnist_datamodule.MNIST", "root": "CANARY"},
    "torchvision data set": {"_target_": "torchvision.datasets.LSUN", "root": "DIR", "classes": ["x_train"]},
    "an import of a library": {"_target_": "torchvision.transforms.functional.sys.exit", "_args_": [7]},
    "an import of ours": {"_target_": "data2vec_train.training.callbacks.monitor.os.system", "_args_": [TOUCH]},
    "hydra.instantiate": {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", "command": TOUCH}},
    "hydra.get_method": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "hydra.get_class": {"_target_": "hydra.utils.get_class", "path": "subprocess.Popen"},
    "functools.partial": {"_target_": "functools.partial", "_args_": [{"_target_": "os.system", "_partial_": True}]},
    "our build": {"_target_": "data2vec_train.config.build.build", "node": {"_target_": "os.system", "command": TOUCH}},
    "our write_json": {"_target_": "data2vec_train.weights.files.write_json", "path": "CANARY", "content": {}},
    "our load_plugins": {"_target_": "data2vec_train.system.plugins.load_plugins"},
    "our export": {"_target_": "data2vec_train.export.run.export", "cfg": {"out": "CANARY"}},
    "a private name": {"_target_": "data2vec_train.data.text._write", "path": "CANARY"},
    "a method": {"_target_": "data2vec_train.objective.data2vec.Data2Vec.__init__"},
    "a dunder": {"_target_": "data2vec_train.__builtins__.exec", "_args_": ["open('CANARY', 'w')"]},
    "look-alike letters": {"_target_": "data2vec_train.оptim.adamw"},
    "no name": {"_target_": ["os", "system"]},
    "partial": {"_target_": "os.system", "_partial_": True, "command": TOUCH},
    "not recursive": {"_target_": "os.system", "_recursive_": False, "_convert_": "all", "command": TOUCH},
    "in a list": [{"_target_": "torch.optim.AdamW", "params": [{"_target_": "os.system", "command": TOUCH}]}],
    "an argument of ours": {
        "_target_": "data2vec_train.objective.decoders.LinearDecoder",
        "dim": {"_target_": "os.system", "command": TOUCH},
    },
    "made by a resolver": "${oc.create:'{_target_: os.system, command: touch CANARY}'}",
    "its name made by a resolver": {"_target_": "${oc.decode:os.system}", "command": TOUCH},
    "its name in two parts": {"a": "sys", "_target_": "os.${.a}tem", "command": TOUCH},
}


@pytest.fixture
def bait(tmp_path, monkeypatch):
    """Fills in the paths of a payload; `bait()` says whether it ran."""
    places = {name: tmp_path / name.lower() for name in ("CANARY", "PICKLE", "SCRIPT", "DIR")}
    places["DIR"].mkdir()
    code = f"open({str(places['CANARY'])!r}, 'w')\n"
    for file in ("script", "evil_module.py", "dir/hubconf.py", "dir/dir.py", "dir/loader.py"):
        (tmp_path / file).write_text(code)
    torch.save(Runs(places["CANARY"]), places["PICKLE"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def fill(payload=None):
        if payload is None:
            return places["CANARY"].exists()
        text = json.dumps(payload, ensure_ascii=False)
        for name, path in places.items():
            text = text.replace(name, str(path))
        return json.loads(text)

    return fill


class Runs:
    """Unpickled by Python itself, it makes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def test_the_canary_is_found_when_something_runs(bait):
    instantiate(bait(CALLS["pathlib"]))
    assert bait()


def test_the_pickle_runs_when_python_reads_it(bait, tmp_path):
    torch.load(tmp_path / "pickle", weights_only=False)
    assert bait()


@pytest.mark.parametrize("name", CALLS)
def test_a_config_cannot_call(name, bait):
    cfg = OmegaConf.create({"node": bait(CALLS[name])})
    if name != "made by a resolver":  # which is only seen when it is resolved
        assert any(
            "may not be called" in fault or "dotted path" in fault or "there is no" in fault for fault in preflight(cfg)
        )
    with pytest.raises(ConfigError):
        build(cfg.node if OmegaConf.is_config(cfg.node) else cfg)
    assert not bait()


def test_everything_that_the_configs_and_recipes_name_is_allowed():
    named = set()
    for file in [*config_directory().rglob("*.yaml"), *(recipes_parent() / "recipes").rglob("*.yaml")]:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        named |= {value for path, value in nodes_of(tree) if path.split(".")[-1] == "_target_"}
    named.remove("${wrapped:hf,${encoder.path},target}")  # one of these three
    named |= {f"data2vec_train.wrapped.hf.{name}" for name in ("HFImages", "HFSpeech", "HFText")}
    assert len(named) > 40
    assert {place: fault for place in named if (fault := target_fault(place))} == {}


# Each is a stranger's recipe, chosen with +recipes=NAME: it can set hydra's own part as well.
TOUCHING = "{_target_: os.system, command: touch CANARY}"
HANDLER = "job_logging: {handlers: {x: %s}, root: {handlers: [x]}}"
HYDRA = {
    "callback": f"callbacks: {{x: {TOUCHING}}}",
    "callback_of_a_resolver": f"callbacks: {{x: \"${{oc.create:'{TOUCHING}'}}\"}}",
    "callback_nested": f"callbacks: {{x: {{_target_: hydra.utils.call, config: {TOUCHING}}}}}",
    "callback_of_hydra": "callbacks: {x: {_target_: hydra.utils.get_method, path: os.system}}",
    "launcher": f"launcher: {TOUCHING}",
    "launcher_argument": "launcher: {x: {_target_: pathlib.Path.touch, _args_: [CANARY]}}",
    "sweeper": "sweeper: {_target_: subprocess.Popen, args: [touch, CANARY]}",
    "sweeper_argument": "sweeper: {params: {a: {_target_: subprocess.Popen, args: [touch, CANARY]}}}",
    "logging_factory": HANDLER % "{(): os.system, command: touch CANARY}",
    "logging_class": HANDLER % "{class: subprocess.Popen, args: [touch, CANARY]}",
    "logging_open": HANDLER % "{class: builtins.open, file: CANARY, mode: w}",
    "logging_by_mail": HANDLER
    % "{class: logging.handlers.SMTPHandler, mailhost: h, fromaddr: a, toaddrs: b, subject: c}",
    "logging_stream": "job_logging: {handlers: {console: {stream: ext://evil_module.x}}}",
    "logging_formatter": "job_logging: {formatters: {simple: {(): evil_module.F}}}",
    "logging_filter": "job_logging: {filters: {f: {(): pathlib.Path.touch, self: CANARY}}}",
    "logging_property": "job_logging: {handlers: {console: {.: {emit: ext://os.system}}}}",
    "hydra_logging": "hydra_" + HANDLER.removeprefix("job_") % "{(): os.system, command: touch CANARY}",
    "environment": "job: {env_set: {LD_PRELOAD: evil.so}}",
}
CHILD = """
import json, sys
from pathlib import Path
from data2vec_train.config import compose as config

folder, canary = Path(sys.argv[1]), Path(sys.argv[2])
results = {}
for name in sys.argv[3:]:
    sweeps = name.startswith(("launcher", "sweeper"))
    for flags in ([], ["-m", "seed=0,1"]) if sweeps else ([],):
        sys.argv = ["train", f"+recipes={name}", *flags, f"hydra.run.dir={folder}/run"]
        sys.argv += [f"hydra.sweep.dir={folder}/run"]
        try:
            config.main(lambda cfg: None, config_name="train")
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        results[f"{name} {flags}"] = [status, canary.exists()]
        canary.unlink(missing_ok=True)
print(json.dumps(results))
"""


@pytest.fixture
def evil_folder(tmp_path):
    (tmp_path / "configs" / "recipes").mkdir(parents=True)
    for name, text in HYDRA.items():
        body = text.replace("CANARY", str(tmp_path / "canary"))
        (tmp_path / "configs" / "recipes" / f"{name}.yaml").write_text(f"# @package _global_\nhydra:\n  {body}\n")
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nx = F = None\n")
    return tmp_path


def python(*arguments, cwd, paths=(), timeout=300, **environment):
    path = os.pathsep.join(map(str, (*paths, ROOT, cwd)))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_hydras_own_part_of_a_strangers_config_runs_nothing(evil_folder):
    configs, canary = evil_folder / "configs", evil_folder / "canary"
    done = python("-c", CHILD, configs, canary, *HYDRA, cwd=evil_folder, DATA2VEC_RECIPES=str(configs))
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(HYDRA) + 4
    assert {name: found for name, found in results.items() if found != [2, False]} == {}
    assert "Traceback" not in done.stderr
    assert not (configs / "run").exists()


@pytest.mark.parametrize("name", ["logging_class", "callback_of_a_resolver"])
def test_as_a_real_command_it_runs_nothing(evil_folder, name):
    command = ["-m", "data2vec_train", f"+recipes={name}"]
    done = python(*command, cwd=evil_folder, DATA2VEC_RECIPES=str(evil_folder / "configs"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not (evil_folder / "canary").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("pkg://evil_module", "would be imported"),
        ("pkg://${oc.env:EVIL_PACKAGE}", "would be imported"),
        ("https://example.org/configs", "expected file://DIR"),
    ],
)
def test_a_search_path_imports_nothing(evil_folder, entry, said):
    primary = evil_folder / "configs" / "mine.yaml"
    primary.write_text(f"hydra:\n  searchpath: ['{entry}']\n")
    command = ["-m", "data2vec_train", "--config-path", primary.parent, "--config-name", "mine"]
    done = python(*command, cwd=evil_folder, EVIL_PACKAGE="evil_module")
    assert done.returncode == 2
    assert said in done.stderr
    assert not (evil_folder / "canary").exists()
    shown = entry.replace("${oc.env:EVIL_PACKAGE}", "evil_module")
    [fault] = find_faults([f"hydra.searchpath=['{shown}']"], config_name="train")
    assert said in fault


def test_a_pickled_job_is_not_rerun(evil_folder):
    (evil_folder / "job.pickle").write_bytes(pickle.dumps(Runs(evil_folder / "canary")))
    done = python("-m", "data2vec_train", "--experimental-rerun", evil_folder / "job.pickle", cwd=evil_folder)
    assert done.returncode == 2
    assert not (evil_folder / "canary").exists()


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_a_config_cannot_read_a_password_of_the_environment(name, monkeypatch):
    monkeypatch.setenv(name, "hunter2")
    [fault] = find_faults([f"+note=${{oc.env:{name},none}}"], config_name="train")
    assert "may not read the environment variable" in fault
    in_two_parts = OmegaConf.create({"a": name[:4], "b": name[4:], "note": "${oc.env:${a}${b}}"})
    [fault] = preflight(in_two_parts)
    assert "may not read the environment variable" in fault
    assert "hunter2" not in fault


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def dotted(canary):
    """A pickle of protocol 4, whose names may have dots, that reaches os through torch."""
    name, module = "serialization.os.system", "torch"
    argument = f"touch '{canary}'"
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


def zipped(content):
    """What torch.save writes, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def tarred(canary):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Runs(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def legacy(canary):
    buffer = io.BytesIO()
    torch.save(Runs(canary), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FILES = {
    "a checkpoint": lambda canary: zipped(pickle.dumps(Runs(canary))),
    "a checkpoint of old": legacy,
    "a bare pickle": lambda canary: pickle.dumps(Runs(canary)),
    "dots in a name": lambda canary: zipped(dotted(canary)),
    "a name in Python 2's spelling": lambda canary: zipped(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()),
    "a name of __builtin__": lambda canary: zipped(
        f"c__builtin__\neval\n(S'open({str(canary)!r}, chr(119))'\ntR.".encode()
    ),
    "a tar": tarred,
}
PLACES = ("model.ckpt", "model.pt", "hf/pytorch_model.bin", "hf/model.safetensors", "run/checkpoints/last.ckpt")


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_weights_runs_nothing(kind, tmp_path):
    canary = tmp_path / "canary"
    content = FILES[kind](canary)
    for name in PLACES:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        given = file if file.parent == tmp_path else tmp_path / name.partition("/")[0]
        if name.startswith("hf/"):
            for other in (tmp_path / "hf").iterdir():
                if other != file:
                    other.unlink()
            facts = {"model_type": "data2vec-vision", "hidden_size": 12, "num_hidden_layers": 1}
            (tmp_path / "hf" / "config.json").write_text(json.dumps(facts | {"num_attention_heads": 2}))
        with pytest.raises(ConfigError):
            load_pretrained(given)
        assert not canary.exists(), name


SCRIPT = """
import torch
from typing import Tuple

class Evil(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]) -> None:
        self.x = state[0]
        self.training = state[1]
        torch.save(state[0], "CANARY")

    def forward(self):
        return self.x
"""


def test_a_torchscript_program_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    (tmp_path / "evil_script.py").write_text(SCRIPT.replace("CANARY", str(canary)))
    monkeypatch.syspath_prepend(str(tmp_path))
    from evil_script import Evil

    torch.jit.script(Evil()).save(str(tmp_path / "model.pt"))
    torch.jit.load(str(tmp_path / "model.pt"))
    assert canary.exists()  # so it does run, where somebody loads it
    canary.unlink()
    with pytest.raises(ConfigError, match="TorchScript"):
        read_checkpoint(tmp_path / "model.pt")
    assert not canary.exists()


def test_numpys_dtypes_of_a_checkpoint_are_not_made(tmp_path):
    """The state of a dtype can say that an array of objects is one of bytes, which are then taken for pointers."""
    torch.save({"model": {}, "best": np.float64(3), "array": np.zeros(2)}, tmp_path / "model.pt")
    content = read_checkpoint(tmp_path / "model.pt")
    assert not any(isinstance(content[name], (np.generic, np.ndarray)) for name in ("best", "array"))


def test_names_in_the_json_files_of_a_folder_of_weights_call_nothing(tmp_path):
    canary = tmp_path / "canary"
    call = {"_target_": "os.system", "command": f"touch '{canary}'"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "data2vec_train-plugin", "encoder": call}))
    for name in ("preprocessor_config.json", "tokenizer_config.json", "finetuning.json"):
        (tmp_path / name).write_text(json.dumps({"head": call, "auto_map": {"AutoModel": "evil.py"}, **call}))
    with pytest.raises(ConfigError):
        load_pretrained(tmp_path)
    assert not canary.exists()


def test_no_file_is_unpickled_by_python_itself():
    """torch.load without weights_only=True occurs once, with the unpickler that refuses code."""
    for file in (ROOT / "data2vec_train").rglob("*.py"):
        text = file.read_text()
        allowed = 1 if file.name == "pickles.py" else 0
        assert text.count("torch.load(") - text.count("weights_only=True") <= allowed, file
        assert "allow_pickle=True" not in text, file
        assert "trust_remote_code=True" not in text, file
        assert "extractall(" not in text, file


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_a_script_in_a_data_set_is_not_run(bait, tmp_path):
    with pytest.raises((ConfigError, DataError)):
        HFSource(path=str(tmp_path / "dir"), name=None, split=None, column=None, label_column=None, data_files=None,
                 revision=None, cache_dir=str(tmp_path / "cache"), kind="image")  # fmt: skip
    assert not bait()


def test_objects_in_an_array_file_are_not_unpickled(bait, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([Runs(tmp_path / "canary")], dtype=object), labels=np.zeros(1))
    with pytest.raises((ConfigError, DataError)):
        ArraySource(path=str(tmp_path / "x.npz"), split="train", held_out=0)
    assert not bait()


# ---------------------------------------------------------------------------------------------------------------------
# The network

OFFLINE = """
import socket

def refuse(*arguments, **named):
    with open("LOG", "a") as file:
        file.write(f"{arguments}\\n")
    raise OSError("no network here")

connect = socket.socket.connect
def local_only(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket.connect = socket.socket.connect_ex = local_only
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refuse
"""
DEMOS = """
import sys
from data2vec_train.__main__ import _pretrain
from data2vec_train.config.compose import main

out, *runs = sys.argv[1:]
short = ["trainer.max_steps=2", "data.batch_size_per_device=4", "data.max_probe_samples=40", "report=false"]
short += ["size.depth=1", "size.dim=16", "size.ffn_dim=16", "size.num_heads=1", f"cache_dir={out}/cache"]
short += ["callbacks.probe.every_n_steps=2"]
short += ["modality.encoder.prenet_depth=0", "objective.targets.top_k_layers=1", "objective.masks_per_sample=1"]
for modality in runs:
    given = f"modality={modality}".split() + [f"hydra.run.dir={out}/{modality[-2:]}"]
    given += ["modality.encoder.position_groups=1", "size.conv_dim=4"] if "audio" in modality else []
    given += ["data.path=SPEECH", "data.num_workers=0"] if "hf" in modality else []
    sys.argv = ["train", *given, *short]
    main(_pretrain, config_name="train")
print("all ran")
"""


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(["audio data=hf"], id="a local file read by datasets, which counts what it reads"),
        pytest.param(["vision", "audio", "text"], id="the demos", marks=pytest.mark.slow),
    ],
)
def test_nothing_uses_the_network_unasked(runs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OFFLINE.replace("LOG", str(tmp_path / "log")))
    speech = ROOT / "data2vec_train" / "samples" / "speech_en.parquet"
    code = DEMOS.replace("SPEECH", str(speech))
    cache = str(tmp_path / "home")
    done = python("-c", code, tmp_path, *runs, cwd=tmp_path, paths=[tmp_path], OMP_NUM_THREADS="1", HF_HOME=cache)
    assert "all ran" in done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()
