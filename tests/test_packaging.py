"""An installed wheel works like the checkout: configs, recipes, samples and licences travel inside the package."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_a_wheel_holds_configs_recipes_and_samples_and_runs_from_anywhere(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for folder in ("data2vec_train", "configs", "recipes"):
        shutil.copytree(CHECKOUT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / file, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    for folder in ("configs", "recipes"):
        expected = {f"data2vec_train/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / folder).rglob("*.yaml")}
        assert expected <= names
    assert {"data2vec_train/samples/mnist_5k.npz", "data2vec_train/samples/licences/mnist_5k.txt"} <= names
    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "data2vec_train").rglob("*.py")}
    assert modules <= names
    assert not any(name.startswith(("configs/", "recipes/", "tests/")) for name in names)

    def answer(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "data2vec_train", *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)

    help_text = answer("--help")
    assert help_text.returncode == 0, help_text.stderr
    assert "data2vec2" in help_text.stdout
    wrong = answer("+recipes=vision/base_imagnet_v2")
    assert wrong.returncode == 2
    assert "did you mean vision/base_imagenet_v2?" in wrong.stderr
