"""The README's examples run as they stand."""

import pathlib
import re

import jattn

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_functions_and_modules(capsys):
    function, module, _ = EXAMPLES
    names = run(function)
    assert names["out"].shape == (1, 1024, 8, 64)
    assert names["blocks"].shape == (1, 1024, 8, 3)
    assert run(module)["y"].shape == (2, 1, 128)
    assert int(capsys.readouterr().out) > 0


def test_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text"
    folder.mkdir()
    for source in sorted((ROOT / "jattn" / "ops").glob("*.py")):
        (folder / source.name).write_bytes(source.read_bytes())
    *_, example = EXAMPLES
    code = example
    for long, short in [("steps=1000", "steps=1"), ("features=128", "features=16")]:
        assert long in code
        code = code.replace(long, short)
    result = run(code)["result"]
    assert result.step == 1
    assert (tmp_path / "runs/nsa/checkpoints/1").is_dir()


def test_every_scheme_of_the_table_exists():
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert named == {*jattn.nn.MIXERS, "megabyte"}
