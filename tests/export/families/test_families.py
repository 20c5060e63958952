"""What every family file gives, and the geometry of published models that cut images into tiles."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from trimvlm.errors import UserError
from trimvlm.profile import Grid
from trimvlm_export import families

CONTRACT = (
    *("canonical", "model_spec", "tower", "pixel_values", "Vision", "Projector", "unused"),
    *("reference_views", "reference_project", "DECODER_PREFIX", "LM_HEAD"),
)


@pytest.mark.parametrize("name", families.names())
def test_a_family_file_is_whole(name: str) -> None:
    family = families.of(name)
    assert [part for part in CONTRACT if not hasattr(family, part)] == []


def test_shared_code_is_no_family() -> None:
    assert {"llava", "llava_next", "llava_onevision", "internvl"} <= set(families.names())
    with pytest.raises(UserError, match="'_towers' is not supported; supported: internvl, llava, llava_next"):
        families.of("_towers")


@pytest.mark.parametrize(
    ("config", "grid", "views", "tokens"),
    [
        (transformers.LlavaNextConfig, (48, 48), 5, 576 + 48 * 49),
        (transformers.LlavaNextConfig, (24, 48), 3, 576 + 24 * 49),  # not 2 x 2 tiles with padding
        (transformers.LlavaNextConfig, None, 1, 577),
        (transformers.LlavaOnevisionConfig, (81, 81), 10, 729 + 81 * 82),  # not 6 x 6 tiles thinned out
        (transformers.LlavaOnevisionConfig, (60, 108), 16, 729 + 60 * 109),  # 75 x 135 of 3 x 5 tiles
        (transformers.LlavaOnevisionConfig, None, 1, 730),
        (transformers.InternVLConfig, (32, 48), 7, 7 * 256),
        (transformers.InternVLConfig, (16, 16), 1, 256),
        (transformers.InternVLConfig, None, 1, 256),
    ],
)
def test_published_geometry(config: Any, grid: Grid | None, views: int, tokens: int) -> None:
    config = config()
    family = families.of(config.model_type)
    tower = family.tower(config, grid)
    assert tower.views == views and family.pixel_values(config, grid)[0] == views
    assert family.model_spec(config, None, grid).visual_tokens == tokens
