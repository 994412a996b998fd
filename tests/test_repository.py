"""The house rules that a reader relies on. Oracle: the source files, read as text and as syntax trees."""
import ast
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run
from helpers import ROOT, SCRIPTS

CODE = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("kernels/*.py"))
LAYERS = ("kernels taming losses scenes outputs", "codebook files run", "vq gpt orderings cifar10", "data",
          "stages", "cache benchmark", "train_vq train_gpt sample")
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules.split()}
OUTSIDE = {"torch", "numpy", "PIL", "triton"} | set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_only_go_down_and_need_nothing_but_the_requirements():
    for path in CODE:
        module = path.stem if path.parent == ROOT else "kernels"
        for name in imports(path) - OUTSIDE - {module}:
            assert {module, name} <= LEVEL.keys(), f"{path.name} imports {name}: LAYERS must name both"
            down = LEVEL[name] < LEVEL[module]
            sideways = {("train_gpt", "train_vq"), ("sample", "train_gpt")}  # a missing stage; presets
            assert down or (module, name) in sideways, f"{path.name} imports {name}"
        if module == "kernels":
            assert imports(path) <= {"torch", "triton", "math", "functools", "kernels"}, path
    names = re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())
    assert names == ["torch", "triton", "numpy", "pillow", "pytest"]


def test_every_file_reads_in_one_sitting():
    long = []
    for path in CODE:
        lines = path.read_text().splitlines()
        long += [f"{path.name} has {len(lines)} lines"] if len(lines) > 350 else []
        long += [f"{path.name}:{number} has {len(line)} columns"
                 for number, line in enumerate(lines, 1) if len(line) > 110]
    assert not long, "a rule of this repository: a fork may delete tests/test_repository.py"


def test_nothing_loads_code_or_hides_a_mistake():
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("strict") != "False" and keywords.get("allow_pickle") != "True", path.name
                assert function != "torch.load" or keywords["weights_only"] == "True", path.name
                assert function not in ("exec", "eval", "importlib.import_module"), path.name
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_read_and_the_defaults_are_the_paper(script):
    presets = SCRIPTS[script].PRESETS
    config = type(presets["demo"])
    comments = re.findall(r"(?m)^    (\w+): \w+ = .*?  # \S.*$", inspect.getsource(config))
    fields = [field.name for field in dataclasses.fields(config)]
    assert comments == fields
    code = "".join((ROOT / name).read_text() for name in (script, "run.py", "cache.py", "stages.py"))
    for name in set(fields) - {"preset"}:  # the preset is read where the flags are parsed
        assert re.search(rf"(config|self)\.{name}\b", code), f"--{name} is read nowhere"
    assert list(presets)[:3] == ["demo", "cifar10", "paper"] and presets["paper"] == config()  # yours may follow
    assert all(list(other.PRESETS) == list(presets) for other in SCRIPTS.values())
    assert all(preset.preset == name for name, preset in presets.items())


def test_the_paper_preset_is_the_paper():
    vq, gpt = (SCRIPTS[script].PRESETS["paper"] for script in ("train_vq.py", "train_gpt.py"))
    assert (vq.image_size, vq.image_size // vq.model().downsampling) == (256, 16)
    assert (vq.codebook_size, vq.code_width) == (1024, 256)
    assert (vq.commitment_weight, vq.batch_size, vq.lr) == (0.25, 12, pytest.approx(5.4e-5))
    assert (vq.beta1, vq.beta2, vq.perceptual_weight, vq.discriminator_weight) == (0.5, 0.9, 1.0, 0.8)  # authors'
    assert (gpt.n_layer, gpt.n_head, gpt.n_embd) == (24, 16, 1024)
    assert (gpt.beta1, gpt.beta2, gpt.weight_decay, gpt.clip) == (0.9, 0.95, 0.01, 0)  # the authors' release
    assert (gpt.batch_size, gpt.lr, gpt.temperature, gpt.top_k) == (12, pytest.approx(5.4e-5), 1.0, 100)


def documented_commands() -> list[str]:
    """Every `python script.py …` in README, results, docstrings, the GPU plan; `train …` in losses.sh."""
    places = ("README.md", "results/*/README.md", "results/*/*.sh", "*.py")
    texts = [re.sub(r" *\\\n *", " ", path.read_text()) for place in places for path in ROOT.glob(place)]
    command = r"\1python train_vq.py --perceptual vgg16"
    texts = [re.sub(r"(?m)^( *)train(?= --)", command, text) for text in texts]
    for part in "123456":  # where commands are echoed, not run
        plan = subprocess.run(["bash", ROOT / "results/gpu/plan.sh", part], capture_output=True, text=True,
                              env=os.environ | {"PYTHON": "echo python", "OUT": os.devnull + "/none"})
        assert plan.stdout.count("status 0") >= 1, plan
        texts.append(plan.stdout)
    pattern = r"(?:python|torchrun \S+ \d+) ((?:train_vq|train_gpt|sample)\.py(?: [^\s`|;&#>\"]+)*)"
    return [command for text in texts for command in re.findall(pattern, text)]


def test_every_documented_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run that it could clash with
    commands = documented_commands()
    assert len(commands) >= 10
    for command in commands:
        for name, value in (("…", "x"), ("$order", "row"), ("$condition", "depth"), ("$weight", "1"),
                            ("$seed", "0"), ("$share", "0.1")):
            command = command.replace(name, value)
        script, *flags = shlex.split(command)
        run.configure(SCRIPTS[script].PRESETS, flags)


def test_the_readmes_reading_order_tells_the_lengths_of_all_files():
    rows = re.findall(r"^\| (\[.*?) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = set()
    for links, lines in rows:
        places = [ROOT / link for link in re.findall(r"\]\((.*?)\)", links)]
        listed |= {place.name for place in places}
        files = [file for place in places for file in (place.glob("*.py") if place.is_dir() else [place])]
        found = sum(len(file.read_text().splitlines()) for file in files)
        assert found == pytest.approx(int(lines), rel=0.05), f"{links}: the README's number of lines is old"
    assert listed == {file.name for file in ROOT.glob("*.py")} | {"kernels"}


def test_ci_runs_the_command_of_the_readme():
    test_command = "-m pytest -q tests"
    assert f"python {test_command}" in (ROOT / "README.md").read_text()
    assert test_command in (ROOT / ".ci/run").read_text()
