"""The demo model as GGUF against llama.cpp's files of it: the KL divergence from the plain model on the same tokens.

The figures are of libllama in @node-llama-cpp/linux-x64 3.21.1 (2026-11-29), read by our reader; KL because the loss of
the text's own tokens has a spread of 0.001 to 0.002 nats.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from compress.calibration.blocks import TokenBlocks, read_blocks
from compress.job import compress_model, open_model
from compress.request import Request, recipe_for
from tests.compress.test_yardsticks import CALIBRATION, DEMO, HELD_OUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the tokens are those of Python 3.11's library"),
]
LLAMA_CPP_KL = {"Q8_0": 0.0001, "Q5_K_M": 0.0042, "Q4_K_M": 0.0095, "Q4_0": 0.0242, "IQ3_XXS": 0.0416}


@pytest.mark.parametrize(("scheme", "nats"), LLAMA_CPP_KL.items())
def test_it_diverges_no_more_than_llama_cpps_file(scheme: str, nats: float, tmp_path: Path) -> None:
    library, blocks = Path(sysconfig.get_paths()["stdlib"]), []
    for files, count in ((CALIBRATION, 32), (HELD_OUT, 40)):
        text = tmp_path / "tokens.txt"
        text.write_text("".join((library / each).read_text(encoding="utf-8") for each in files), encoding="utf-8")
        blocks.append(read_blocks(text, DEMO, 4096, 512, count))
    recipe = recipe_for(Request("", scheme))
    report = compress_model(open_model(DEMO), recipe, TokenBlocks(*blocks), tmp_path / "x.gguf", lambda done: None)
    assert report.loss is not None
    assert report.loss.kl_nats <= nats * 1.05 + 0.00005
