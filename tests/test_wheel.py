"""The wheel works without the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgcap_jax.data.scenes.builder import encode_png
from imgcap_jax.data.scenes.world import draw_scene, sample_scene

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_trains_and_captions_in_a_separate_environment(tiny_data: Path, tmp_path: Path) -> None:
    wheels, home = tmp_path / "wheels", tmp_path / "environment"
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "-w", str(wheels), str(REPOSITORY)], check=True)
    (wheel,) = wheels.glob("imgcap_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run([python, *pip, "install", "-c", str(REPOSITORY / "constraints.txt"), str(wheel)], check=True)
    environment = {**os.environ, "TFDS_DATA_DIR": str(tiny_data), "XLA_FLAGS": ""}
    environment.pop("PYTHONPATH", None)

    def imgcap(*arguments: str) -> str:
        command = [str(home / "bin" / "imgcap"), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import imgcap_jax, imgcap_jax.experiments; print(imgcap_jax.__file__, *imgcap_jax.experiments.__path__)"
    where = subprocess.run([python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert all(path.startswith(str(home)) for path in where.stdout.split()), where
    assert where.stdout
    assert "train" in imgcap("--help")
    imgcap("train", "scenes_demo", "--smoke")
    assert "CIDEr-D" in imgcap("evaluate", "runs/scenes_demo_smoke", "--split", "test", "--page", "page.html")
    picture = tmp_path / "scene.png"
    picture.write_bytes(encode_png(draw_scene(sample_scene("test", 0))))
    assert str(picture) in imgcap("caption", str(picture), "--run", "runs/scenes_demo_smoke")
    # The model that comes with the package.
    assert len(imgcap("caption", str(picture)).split()) > 4
