"""Clips from the command's point of view: the video preset of UniFormer trains, is evaluated, and writes its report."""

import json
import os
import pathlib

from attnlab.training import cli, evaluate
from attnlab.training.loop import train

from .conftest import ROOT


def test_video_preset_trains_and_reports(cache_dir, tmp_path, capsys):
    config = cli.load_config(f"{ROOT / 'configs' / 'uniformer.py'}:video_mnist")
    with config.unlocked():
        config.num_train_steps, config.optimizer.warmup_steps, config.batch_size, config.eval_batches = 2, 1, 4, 1
        config.log_every_steps = config.eval_every_steps = config.checkpoint_every_steps = 2
        config.data.dir, config.data.frames, config.data.image_size = os.fspath(cache_dir / "images"), 3, 28
        config.model.depths, config.model.dims, config.model.kinds, config.model.head_dim = (1,), (8,), "G", 8
    last = train(config, str(tmp_path))
    assert last["step"] == 2 and last["finished"]
    figures = evaluate.main(str(tmp_path), None, evaluate.Options(eval_batches=1, report=True))
    assert figures["images"] == 4 and json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert set(figures["class_accuracy"]) <= {"right", "down right", "down", "down left", "left", "up left", "up", "up right"}
    page = pathlib.Path(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Confusion matrix</h2>" in page and "frames of a clip are not drawn" in page and "3 x 28 x 28 x 1" in page
